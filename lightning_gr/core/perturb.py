"""Directions, norms, and a perturbation of the weights that is taken back bit for bit.

Everything here works in place, on the device (foreach operators, no host synchronization) and on this rank's parts of
distributed tensors; only a norm is reduced over ranks. Besides one copy of the weights, or spare storage for the moved
ones, which is kept between steps because allocating it anew costs more than filling it, nothing of the size of the
parameters is allocated; ASAM needs one such set more, for |θ| + η, where it copies.
"""

import warnings
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from lightning_gr.core.rules import Update
from lightning_gr.core.sharding import by_layout, local_parts, norm_over_ranks
from lightning_gr.core.storage import WeightSwap, can_swap

__all__ = ["Perturbation", "WeightCopy", "direction_factor", "global_norm", "tensor_norms", "wide_dtype"]

_HALVES = (torch.bfloat16, torch.float16)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors in place by a number, or by a 0-dimensional tensor that may be on another device."""
    for device, group in _by_device(tensors).items():
        if isinstance(factor, Tensor):
            torch._foreach_mul_(group, factor.to(device, non_blocking=True))
        else:
            # on the CPU a number would be made a tensor for each of the tensors anew
            torch._foreach_mul_(group, torch.tensor(factor, dtype=torch.float64) if device.type == "cpu" else factor)


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Float64 if one of the tensors has it, else float32."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if wide else torch.float32


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors taken as one vector, as a 0-dimensional tensor on the first one's device.

    It is accumulated in float32 at least (bfloat16 keeps 8 bits and float16 ends at 65,504), in float64 if one of the
    tensors is. Of distributed tensors it is the norm of the whole, equal on all ranks.
    """
    dtype = wide_dtype(tensors)
    groups = by_layout(tensors).values()
    return _norm([norm_over_ranks(_norm(tensor_norms(local_parts(group), dtype)), group[0]) for group in groups])


def _norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all from the norms of each."""
    if len(norms) == 1:
        return norms[0]
    together = torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms])
    return torch.linalg.vector_norm(together)  # type: ignore[no-any-return]


def tensor_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The Euclidean norm of each tensor, on its device, accumulated in ``dtype``."""
    # complex norms are real; the operator wants a dtype of the same kind as its input
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    groups = _by_device(real).values()
    norms = [norm for group in groups for norm in torch._foreach_norm(group, 2.0, dtype=dtype)]
    if len(groups) > 1:  # back into the order of the tensors
        position = {id(tensor): i for i, tensor in enumerate(tensor for group in groups for tensor in group)}
        norms = [norms[position[id(tensor)]] for tensor in real]
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
        return None if loss_scale is None else loss_scale.to(wide_dtype(grads)).reciprocal()
    return inverse(global_norm(grads) if norm is None or update.direction == "adaptive" else norm)


def warn_if_unmoved(params: Sequence[Tensor], before: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    """Warn if most 16-bit weights with a direction to go are still where they were. This reads from the device."""
    to_move = moved = 0
    for param, old, d in zip(params, before, direction, strict=True):
        if param.dtype in _HALVES:
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
        self.swap = WeightSwap()
        self._key: tuple[tuple[torch.Size, torch.dtype, torch.device], ...] = ()
        self.tensors: list[Tensor] = []

    def take(self, params: Sequence[Tensor]) -> None:
        """Copy ``params`` (their current values)."""
        key = tuple((p.shape, p.dtype, p.device) for p in params)
        if key != self._key:
            self.tensors = [torch.empty_like(p) for p in params]
            self._key = key
        if params:
            torch._foreach_copy_(self.tensors, list(params))

    def put_back(self, params: Sequence[Tensor]) -> None:
        """Copy the values back; calling it again changes nothing."""
        if params:
            torch._foreach_copy_(list(params), self.tensors)


def is_on_host(tensors: Sequence[Tensor]) -> bool:
    """Whether a factor may be looked at: all on the CPU, and none in 16 bit, whose numbers end too early for it."""
    return all(tensor.device.type == "cpu" and tensor.dtype not in _HALVES for tensor in tensors)


def _finite(number: float) -> float:
    """Within float32, for the inverse of a norm that is as good as zero."""
    return max(-3e38, min(3e38, number))


class Perturbation:
    """A context in which the weights may be moved along the direction d, and after which they are what they were.

    Entering copies the weights, but for those that can be swapped (:mod:`lightning_gr.core.storage`). The first
    :meth:`move_to` needs no buffer for d: it takes ``.grad`` times a number, or where that number is on an accelerator
    turns ``.grad`` into d for a moment, since it is about to be multiplied by ``keep`` anyway. A later one reflects or
    stretches the displacement that the weights already have. Leaving restores the weights, whatever happened.

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
        self.copy, self.swap = copy, copy.swap
        self.loss_scale = loss_scale
        self.norm = norm
        self.step: float | None = None
        self._moved = False

    def __enter__(self) -> "Perturbation":
        with torch.no_grad():
            self.swap.release()
            self._on_host = is_on_host(self.params)
            swapped = [self._on_host and can_swap(param) for param in self.params]
            self._copied = [param for param, swap in zip(self.params, swapped, strict=True) if not swap]
            self._parts = local_parts(self._copied)
            self.copy.take(self._parts)
            self.swap.take([param for param, swap in zip(self.params, swapped, strict=True) if swap])
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back. Harmless to repeat, so that a caller can make sure after a Ctrl-C in here."""
        if self._moved:
            self.copy.put_back(self._parts)
            self.swap.put_back()
            self._moved = False
            self.swap.release()
            torch.clear_autocast_cache()

    @torch.no_grad()
    def move_to(self, step: float) -> None:
        """Put the weights at θ + step · d; the first call also multiplies ``.grad`` by ``keep``."""
        self._moved = True
        if self.step is None:
            self._leave(step)
        else:
            # θ + s₂ d = θ + (s₂/s₁)(θ₁ − θ), with θ₁ where the weights are now
            moved, before = [*self._parts, *self.swap.params], [*self.copy.tensors, *self.swap.originals]
            torch._foreach_lerp_(moved, before, 1.0 - step / self.step)
        self.step = step
        # a cast of the old weights may be cached if the caller holds one autocast context around both passes
        torch.clear_autocast_cache()

    def _leave(self, step: float) -> None:
        grads = local_parts([p.grad for p in self._copied if p.grad is not None])
        scales = self._scale_gradients_(grads) if self.update.direction == "adaptive" else None
        whole = [p.grad for p in self.params if p.grad is not None]
        factor = direction_factor(self.update, whole, self.loss_scale, self.norm)
        if factor is not None and self._on_host:
            step, factor = _finite(step * float(factor)), None
        if factor is not None:
            scale_(grads, factor)
        if grads and scales is not None:
            torch._foreach_addcmul_(self._parts, grads, scales, value=step)
        elif grads:
            torch._foreach_add_(self._parts, grads, alpha=step)
        self.swap.move(step, scaled=scales is not None)
        if self.copy.check_resolution:
            self.copy.check_resolution = False
            warn_if_unmoved(self._parts, self.copy.tensors, grads)
        self._keep(grads, factor)

    def _scale_gradients_(self, grads: list[Tensor]) -> list[Tensor]:
        """Multiply ``.grad`` by T = |θ| + η and return those T that are not in the spare storage of the swap."""
        self.swap.scale_gradients_(self.update.eta)
        if not grads:
            return []
        scales = list(torch._foreach_abs(self._parts))
        if self.update.eta:
            torch._foreach_add_(scales, self.update.eta)
        torch._foreach_mul_(grads, scales)
        return scales

    def _keep(self, grads: list[Tensor], factor: Tensor | None) -> None:
        """Multiply ``.grad`` by ``keep``, and take out the factor that it carries."""
        keep = self.update.keep
        if keep == 0.0:
            # nothing of the first gradient is kept: the second one need not be added to zeros
            for param in self.params:
                param.grad = None
        elif factor is not None:
            scale_(grads, keep / factor)
        elif keep != 1.0:
            scale_([*grads, *(param.grad for param in self.swap.params if param.grad is not None)], keep)
