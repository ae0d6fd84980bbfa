"""Sharpness of a minimum: the largest eigenvalue and the trace of the Hessian of a loss, without Lightning."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._validate import check_int, check_number
from lightning_gr.core.tensors import inner_product, random_signs, random_unit
from lightning_gr.sharpness.hessian import HessianMethod, HessianProducts

__all__ = ["HessianEigenvalue", "HessianTrace", "estimate_trace", "hessian_eigenvalue", "hessian_trace", "lanczos"]

LossFn = Callable[[], Any]
Params = nn.Module | Iterable[Tensor]


@dataclass(frozen=True)
class HessianEigenvalue:
    """The largest eigenvalue of a Hessian; ``float(...)`` is its value.

    Args:
        value: λ, NaN if a product was not finite.
        residual: ‖H u − λ u‖ for the unit vector u that belongs to it: an eigenvalue lies within that of λ.
        iterations: The number of products H v that were taken.
        converged: Whether ``residual`` ≤ tolerance · |λ|.
        method: How they were taken: ``"double_backward"`` or ``"finite_difference"``.
    """

    value: float
    residual: float
    iterations: int
    converged: bool
    method: str

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class HessianTrace:
    """The trace of a Hessian; ``float(...)`` is its value.

    Args:
        value: The mean over samples, NaN if a product was not finite.
        standard_error: Of that mean; infinite for one sample.
        samples: The number of products H v that were taken.
        converged: Whether ``standard_error`` ≤ tolerance · |value|.
        method: How they were taken: ``"double_backward"`` or ``"finite_difference"``.
    """

    value: float
    standard_error: float
    samples: int
    converged: bool
    method: str

    def __float__(self) -> float:
        return self.value


def hessian_eigenvalue(
    loss_fn: LossFn,
    params: Params,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    method: HessianMethod = "auto",
    generator: torch.Generator | None = None,
) -> HessianEigenvalue:
    """The largest (most positive) eigenvalue λ of the Hessian of a loss, by Lanczos iteration on products H v.

    It leaves no trace: weights, ``.grad``, buffers and random state are what they were, bit for bit. Each product costs
    about two passes (four by finite differences). Besides the graph of the gradient it needs room for four vectors of
    the size of the parameters.

    Args:
        loss_fn: Computes the loss, a scalar (or a mapping with ``"loss"``), at the current weights.
        params: The module, of which the trainable parameters are taken, or parameters alone (then no buffers are
            protected).
        max_iterations: The most products H v.
        tolerance: Stop when the residual ‖H u − λ u‖ is at most ``tolerance`` · |λ|.
        method: ``"double_backward"``, ``"finite_difference"``, or ``"auto"``: the first, and the second where an
            operator has no second derivative. See :class:`~lightning_gr.sharpness.hessian.HessianProducts`.
        generator: Draws the starting vector; by default one of its own with seed 0.

    Raises:
        ValueError: If an argument is out of its range, there are no trainable parameters, or ``loss_fn`` returns no
            loss with a graph.

    Source: Lanczos (1950), with Paige's bound for the residual; Pearlmutter (1994) for H v.

    Example::

        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> result = hessian_eigenvalue(lambda: 3 * w[0] ** 2 - 5 * w[1] ** 2, [w])
        >>> round(result.value, 3), result.converged
        (6.0, True)
    """
    with HessianProducts(loss_fn, params, method=method) as products:
        return lanczos(products, max_iterations=max_iterations, tolerance=tolerance, generator=generator)


def hessian_trace(
    loss_fn: LossFn,
    params: Params,
    *,
    max_samples: int = 100,
    min_samples: int = 10,
    tolerance: float = 0.03,
    method: HessianMethod = "auto",
    generator: torch.Generator | None = None,
) -> HessianTrace:
    """The trace of the Hessian of a loss by Hutchinson's estimator: the mean of vᵀH v over vectors v of random signs.

    It leaves no trace: weights, ``.grad``, buffers and random state are what they were, bit for bit.

    Args:
        loss_fn: As in :func:`hessian_eigenvalue`.
        params: As there.
        max_samples: The most products H v.
        min_samples: The fewest, so that the standard error means something.
        tolerance: Stop when the standard error is at most ``tolerance`` · |trace|.
        method: As there.
        generator: Draws the vectors; by default one of its own with seed 0.

    Raises:
        ValueError: As there.

    Source: Hutchinson (1989); the variance with random signs is 2 Σ_{i≠j} H_ij².

    Example::

        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> hessian_trace(lambda: 3 * w[0] ** 2 - 5 * w[1] ** 2, [w]).value
        -4.0
    """
    with HessianProducts(loss_fn, params, method=method) as products:
        return estimate_trace(
            products, max_samples=max_samples, min_samples=min_samples, tolerance=tolerance, generator=generator
        )


def lanczos(
    products: HessianProducts,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> HessianEigenvalue:
    """What :func:`hessian_eigenvalue` does, with products that have been entered.

    The vectors are not orthogonalized again, which would need all of them: repeated copies of an extreme eigenvalue
    that come in by rounding do no harm to its value (Paige 1980).
    """
    check_int("max_iterations", max_iterations, minimum=1)
    check_number("tolerance", tolerance, positive=True)
    current = random_unit(products.params, generator or torch.Generator().manual_seed(0))
    previous: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        product = products(current)
        diagonal.append(float(inner_product(product, current)))
        torch._foreach_sub_(product, torch._foreach_mul(current, diagonal[-1]))
        if previous:
            torch._foreach_mul_(previous, beside[-1])
            torch._foreach_sub_(product, previous)
        beside.append(float(inner_product(product, product)) ** 0.5)
        if not math.isfinite(diagonal[-1]) or not math.isfinite(beside[-1]):
            return HessianEigenvalue(math.nan, math.nan, len(diagonal), False, products.method)
        value, last = _largest(diagonal, beside[:-1])
        residual = beside[-1] * last
        converged = residual <= tolerance * abs(value)
        if converged or len(diagonal) == max_iterations:
            return HessianEigenvalue(value, residual, len(diagonal), converged, products.method)
        torch._foreach_mul_(product, 1.0 / beside[-1])
        previous, current = current, product


def _largest(diagonal: list[float], beside: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of a symmetric tridiagonal matrix, and the size of its eigenvector's last entry."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), abs(float(vectors[-1, -1]))


def estimate_trace(
    products: HessianProducts,
    *,
    max_samples: int = 100,
    min_samples: int = 10,
    tolerance: float = 0.03,
    generator: torch.Generator | None = None,
) -> HessianTrace:
    """What :func:`hessian_trace` does, with products that have been entered."""
    check_int("max_samples", max_samples, minimum=1)
    check_int("min_samples", min_samples, minimum=1)
    check_number("tolerance", tolerance, positive=True)
    generator = generator or torch.Generator().manual_seed(0)
    samples: list[float] = []
    while True:
        signs = random_signs(products.params, generator)
        samples.append(float(inner_product(signs, products(signs))))
        count, mean = len(samples), math.fsum(samples) / len(samples)
        if not math.isfinite(samples[-1]):
            return HessianTrace(math.nan, math.nan, count, False, products.method)
        error = statistics.stdev(samples) / count**0.5 if count > 1 else math.inf
        converged = count >= min_samples and error <= tolerance * abs(mean)
        if converged or count >= max_samples:
            return HessianTrace(mean, error, count, converged, products.method)
