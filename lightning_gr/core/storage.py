"""Storage for the weights while they are displaced: copy them and move them in place, or swap in other storage.

Copying costs four passes over the parameters: two to save the weights and two to restore them. Swapping writes θ + s·d
into spare storage and points the parameter at it; restoring points it back. This is correct only if nothing else reads
the parameter's storage, which :func:`can_swap` checks.

Weights are written through ``.data``, which does not bump their version counters. They end up bit for bit as they were,
so graphs built from them earlier stay valid.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_gr._compat import storage_uses
from lightning_gr.core.sharding import is_distributed, local_parts
from lightning_gr.core.tensors import HALVES, scale_

__all__ = ["SMALLEST", "CopyStorage", "Storage", "SwapStorage", "WeightStorage", "can_swap"]

# In bytes. Below this, copying with foreach operators is faster than the individual calls that a swap takes.
SMALLEST = 2**17


class Storage(Protocol):
    """Saves weights, displaces them and restores them bit for bit. Reuses its allocations from step to step."""

    def take(self, params: Sequence[Tensor], directions: Sequence[Tensor] | None = None) -> None:
        """Save the current values of ``params``, to be moved along ``directions``. Default: along their ``.grad``."""
        ...

    def scale_direction_(self, eta: float) -> None:
        """Multiply ``.grad`` by T = |θ| + η, and keep T for the next :meth:`displace`."""
        ...

    def displace(self, distance: float | Tensor, *, again: bool = False) -> None:
        """Move the weights to θ + ``distance`` · direction, or · T ``.grad`` after :meth:`scale_direction_`.

        Args:
            distance: In units of the direction.
            again: Whether the weights, the direction and the distance are those of the last call, so that storage that
                still holds the result need not be filled again.
        """
        ...

    def stretch(self, factor: float) -> None:
        """Multiply the displacement by ``factor``."""
        ...

    def put_back(self) -> None:
        """Restore the weights. Calling it again has no effect."""
        ...


class CopyStorage:
    """Keeps exact copies of parameters (of their local shards) and moves the originals in place.

    Args:
        check_resolution: Warn at the first displacement if most 16-bit weights do not move.
    """

    def __init__(self, check_resolution: bool = False) -> None:
        self.check_resolution = check_resolution
        self._key: tuple[tuple[torch.Size, torch.dtype, torch.device], ...] = ()
        self.copies: list[Tensor] = []
        self._weights: list[Tensor] = []
        self.params: list[Tensor] = []
        self._given: list[Tensor] | None = None
        self._scales: list[Tensor] = []

    def take(self, params: Sequence[Tensor], directions: Sequence[Tensor] | None = None) -> None:
        self.params, self._given = list(params), None if directions is None else local_parts(directions)
        self._weights = [part.data for part in local_parts(params)]
        key = tuple((w.shape, w.dtype, w.device) for w in self._weights)
        if key != self._key:
            self.copies = [torch.empty_like(w) for w in self._weights]
            self._key = key
        if self._weights:
            torch._foreach_copy_(self.copies, self._weights)

    def _directions(self) -> list[Tensor]:
        if self._given is not None:
            return self._given
        return local_parts([param.grad for param in self.params if param.grad is not None])

    def scale_direction_(self, eta: float) -> None:
        if self._weights:
            self._scales = list(torch._foreach_abs(self._weights))
            if eta:
                torch._foreach_add_(self._scales, eta)
            torch._foreach_mul_(self._directions(), self._scales)

    def displace(self, distance: float | Tensor, *, again: bool = False) -> None:
        if not self._weights:
            return
        directions = self._directions()
        if isinstance(distance, Tensor):
            # the copies hold θ, so that no room is needed for distance · direction
            torch._foreach_copy_(self._weights, directions)
            scale_(self._weights, distance)
            torch._foreach_add_(self._weights, self.copies)
        elif self._scales:
            torch._foreach_addcmul_(self._weights, directions, self._scales, value=distance)
        else:
            torch._foreach_add_(self._weights, directions, alpha=distance)
        self._scales = []
        if self.check_resolution:
            self.check_resolution = False
            _warn_if_unmoved(self._weights, self.copies, directions)

    def stretch(self, factor: float) -> None:
        if self._weights:
            torch._foreach_lerp_(self._weights, self.copies, 1.0 - factor)

    def put_back(self) -> None:
        if self._weights:
            torch._foreach_copy_(self._weights, self.copies)
            _point(self.params, self._weights)

    def release(self) -> None:
        """Drop the references to the parameters, since each counts as a user of the parameter's storage."""
        self.params, self._weights, self._scales, self._given = [], [], [], None


def _point(params: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Point those of ``params`` at their memory again that a training step has pointed elsewhere, by ``.data``."""
    for param, weight in zip(params, weights, strict=True):
        if param.data_ptr() != weight.data_ptr() and not is_distributed(param):
            param.data = weight


def _warn_if_unmoved(weights: Sequence[Tensor], before: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    """Warn if most 16-bit weights with a nonzero direction have not moved. This synchronizes with the device."""
    to_move = moved = 0
    for weight, old, d in zip(weights, before, direction, strict=True):
        if weight.dtype in HALVES:
            to_move += int((d != 0).sum())
            moved += int(((weight != old) & (d != 0)).sum())
    if moved < to_move / 2:
        warnings.warn(
            f"Only {moved / to_move:.1%} of the 16-bit weights move: the perturbation is below their resolution, so the"
            " second gradient is unreliable. Train with precision='bf16-mixed', or use a larger `epsilon` or `rho`",
            stacklevel=2,
        )


def can_swap(param: Tensor, direction: Tensor | None = None) -> bool:
    """Whether ``param`` is a plain, large tensor that has its storage to itself, and ``direction`` is plain.

    CPU only: captured CUDA graphs and cuDNN's recurrent layers with flattened weights read from the original addresses.
    Views of a flat buffer, tied data, arrays that share memory and other aliases show up in the storage's use count; if
    torch does not expose that count, nothing is swapped. 16-bit weights are copied, so that :class:`CopyStorage` can
    check whether they move.
    """
    grad = param.grad if direction is None else direction
    return (
        type(param) in (nn.Parameter, Tensor)
        and type(grad) is Tensor
        and param.nbytes >= SMALLEST
        and param.device.type == "cpu"
        and param.dtype == grad.dtype
        and param.dtype in (torch.float32, torch.float64)
        and _is_alone(param)
    )


def _is_alone(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # shared memory may be read by another process
    return storage_uses(tensor) == 1 and storage.nbytes() == tensor.nbytes and not tensor.is_shared()  # type: ignore[no-untyped-call]


class SwapStorage:
    """Points parameters at spare storage that holds their displaced values."""

    def __init__(self) -> None:
        self._key: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...] = ()
        self._spare: list[Tensor] = []
        self.params: list[Tensor] = []
        self.originals: list[Tensor] = []
        self._given: list[Tensor] | None = None
        self._is_scaled = False
        # the distance, and the addresses of the weights and directions, of which the spare storage holds the sum
        self._holds: tuple[float, list[int]] | None = None

    def take(self, params: Sequence[Tensor], directions: Sequence[Tensor] | None = None) -> None:
        self.params, self.originals = list(params), [param.data for param in params]
        self._given = None if directions is None else list(directions)

    def _directions(self) -> list[Tensor]:
        return [param.grad for param in self.params] if self._given is None else self._given  # type: ignore[misc]

    def scale_direction_(self, eta: float) -> None:
        self._is_scaled = True
        for param, spare in zip(self.params, self._spares(), strict=True):
            torch.abs(param, out=spare)
            if eta:
                spare.add_(eta)
            param.grad.mul_(spare)  # type: ignore[union-attr]

    def displace(self, distance: float | Tensor, *, again: bool = False) -> None:
        step = float(distance)  # on the CPU, where reading is free
        held = step, [tensor.data_ptr() for tensor in (*self.originals, *self._directions())]
        if again and not self._is_scaled and held == self._holds:
            for param, spare in zip(self.params, self._spare, strict=True):
                param.data = spare
            return
        # Gradients that are no longer needed could serve as spare storage, but reallocating them would cost more.
        for param, original, grad, spare in zip(
            self.params, self.originals, self._directions(), self._spares(), strict=True
        ):
            if self._is_scaled:
                torch.addcmul(original, grad, spare, value=step, out=spare)
            else:
                torch.add(original, grad, alpha=step, out=spare)
            param.data = spare
        self._is_scaled, self._holds = False, held

    def stretch(self, factor: float) -> None:
        self._holds = None
        if self.params:
            torch._foreach_lerp_(self._spare, self.originals, 1.0 - factor)

    def put_back(self) -> None:
        for param, original in zip(self.params, self.originals, strict=True):
            param.data = original

    def release(self) -> None:
        """Drop the references to the parameters, since each counts as a user of the parameter's storage."""
        self.params, self.originals, self._given = [], [], None

    def _spares(self) -> list[Tensor]:
        key = tuple((p.shape, p.stride(), p.dtype) for p in self.originals)
        if key != self._key:
            self._spare, self._key = [torch.empty_like(p) for p in self.originals], key
        return self._spare


class WeightStorage:
    """Swaps each parameter that allows it and copies the rest.

    Args:
        check_resolution: See :class:`CopyStorage`.
    """

    def __init__(self, check_resolution: bool = False) -> None:
        self.copy, self.swap = CopyStorage(check_resolution), SwapStorage()
        self._both: tuple[CopyStorage | SwapStorage, ...] = (self.copy, self.swap)

    def take(
        self, params: Sequence[Tensor], directions: Sequence[Tensor] | None = None, *, may_swap: bool = True
    ) -> None:
        """Save the current values of ``params``.

        Args:
            params: The parameters.
            directions: The vector along which each one will be displaced. Default: its ``.grad``.
            may_swap: Whether to swap storage where possible; otherwise all of them are copied.
        """
        self.release()
        along: Sequence[Tensor | None] = [None] * len(params) if directions is None else directions
        swapped = [may_swap and can_swap(param, d) for param, d in zip(params, along, strict=True)]
        for storage, own in ((self.copy, False), (self.swap, True)):
            chosen = [i for i, swap in enumerate(swapped) if swap is own]
            given = None if directions is None else [directions[i] for i in chosen]
            storage.take([params[i] for i in chosen], given)

    @property
    def params(self) -> list[Tensor]:
        """The saved parameters, until they are released."""
        return [param for storage in self._both for param in storage.params]

    def scale_direction_(self, eta: float) -> None:
        for storage in self._both:
            storage.scale_direction_(eta)

    def displace(self, distance: float | Tensor, *, again: bool = False) -> None:
        for storage in self._both:
            storage.displace(distance, again=again)

    def stretch(self, factor: float) -> None:
        for storage in self._both:
            storage.stretch(factor)

    def put_back(self) -> None:
        for storage in self._both:
            storage.put_back()

    def release(self) -> None:
        for storage in self._both:
            storage.release()
