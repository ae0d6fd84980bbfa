"""The rules of the update family, for :func:`~lightning_gr.regularized_backward` and custom callbacks."""

from lightning_gr.core.rules import SCHEMES, GRRule, Probe, Rule, SAMRule, Scheme, Update
from lightning_gr.core.schedule import Schedule

__all__ = ["SCHEMES", "GRRule", "Probe", "Rule", "SAMRule", "Schedule", "Scheme", "Update"]
