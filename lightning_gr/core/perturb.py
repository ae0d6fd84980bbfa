"""A displacement of the weights along a direction that is made of their gradients, and taken back bit for bit.

Besides one copy of the weights, or spare storage for the displaced ones, which is kept between steps because allocating
it again costs more than filling it, nothing of the size of the parameters is allocated; ASAM needs one such set more,
for |θ| + η, where it copies.
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
    """What ``grads`` must be multiplied by to be the direction d; None stands for 1.

    Args:
        update: The row of the table.
        grads: S · ∇L(θ); for the adaptive direction S · (|θ|+η) ⊙ ∇L(θ).
        loss_scale: The scale S of a gradient scaler, as a tensor; None stands for 1. A normalized direction does not
            depend on it.
        norm: S · ‖∇L(θ)‖, if it is known already.
    """
    if update.direction == "gradient":
        return None if loss_scale is None else loss_scale.to(wide_dtype(grads)).reciprocal()
    return inverse(global_norm(grads) if norm is None or update.direction == "adaptive" else norm)


def is_on_host(tensors: Sequence[Tensor]) -> bool:
    """Whether a factor may be looked at: all on the CPU, and none in 16 bit, whose numbers end too early for it."""
    return all(tensor.device.type == "cpu" and tensor.dtype not in HALVES for tensor in tensors)


def _finite(number: float) -> float:
    """Within float32, for the inverse of a norm that is as good as zero."""
    return max(-3e38, min(3e38, number))


class Perturbation:
    """A context in which weights may be displaced along a direction d, and after which they are what they were.

    The first :meth:`displace` needs no buffer for d: it takes ``.grad`` times a number, or where that number is on an
    accelerator turns ``.grad`` into d, and says by which factor. Later displacements stretch or reflect the first one.
    Leaving restores the weights, whatever happened in between.

    Args:
        params: The parameters to displace. Each has a gradient.
        storage: Where the weights are kept meanwhile.
    """

    def __init__(self, params: Sequence[Tensor], storage: WeightStorage) -> None:
        self.params = list(params)
        self.storage = storage
        self._distance: float | None = None
        self._displaced = False

    def __enter__(self) -> "Perturbation":
        with torch.no_grad():
            self._on_host = is_on_host(self.params)
            self.storage.take(self.params, may_swap=self._on_host)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back. Harmless to repeat, so that a caller can make sure after a Ctrl-C in here."""
        if self._displaced:
            self.storage.put_back()
            self._displaced = False
            self.storage.release()
            torch.clear_autocast_cache()

    @torch.no_grad()
    def displace(
        self, update: Update, distance: float, loss_scale: Tensor | None = None, norm: Tensor | None = None
    ) -> Tensor | None:
        """Put the weights at θ + ``distance`` · d, with d made from ``.grad``.

        Args:
            update: Says what d is. Of the adaptive direction, ``.grad`` is used up.
            distance: In units of d.
            loss_scale: See :func:`direction_factor`.
            norm: As there.

        Returns:
            The factor by which ``.grad`` was multiplied in place; None stands for 1.
        """
        self._displaced = True
        self._distance = distance
        if update.direction == "adaptive":
            self.storage.scale_direction_(update.eta)
        grads = [param.grad for param in self.params if param.grad is not None]
        factor = direction_factor(update, grads, loss_scale, norm)
        if factor is not None and self._on_host:
            distance, factor = _finite(distance * float(factor)), None
        if factor is not None:
            scale_(local_parts(grads), factor)
        self.storage.displace(distance)
        # a cast of the old weights may be cached if the caller holds one autocast context around both passes
        torch.clear_autocast_cache()
        return factor

    @torch.no_grad()
    def move_to(self, distance: float) -> None:
        """Put the weights at θ + ``distance`` · d, after a first displacement along d."""
        if self._distance is None:
            raise RuntimeError("Perturbation.move_to needs a first displacement: call `displace` before")
        # θ + s₂ d = θ + (s₂/s₁)(θ₁ − θ), with θ₁ where the weights are now
        self.storage.stretch(distance / self._distance)
        self._distance = distance
        torch.clear_autocast_cache()
