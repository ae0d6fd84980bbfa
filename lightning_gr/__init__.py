"""Flat minima for PyTorch Lightning: gradient regularization, SAM and flooding by adding one callback."""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lightning_gr._version import __version__


def _is_our_command() -> bool:
    """Whether this program is ``lightning-gr`` or ``python -m lightning_gr``, whose help needs no torch.

    Everywhere else all names are there at once: LightningCLI knows a class by its short name only when it is imported.
    """
    program = sys.argv[0] if sys.argv else ""
    return PurePath(program).stem == "lightning-gr" or (program == "-m" and "lightning_gr" in sys.orig_argv)


if TYPE_CHECKING or not _is_our_command():
    from lightning_gr.callbacks.base import SAM, GradientRegularization
    from lightning_gr.callbacks.flooding import Flooding
    from lightning_gr.callbacks.mixin import GradientRegularizationMixin
    from lightning_gr.callbacks.monitors import GradientNormMonitor, SharpnessMonitor
    from lightning_gr.cli.lightning_cli import GradientRegularizationCLI
    from lightning_gr.core.flooding import flood
    from lightning_gr.core.rules import GRRule, SAMRule
    from lightning_gr.metrics import GradientNorm
    from lightning_gr.replay.closure import regularized_backward
    from lightning_gr.replay.isolation import in_second_pass
    from lightning_gr.sharpness.estimates import hessian_eigenvalue, hessian_trace
else:
    _HOMES = {
        "callbacks.base": ("SAM", "GradientRegularization"),
        "replay.closure": ("regularized_backward",),
        "callbacks.flooding": ("Flooding",),
        "core.flooding": ("flood",),
        "replay.isolation": ("in_second_pass",),
        "cli.lightning_cli": ("GradientRegularizationCLI",),
        "metrics": ("GradientNorm",),
        "callbacks.mixin": ("GradientRegularizationMixin",),
        "callbacks.monitors": ("GradientNormMonitor", "SharpnessMonitor"),
        "rules": ("GRRule", "SAMRule"),
        "sharpness.estimates": ("hessian_eigenvalue", "hessian_trace"),
    }

    def __getattr__(name: str) -> Any:
        """Import a public name when it is asked for (PEP 562)."""
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"lightning_gr.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SAM",
    "Flooding",
    "GRRule",
    "GradientNorm",
    "GradientNormMonitor",
    "GradientRegularization",
    "GradientRegularizationCLI",
    "GradientRegularizationMixin",
    "SAMRule",
    "SharpnessMonitor",
    "__version__",
    "flood",
    "hessian_eigenvalue",
    "hessian_trace",
    "in_second_pass",
    "regularized_backward",
]
