"""The short names of the methods, in flags (``--gr.gamma``) and in the environment (``LIGHTNING_GR="sam"``)."""

from typing import Any

from lightning_gr.callbacks.base import SAM, Flooding, GradientRegularization

__all__ = ["METHODS"]

METHODS: dict[str, type[Any]] = {"gr": GradientRegularization, "sam": SAM, "flooding": Flooding}
