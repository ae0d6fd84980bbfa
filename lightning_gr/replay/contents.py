"""What a training step can write to in tensors, NumPy arrays and generators: saved, compared and put back in place."""

import operator
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gr._compat import hook_tables
from lightning_gr.core.hooks import OwnHook
from lightning_gr.core.sharding import local_parts
from lightning_gr.replay.places import Place

__all__ = [
    "ArrayPlace",
    "GeneratorPlace",
    "Hooked",
    "HooksPlace",
    "TensorPlace",
    "is_lazy",
    "restore_tensors",
    "sample",
]

_MOST_BYTES = 2**16
# Tensors as small as counters and running means are cheaper to copy than to think about.
_FEW_BYTES = 2**12


class GeneratorPlace(Place):
    """A generator of random numbers: torch's, NumPy's two kinds or Python's."""

    __slots__ = ()

    KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)

    def save(self) -> Any:
        owner = self.owner
        if isinstance(owner, torch.Generator):
            return owner.get_state()
        if isinstance(owner, np.random.Generator):
            return owner.bit_generator.state
        if isinstance(owner, np.random.BitGenerator):
            return owner.state
        return owner.get_state() if isinstance(owner, np.random.RandomState) else owner.getstate()

    def differs(self, saved: Any) -> bool:
        return True  # putting it back is as cheap as looking

    def restore(self, saved: Any) -> None:
        owner = self.owner
        if isinstance(owner, torch.Generator):
            owner.set_state(saved)
        elif isinstance(owner, np.random.Generator):
            owner.bit_generator.state = saved
        elif isinstance(owner, np.random.BitGenerator):
            owner.state = saved
        elif isinstance(owner, np.random.RandomState):
            owner.set_state(saved)
        else:
            owner.setstate(saved)


class TensorPlace(Place):
    """The content of a tensor. ``save`` copies it; :meth:`mark` and :func:`digest` are for those that are only read."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        tensor = self.owner
        return not is_lazy(tensor) and tensor.layout == torch.strided and 0 < tensor.nbytes <= _FEW_BYTES

    def mark(self) -> tuple[int, int]:
        """Something that changes when the tensor is written to in place or resized, but not through ``.data``."""
        tensor = self.owner
        if tensor.is_inference() or tensor.layout != torch.strided or tensor.is_nested:
            return 0 if tensor.is_inference() else tensor._version, 0
        return tensor._version, 0 if is_lazy(tensor) else tensor.data_ptr()

    @torch.no_grad()
    def save(self) -> Tensor | None:
        return None if is_lazy(self.owner) else self.owner.detach().clone()

    def differs(self, saved: Any) -> bool:
        return True  # as a rule, putting it back is as cheap as looking

    @torch.no_grad()
    def has_changed(self, saved: Tensor | None) -> bool:
        """Whether the value is another one now."""
        return saved is not None and not torch.equal(self.owner, saved)

    def restore(self, saved: Tensor | None) -> None:
        if saved is not None:
            restore_tensors([self.owner], [saved])


class ArrayPlace(Place):
    """The content of a NumPy array."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return bool(self.owner.nbytes <= _MOST_BYTES)

    def save(self) -> Any:
        return self.owner.copy()

    def differs(self, saved: Any) -> bool:
        if self.owner.dtype.hasobject:
            return any(map(operator.is_not, self.owner.flat, saved.flat))
        # by bytes, in which NaN is equal to itself
        return bool(self.owner.shape != saved.shape or self.owner.tobytes() != saved.tobytes())

    def restore(self, saved: Any) -> None:
        if self.owner.shape != saved.shape:
            self.owner.resize(saved.shape, refcheck=False)
        np.copyto(self.owner, saved, casting="no")

    def children(self) -> Iterator[tuple[str, Any]]:
        if self.owner.dtype.hasobject:
            for position, value in enumerate(self.owner.flat):
                yield f"{self.path}[{position}]", value


class Hooked:
    """A tensor as the owner of its hooks."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class HooksPlace(Place):
    """The hooks on a leaf, which a step may register and whose closures it can reach."""

    __slots__ = ()

    def _tables(self) -> list[dict[int, Any]]:
        return hook_tables(self.owner.tensor)

    @property
    def is_watched(self) -> bool:
        return any(self._tables())

    def save(self) -> list[dict[int, Any]]:
        return [{n: hook for n, hook in table.items() if not isinstance(hook, OwnHook)} for table in self._tables()]

    def differs(self, saved: list[dict[int, Any]]) -> bool:
        pairs = zip(self.save(), saved, strict=True)
        return any(
            now.keys() != before.keys() or any(now[number] is not before[number] for number in now)
            for now, before in pairs
        )

    def restore(self, saved: list[dict[int, Any]]) -> None:
        for table, before in zip(self._tables(), saved, strict=True):
            own = {number: hook for number, hook in table.items() if isinstance(hook, OwnHook)}
            table.clear()
            table.update(before | own)

    def values(self) -> list[Any]:
        return [hook for table in self.save() for hook in table.values()]

    def children(self) -> list[tuple[str, Any]]:
        return [(f"{self.path}.hook", hook) for hook in self.values()]


def is_lazy(tensor: Tensor) -> bool:
    """Whether the tensor has no storage yet: of a lazy module, or on the meta device."""
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) or tensor.device.type == "meta"


@torch.no_grad()
def restore_tensors(tensors: list[Tensor], saved: list[Tensor]) -> None:
    """Put contents back in place, whatever the layout and also after a change of shape."""
    simple, values = [], []
    for tensor, value in zip(tensors, saved, strict=True):
        if tensor.is_inference():
            with torch.inference_mode():
                tensor.copy_(value)
        elif tensor.layout != torch.strided or tensor.is_nested:
            tensor.data = value.clone()
        elif tensor.shape != value.shape:
            # by observers of quantization, for one, which resize their buffers
            tensor.resize_(value.shape).copy_(value)
        else:
            simple.append(tensor.data)
            values.append(value)
    if simple:
        torch._foreach_copy_(local_parts(simple), local_parts(values))


def sample(tensors: list[Tensor]) -> list[Any]:
    """A few entries of each tensor: they tell of a write through ``.data``, which no version counter does."""
    return [_few(tensor) for tensor in tensors]


def _few(tensor: Tensor) -> Any:
    flat = tensor.detach()
    count = flat.numel()
    if count == 0:
        return ()
    flat = flat.reshape(-1) if flat.is_contiguous() else flat.flatten()[:8]
    return flat[:: max(1, count // 8)][:8].tolist()
