"""The callbacks' short names for flags (``--gr.gamma``) and for the environment (``LIGHTNING_GR="sam"``)."""

from typing import Any

from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.momentum import MomentumSAM
from lightning_gr.callbacks.regularization import SAM, GradientRegularization

__all__ = ["CALLBACKS_BY_NAME", "METHODS_BY_NAME"]

CALLBACKS_BY_NAME: dict[str, type[Any]] = {
    "gr": GradientRegularization,
    "sam": SAM,
    "msam": MomentumSAM,
    "flooding": Flooding,
}

# the key above of each method, with the arguments that make that callback the method
METHODS_BY_NAME: dict[str, tuple[str, dict[str, Any]]] = {
    "F-GR": ("gr", {"scheme": "forward"}),
    "B-GR": ("gr", {"scheme": "backward"}),
    "penalty": ("gr", {"normalize": True}),
    "SAM": ("sam", {"adaptive": False}),
    "ASAM": ("sam", {"adaptive": True}),
    "MSAM": ("msam", {}),
    "flooding": ("flooding", {}),
}
