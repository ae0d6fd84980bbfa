"""Directions, norms, and a perturbation of the weights that is taken back bit for bit.

Everything here works in place, on the device (foreach operators, no host synchronization) and on this rank's parts of
distributed tensors; only a norm is reduced over ranks. Besides one copy of the
weights, which is kept between steps because allocating it anew costs more than filling it, nothing of the size of the
parameters is allocated; ASAM needs one such set more, for |θ| + η.
"""

import warnings
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from lightning_gr.rules import Update
from lightning_gr.sharding import by_layout, local_parts, norm_over_ranks

__all__ = ["Perturbation", "WeightCopy", "direction_factor", "global_norm"]


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors in place by a number, or by a 0-dimensional tensor that may be on another device."""
    for device, group in _by_device(tensors).items():
        torch._foreach_mul_(group, factor.to(device, non_blocking=True) if isinstance(factor, Tensor) else factor)


def _wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Float64 if one of the tensors has it, else float32."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if wide else torch.float32


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors taken as one vector, as a 0-dimensional tensor on the first one's device.

    It is accumulated in float32 at least (bfloat16 keeps 8 bits and float16 ends at 65,504), in float64 if one of the
    tensors is. Of distributed tensors it is the norm of the whole, equal on all ranks.
    """
    dtype = _wide_dtype(tensors)
    groups = by_layout(tensors).values()
    return _norm([norm_over_ranks(_norm(_tensor_norms(local_parts(group), dtype)), group[0]) for group in groups])


def _norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all from the norms of each."""
    if len(norms) == 1:
        return norms[0]
    together = torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms])
    return torch.linalg.vector_norm(together)  # type: ignore[no-any-return]


def _tensor_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    norms: list[Tensor] = []
    for group in _by_device(tensors).values():
        # complex norms are real; the operator wants a dtype of the same kind as its input
        real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in group]
        norms.extend(torch._foreach_norm(real, 2.0, dtype=dtype))
    return norms


def inverse(norm: Tensor) -> Tensor:
    """1/norm, and a large finite number at 0, so that a zero gradient gives a zero direction and never NaN."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal()


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
        return None if loss_scale is None else loss_scale.to(_wide_dtype(grads)).reciprocal()
    return inverse(global_norm(grads) if norm is None or update.direction == "adaptive" else norm)


def warn_if_unmoved(params: Sequence[Tensor], before: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    """Warn if most 16-bit weights with a direction to go are still where they were. This reads from the device."""
    halves = (torch.bfloat16, torch.float16)
    to_move = moved = 0
    for param, old, d in zip(params, before, direction, strict=True):
        if param.dtype in halves:
            to_move += int((d != 0).sum())
            moved += int(((param != old) & (d != 0)).sum())
    if moved < to_move / 2:
        warnings.warn(
            f"Only {moved / to_move:.1%} of the 16-bit weights move: the perturbation is below their resolution, so the"
            " second gradient says little. Train with precision='bf16-mixed', or take a larger `epsilon` or `rho`",
            stacklevel=2,
        )


class WeightCopy:
    """An exact copy of some parameters (of their local parts), in storage that is kept from step to step.

    Args:
        check_resolution: Whether to look, at the first perturbation and only then, if 16-bit weights move at all.
    """

    def __init__(self, check_resolution: bool = False) -> None:
        self.check_resolution = check_resolution
        self._key: tuple[tuple[torch.Size, torch.dtype, torch.device], ...] = ()
        self.tensors: list[Tensor] = []

    def take(self, params: Sequence[Tensor]) -> None:
        """Copy ``params`` (their current values)."""
        key = tuple((p.shape, p.dtype, p.device) for p in params)
        if key != self._key:
            self.tensors = [torch.empty_like(p) for p in params]
            self._key = key
        torch._foreach_copy_(self.tensors, list(params))

    def put_back(self, params: Sequence[Tensor]) -> None:
        """Copy the values back; calling it again changes nothing."""
        torch._foreach_copy_(list(params), self.tensors)


class Perturbation:
    """A context in which the weights may be moved along the direction d, and after which they are what they were.

    Entering copies the weights. The first :meth:`move_to` turns ``.grad`` into d for a moment, since it is about to be
    multiplied by ``keep`` anyway: no buffer for d is needed. A later one reflects or stretches the displacement that
    the weights already have. Leaving restores the weights from the copy, whatever happened in between.

    Args:
        update: The row of the table.
        params: The parameters to move. Each has a gradient.
        copy: Where the weights are kept meanwhile.
        loss_scale: The scale that the gradients carry, see :func:`direction_factor`.
        norm: The norm of all gradients, if it is known already.
    """

    def __init__(
        self,
        update: Update,
        params: Sequence[Tensor],
        copy: WeightCopy,
        loss_scale: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> None:
        self.update = update
        self.params = list(params)
        self._parts = local_parts(params)
        self.copy = copy
        self.loss_scale = loss_scale
        self.norm = norm
        self.step: float | None = None
        self._moved = False

    def __enter__(self) -> "Perturbation":
        with torch.no_grad():
            self.copy.take(self._parts)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back. Harmless to repeat, so that a caller can make sure after a KeyboardInterrupt in here."""
        if self._moved:
            self.copy.put_back(self._parts)
            self._moved = False
            torch.clear_autocast_cache()

    @torch.no_grad()
    def move_to(self, step: float) -> None:
        """Put the weights at θ + step · d; the first call also multiplies ``.grad`` by ``keep``."""
        self._moved = True
        if self.step is None:
            self._leave(step)
        else:
            # θ + s₂ d = θ + (s₂/s₁)(θ₁ − θ), with θ₁ where the weights are now
            torch._foreach_lerp_(self._parts, self.copy.tensors, 1.0 - step / self.step)
        self.step = step
        # a cast of the old weights may be cached if the caller holds one autocast context around both passes
        torch.clear_autocast_cache()

    def _leave(self, step: float) -> None:
        whole = [p.grad for p in self.params if p.grad is not None]
        grads = local_parts(whole)
        adaptive = self.update.direction == "adaptive"
        if adaptive:
            scales = torch._foreach_abs(self._parts)
            if self.update.eta:
                torch._foreach_add_(scales, self.update.eta)
            torch._foreach_mul_(grads, scales)
        factor = direction_factor(self.update, whole, self.loss_scale, self.norm)
        if factor is not None:
            scale_(grads, factor)
        if adaptive:
            torch._foreach_addcmul_(self._parts, grads, scales, value=step)
        else:
            torch._foreach_add_(self._parts, grads, alpha=step)
        if self.copy.check_resolution:
            self.copy.check_resolution = False
            warn_if_unmoved(self._parts, self.copy.tensors, grads)
        self._keep(grads, factor)

    def _keep(self, grads: list[Tensor], factor: Tensor | None) -> None:
        keep = self.update.keep
        if keep == 0.0:
            # nothing of the first gradient is kept: the second one need not be added to zeros
            for param in self.params:
                param.grad = None
        elif factor is not None:
            scale_(grads, keep / factor)
        elif keep != 1.0:
            scale_(grads, keep)
