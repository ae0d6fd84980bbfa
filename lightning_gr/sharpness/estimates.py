"""Estimates the largest eigenvalue and the trace of a loss's Hessian, without Lightning."""

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
    """The largest eigenvalue of a Hessian. ``float(result)`` is its value.

    Args:
        value: λ, or NaN if a product was not finite.
        residual: ‖H u − λ u‖ for the corresponding unit vector u. An eigenvalue lies within this distance of λ.
        iterations: The number of products H v computed.
        converged: Whether ``residual`` ≤ tolerance · |λ|.
        method: How the products were computed: ``"double_backward"`` or ``"finite_difference"``.
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
    """The trace of a Hessian. ``float(result)`` is its value.

    Args:
        value: The mean over samples, or NaN if a product was not finite.
        standard_error: The standard error of the mean; infinite for a single sample.
        samples: The number of products H v computed.
        converged: Whether ``standard_error`` ≤ tolerance · |value|.
        method: How the products were computed: ``"double_backward"`` or ``"finite_difference"``.
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
    """Compute the largest (most positive) eigenvalue λ of a loss's Hessian by Lanczos iteration on products H v.

    Weights, ``.grad``, buffers and random state are left unchanged, bit for bit. Each product costs about two passes
    (four with finite differences). Memory: the graph of the gradient plus four parameter-sized vectors.

    Args:
        loss_fn: Computes the loss at the current weights: a scalar, or a mapping with the key ``"loss"``.
        params: A module, whose trainable parameters are used, or the parameters alone, without protection of buffers.
        max_iterations: The maximum number of products H v.
        tolerance: Stop when the residual ‖H u − λ u‖ is at most ``tolerance`` · |λ|.
        method: ``"double_backward"``, ``"finite_difference"``, or ``"auto"``, which falls back to finite differences
            if an operator has no second derivative. See :class:`~lightning_gr.sharpness.hessian.HessianProducts`.
        generator: Draws the starting vector. Defaults to a new generator with seed 0.

    Raises:
        ValueError: If an argument is out of range, if there are no trainable parameters, or if ``loss_fn`` does not
            return a loss with a graph.

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
    """Estimate the trace of a loss's Hessian with Hutchinson's estimator: the mean of vᵀH v over random sign vectors v.

    Weights, ``.grad``, buffers and random state are left unchanged, bit for bit.

    Args:
        loss_fn: As in :func:`hessian_eigenvalue`.
        params: As in :func:`hessian_eigenvalue`.
        max_samples: The maximum number of products H v.
        min_samples: The minimum number, so that the standard error is meaningful.
        tolerance: Stop when the standard error is at most ``tolerance`` · |trace|.
        method: As in :func:`hessian_eigenvalue`.
        generator: Draws the vectors. Defaults to a new generator with seed 0.

    Raises:
        ValueError: As in :func:`hessian_eigenvalue`.

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
    """Compute the largest eigenvalue as in :func:`hessian_eigenvalue`, with ``products`` already entered.

    The vectors are not reorthogonalized, which would require keeping them all. Rounding can then produce repeated
    copies of an extreme eigenvalue, but these do not affect its value (Paige 1980).
    """
    check_int("max_iterations", max_iterations, minimum=1)
    check_number("tolerance", tolerance, positive=True)
    current = random_unit(products.params, generator or torch.Generator().manual_seed(0))
    previous: list[Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        product = products(current)
        diagonal.append(float(inner_product(product, current)))
        torch._foreach_sub_(product, torch._foreach_mul(current, diagonal[-1]))
        if previous:
            torch._foreach_mul_(previous, off_diagonal[-1])
            torch._foreach_sub_(product, previous)
        off_diagonal.append(float(inner_product(product, product)) ** 0.5)
        if not math.isfinite(diagonal[-1]) or not math.isfinite(off_diagonal[-1]):
            return HessianEigenvalue(math.nan, math.nan, len(diagonal), False, products.method)
        value, last = _largest(diagonal, off_diagonal[:-1])
        residual = off_diagonal[-1] * last
        converged = residual <= tolerance * abs(value)
        if converged or len(diagonal) == max_iterations:
            return HessianEigenvalue(value, residual, len(diagonal), converged, products.method)
        torch._foreach_mul_(product, 1.0 / off_diagonal[-1])
        previous, current = current, product


def _largest(diagonal: list[float], off_diagonal: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of a symmetric tridiagonal matrix, and the magnitude of its eigenvector's last entry."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        off = torch.tensor(off_diagonal, dtype=torch.float64)
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
    """Estimate the trace as in :func:`hessian_trace`, with ``products`` already entered."""
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
