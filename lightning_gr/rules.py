"""The rules of the update family, and what a rule of your own needs."""

from lightning_gr.core.relatives import FriendlySAMRule, GSAMRule, LookSAMRule
from lightning_gr.core.rules import (
    FULL_STRENGTH,
    SCHEMES,
    Combine,
    Context,
    GRRule,
    MomentumSAMRule,
    Probe,
    Rule,
    SAMRule,
    Scheme,
    Turn,
    Update,
)
from lightning_gr.core.schedule import Schedule
from lightning_gr.core.state import State
from lightning_gr.core.tensors import inner_product, inverse, scale_

__all__ = [
    "FULL_STRENGTH",
    "SCHEMES",
    "Combine",
    "Context",
    "FriendlySAMRule",
    "GRRule",
    "GSAMRule",
    "LookSAMRule",
    "MomentumSAMRule",
    "Probe",
    "Rule",
    "SAMRule",
    "Schedule",
    "Scheme",
    "State",
    "Turn",
    "Update",
    "inner_product",
    "inverse",
    "scale_",
]
