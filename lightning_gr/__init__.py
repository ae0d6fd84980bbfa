"""Flat minima for PyTorch Lightning: gradient regularization, SAM and flooding by adding one callback."""

from lightning_gr._version import __version__
from lightning_gr.callback import SAM, GradientRegularization
from lightning_gr.closure import regularized_backward
from lightning_gr.flood_callback import Flooding
from lightning_gr.flooding import flood
from lightning_gr.isolation import in_second_pass
from lightning_gr.metrics import GradientNorm
from lightning_gr.mixin import GradientRegularizationMixin
from lightning_gr.monitors import GradientNormMonitor, SharpnessMonitor
from lightning_gr.rules import GRRule, SAMRule
from lightning_gr.sharpness import hessian_eigenvalue, hessian_trace

__all__ = [
    "SAM",
    "Flooding",
    "GRRule",
    "GradientNorm",
    "GradientNormMonitor",
    "GradientRegularization",
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
