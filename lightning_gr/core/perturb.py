"""Displaces the weights along a direction computed from their gradients, and restores them bit for bit.

The only parameter-sized allocation is a copy of the weights, or spare storage for the displaced ones. It is kept
between steps, because reallocating costs more than filling it. ASAM needs a second one for |θ| + η if it copies.
"""

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from lightning_gr.core.rules import Update
from lightning_gr.core.sharding import local_parts
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import HALVES, global_norm, inverse, scale_, wide_dtype

__all__ = ["Perturbation", "direction_factor", "is_on_host"]


def direction_factor(
    update: Update, grads: Sequence[Tensor], loss_scale: Tensor | None, norm: Tensor | None = None
) -> Tensor | None:
    """Return the factor that turns ``grads`` into the direction d; None means 1.

    Args:
        update: Defines the direction.
        grads: S · ∇L(θ), or S · (|θ|+η) ⊙ ∇L(θ) for the adaptive direction.
        loss_scale: The gradient scaler's scale S; None means 1. A normalized direction does not depend on it.
        norm: S · ‖∇L(θ)‖, if already known.
    """
    if update.direction == "gradient":
        return None if loss_scale is None else loss_scale.to(wide_dtype(grads)).reciprocal()
    return inverse(global_norm(grads) if norm is None or update.direction == "adaptive" else norm)


def is_on_host(tensors: Sequence[Tensor]) -> bool:
    """Whether a factor may be read as a Python number: all on the CPU, and none 16-bit, whose range is too small."""
    return all(tensor.device.type == "cpu" and tensor.dtype not in HALVES for tensor in tensors)


def _clamp(number: float) -> float:
    """Clamp to the range of float32, which the inverse of a vanishing norm can exceed."""
    return max(-3e38, min(3e38, number))


class Perturbation:
    """A context manager in which weights can be displaced along a direction d; leaving it restores them.

    The first :meth:`displace` needs no buffer for d. It moves along ``.grad`` times a number or, if that number is on
    an accelerator, scales ``.grad`` to d in place and returns the factor. Later displacements stretch or reflect the
    first one. The weights are restored even after an exception.

    Args:
        params: The parameters to displace. Each must have a gradient, unless ``directions`` are given.
        storage: Keeps the original weights in the meantime.
        directions: A vector for each parameter to move along, see :meth:`displace_along`. Default: its gradient.
    """

    def __init__(
        self, params: Sequence[Tensor], storage: WeightStorage, directions: Sequence[Tensor] | None = None
    ) -> None:
        self.params = list(params)
        self.directions = directions
        self.storage = storage
        self._distance: float | None = None
        self._displaced = False

    def __enter__(self) -> "Perturbation":
        with torch.no_grad():
            self._on_host = is_on_host(self.params)
            self.storage.take(self.params, self.directions, may_swap=self._on_host)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights. It is safe to call again, for example after a Ctrl-C interrupted the first call."""
        if self._displaced:
            self.storage.put_back()
            self._displaced = False
            self.storage.release()
            torch.clear_autocast_cache()

    @torch.no_grad()
    def displace(
        self, update: Update, distance: float, loss_scale: Tensor | None = None, norm: Tensor | None = None
    ) -> Tensor | None:
        """Move the weights to θ + ``distance`` · d, with d computed from ``.grad``.

        Args:
            update: Defines d. The adaptive direction overwrites ``.grad``.
            distance: In units of d.
            loss_scale: See :func:`direction_factor`.
            norm: See :func:`direction_factor`.

        Returns:
            The factor by which ``.grad`` was multiplied in place; None means 1.
        """
        self._displaced = True
        self._distance = distance
        if update.direction == "adaptive":
            self.storage.scale_direction_(update.eta)
        grads = self.directions or [param.grad for param in self.params if param.grad is not None]
        factor = direction_factor(update, grads, loss_scale, norm)
        if factor is not None and self._on_host:
            distance, factor = _clamp(distance * float(factor)), None
        if factor is not None:
            scale_(local_parts(grads), factor)
        self.storage.displace(distance)
        # If the caller runs both passes in one autocast context, casts of the old weights may be cached.
        torch.clear_autocast_cache()
        return factor

    @torch.no_grad()
    def displace_along(self, factor: Tensor, *, again: bool = False) -> None:
        """Move the weights to θ + ``factor`` · v, where v are the given directions, which are not modified.

        Args:
            factor: A scalar tensor.
            again: Whether nothing has changed since the storage was last displaced, see
                :meth:`~lightning_gr.core.storage.Storage.displace`.
        """
        self._displaced = True
        self.storage.displace(_clamp(float(factor)) if self._on_host else factor, again=again)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def move_to(self, distance: float) -> None:
        """Move the weights to θ + ``distance`` · d, after a first displacement along d."""
        if self._distance is None:
            raise RuntimeError("Perturbation.move_to needs a first displacement: call `displace` first")
        # θ + s₂ d = θ + (s₂/s₁)(θ₁ − θ), where θ₁ are the current weights
        self.storage.stretch(distance / self._distance)
        self._distance = distance
        torch.clear_autocast_cache()
