"""Where weights are kept while they are displaced: copied and moved in place, or pointed at other storage.

Copying costs four passes over the parameters: two to keep the weights and two to put them back. With a swap
θ + s·d is written into spare storage at which the parameter then points, and restoring is pointing back. That is right
only for a parameter whose storage nobody else reads, which :func:`can_swap` finds out.

Weights are written through ``.data``, which leaves their version counters alone: they end bit for bit as they were, so
a graph that was made from them before stays valid.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_gr._compat import storage_uses
from lightning_gr.core.sharding import local_parts
from lightning_gr.core.tensors import HALVES

__all__ = ["SMALLEST", "CopyStorage", "Storage", "SwapStorage", "WeightStorage", "can_swap"]

# In bytes. For a smaller tensor the foreach operators, which copy, are faster than the calls that a swap takes.
SMALLEST = 2**17


class Storage(Protocol):
    """Takes weights, displaces them and puts them back, bit for bit. What it allocates is kept from step to step."""

    def take(self, params: Sequence[Tensor]) -> None:
        """Keep the values that ``params`` have now."""
        ...

    def scale_direction_(self, eta: float) -> None:
        """Multiply ``.grad`` by T = |θ| + η, and keep T for :meth:`displace`."""
        ...

    def displace(self, distance: float) -> None:
        """Put the weights at θ + ``distance`` · ``.grad``, times T if that was asked for."""
        ...

    def stretch(self, factor: float) -> None:
        """Multiply the displacement by ``factor``."""
        ...

    def put_back(self) -> None:
        """Put the weights back; calling it again changes nothing."""
        ...


class CopyStorage:
    """An exact copy of some parameters (of their local parts), which are moved in place.

    Args:
        check_resolution: Whether to look, at the first displacement and only then, if 16-bit weights move at all.
    """

    def __init__(self, check_resolution: bool = False) -> None:
        self.check_resolution = check_resolution
        self._key: tuple[tuple[torch.Size, torch.dtype, torch.device], ...] = ()
        self.copies: list[Tensor] = []
        self._weights: list[Tensor] = []
        self.params: list[Tensor] = []
        self._scales: list[Tensor] = []

    def take(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self._weights = [part.data for part in local_parts(params)]
        key = tuple((w.shape, w.dtype, w.device) for w in self._weights)
        if key != self._key:
            self.copies = [torch.empty_like(w) for w in self._weights]
            self._key = key
        if self._weights:
            torch._foreach_copy_(self.copies, self._weights)

    def _directions(self) -> list[Tensor]:
        return local_parts([param.grad for param in self.params if param.grad is not None])

    def scale_direction_(self, eta: float) -> None:
        if self._weights:
            self._scales = list(torch._foreach_abs(self._weights))
            if eta:
                torch._foreach_add_(self._scales, eta)
            torch._foreach_mul_(self._directions(), self._scales)

    def displace(self, distance: float) -> None:
        if not self._weights:
            return
        directions = self._directions()
        if self._scales:
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

    def release(self) -> None:
        """Drop the references to the parameters: who holds one of their storages counts as a user of it."""
        self.params, self._weights, self._scales = [], [], []


def _warn_if_unmoved(weights: Sequence[Tensor], before: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
    """Warn if most 16-bit weights with a direction to go are still where they were. This reads from the device."""
    to_move = moved = 0
    for weight, old, d in zip(weights, before, direction, strict=True):
        if weight.dtype in HALVES:
            to_move += int((d != 0).sum())
            moved += int(((weight != old) & (d != 0)).sum())
    if moved < to_move / 2:
        warnings.warn(
            f"Only {moved / to_move:.1%} of the 16-bit weights move: the perturbation is below their resolution, so the"
            " second gradient says little. Train with precision='bf16-mixed', or take a larger `epsilon` or `rho`",
            stacklevel=2,
        )


def can_swap(param: Tensor) -> bool:
    """Whether ``param`` is plain, large and alone in its storage.

    On the CPU only: a captured CUDA graph, and the weights that cuDNN's recurrent layers have flattened, are read where
    they were. Views of a flat buffer, tied data, arrays that share memory and other aliases show in the number of users
    of the storage; where torch does not tell that number, nothing is swapped. 16-bit weights are left to the copy, by
    which it is seen if they move at all.
    """
    grad = param.grad
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
    # another process may read shared memory
    return storage_uses(tensor) == 1 and storage.nbytes() == tensor.nbytes and not tensor.is_shared()  # type: ignore[no-untyped-call]


class SwapStorage:
    """Parameters that are pointed at spare storage, in which their displaced values are made."""

    def __init__(self) -> None:
        self._key: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...] = ()
        self._spare: list[Tensor] = []
        self.params: list[Tensor] = []
        self.originals: list[Tensor] = []
        self._is_scaled = False

    def take(self, params: Sequence[Tensor]) -> None:
        self.params, self.originals = list(params), [param.data for param in params]

    def scale_direction_(self, eta: float) -> None:
        self._is_scaled = True
        for param, spare in zip(self.params, self._spares(), strict=True):
            torch.abs(param, out=spare)
            if eta:
                spare.add_(eta)
            param.grad.mul_(spare)  # type: ignore[union-attr]

    def displace(self, distance: float) -> None:
        # not into the storage of gradients that need not be kept: allocating theirs again would cost more
        for param, original, spare in zip(self.params, self.originals, self._spares(), strict=True):
            grad: Tensor = param.grad  # type: ignore[assignment]
            if self._is_scaled:
                torch.addcmul(original, grad, spare, value=distance, out=spare)
            else:
                torch.add(original, grad, alpha=distance, out=spare)
            param.data = spare
        self._is_scaled = False

    def stretch(self, factor: float) -> None:
        if self.params:
            torch._foreach_lerp_(self._spare, self.originals, 1.0 - factor)

    def put_back(self) -> None:
        for param, original in zip(self.params, self.originals, strict=True):
            param.data = original

    def release(self) -> None:
        """Drop the references to the parameters: who holds one of their storages counts as a user of it."""
        self.params, self.originals = [], []

    def _spares(self) -> list[Tensor]:
        key = tuple((p.shape, p.stride(), p.dtype) for p in self.originals)
        if key != self._key:
            self._spare, self._key = [torch.empty_like(p) for p in self.originals], key
        return self._spare


class WeightStorage:
    """Both ways at once: a swap for each parameter that allows it, a copy for the others.

    Args:
        check_resolution: See :class:`CopyStorage`.
    """

    def __init__(self, check_resolution: bool = False) -> None:
        self.copy, self.swap = CopyStorage(check_resolution), SwapStorage()
        self._both: tuple[CopyStorage | SwapStorage, ...] = (self.copy, self.swap)

    def take(self, params: Sequence[Tensor], *, may_swap: bool = True) -> None:
        """Keep the values that ``params`` have now; ``may_swap``: whether pointing them elsewhere is allowed."""
        self.release()
        swapped = [may_swap and can_swap(param) for param in params]
        self.copy.take([param for param, swap in zip(params, swapped, strict=True) if not swap])
        self.swap.take([param for param, swap in zip(params, swapped, strict=True) if swap])

    @property
    def params(self) -> list[Tensor]:
        """The parameters that are taken, until they are released."""
        return [param for storage in self._both for param in storage.params]

    def scale_direction_(self, eta: float) -> None:
        for storage in self._both:
            storage.scale_direction_(eta)

    def displace(self, distance: float) -> None:
        for storage in self._both:
            storage.displace(distance)

    def stretch(self, factor: float) -> None:
        for storage in self._both:
            storage.stretch(factor)

    def put_back(self) -> None:
        for storage in self._both:
            storage.put_back()

    def release(self) -> None:
        for storage in self._both:
            storage.release()
