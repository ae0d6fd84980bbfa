"""Flat minima for PyTorch Lightning: gradient regularization, SAM and flooding by adding one callback."""

import sys

if sys.argv[:1] == ["-m"] and "lightning_gr" in sys.orig_argv:  # `python -m lightning_gr`, whose imports take seconds
    from lightning_gr_startup import exit_on_interrupt

    sys.excepthook = exit_on_interrupt

# must come first: it keeps Lightning's log messages in the namespace that the user imported
from lightning_gr import _compat as _compat  # isort: skip
from lightning_gr._version import __version__
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.mixin import GradientRegularizationMixin
from lightning_gr.callbacks.momentum import MomentumSAM
from lightning_gr.callbacks.monitors import GradientNormMonitor, SharpnessMonitor
from lightning_gr.callbacks.regularization import SAM, GradientRegularization
from lightning_gr.cli.lightning_cli import GradientRegularizationCLI
from lightning_gr.core.flooding import flood
from lightning_gr.core.rules import GRRule, MomentumSAMRule, SAMRule
from lightning_gr.metrics import GradientNorm
from lightning_gr.replay.closure import regularized_backward
from lightning_gr.replay.isolation import in_second_pass
from lightning_gr.sharpness.estimates import hessian_eigenvalue, hessian_trace

__all__ = [
    "SAM",
    "Flooding",
    "GRRule",
    "GradientNorm",
    "GradientNormMonitor",
    "GradientRegularization",
    "GradientRegularizationCLI",
    "GradientRegularizationMixin",
    "MomentumSAM",
    "MomentumSAMRule",
    "SAMRule",
    "SharpnessMonitor",
    "TwoPass",
    "__version__",
    "flood",
    "hessian_eigenvalue",
    "hessian_trace",
    "in_second_pass",
    "regularized_backward",
]
