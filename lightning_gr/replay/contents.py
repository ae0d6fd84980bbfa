"""Saves, compares and restores the contents of tensors, NumPy arrays and generators in place."""

import contextvars
import ctypes
import io
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_gr._compat import hook_tables, torchs_own_methods
from lightning_gr.core.hooks import OwnHook
from lightning_gr.core.sharding import is_distributed, local_parts
from lightning_gr.core.tensors import dense_parts, is_lazy
from lightning_gr.replay.places import Place

__all__ = [
    "NUMBERS_OF_C",
    "STATES",
    "ArrayPlace",
    "Content",
    "FlagsPlace",
    "Hooked",
    "HooksPlace",
    "LazyPlace",
    "SettablePlace",
    "TensorPlace",
    "is_content",
    "is_lazy",
    "is_plain",
    "is_uninitialized",
    "restore_tensors",
    "sample",
]

_MOST_BYTES = 2**16
# Tensors as small as counters and running means are cheaper to copy than to think about.
_FEW_BYTES = 2**12


def _get_stream(stream: Any) -> Any:
    return _UNSET if stream.closed else stream.__getstate__()


def _set_stream(stream: Any, state: Any) -> None:
    if not stream.closed:  # nobody can open it again
        stream.__setstate__(state)


def _set_bit_generator(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


# no pointers, of which ctypes keeps what they point to elsewhere
NUMBERS_OF_C = (
    ctypes.c_bool, ctypes.c_char, ctypes.c_wchar, ctypes.c_byte, ctypes.c_ubyte, ctypes.c_short, ctypes.c_ushort,
    ctypes.c_int, ctypes.c_uint, ctypes.c_long, ctypes.c_ulong, ctypes.c_longlong, ctypes.c_ulonglong, ctypes.c_float,
    ctypes.c_double, ctypes.c_longdouble,
)  # fmt: skip


def _set_bytes(data: Any, value: bytes) -> None:
    ctypes.memmove(ctypes.addressof(data), value, len(value))


_UNSET: Any = object()
# types whose state can be read and set, with the functions that do so
_STATES: tuple[tuple[Any, Callable[[Any], Any], Callable[[Any, Any], object]], ...] = (
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (np.random.Generator, lambda generator: generator.bit_generator.state, _set_bit_generator),
    (np.random.BitGenerator, lambda bits: bits.state, lambda bits, state: setattr(bits, "state", state)),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    ((io.BytesIO, io.StringIO), _get_stream, _set_stream),
    ((*NUMBERS_OF_C, ctypes.Array), bytes, _set_bytes),
    (contextvars.ContextVar, lambda variable: variable.get(_UNSET), lambda variable, value: variable.set(value)),
)


STATES = tuple(row[0] for row in _STATES)


class SettablePlace(Place):
    """A random number generator, an in-memory file, a number or array of ctypes, or a context variable."""

    __slots__ = ("_get", "_set")

    def __init__(self, owner: Any, path: str) -> None:
        super().__init__(owner, path)
        _, self._get, self._set = next(row for row in _STATES if isinstance(owner, row[0]))

    @property
    def is_watched(self) -> bool:
        return not isinstance(self.owner, ctypes.Array) or ctypes.sizeof(self.owner) <= _MOST_BYTES

    def save(self) -> Any:
        return self._get(self.owner)

    def differs(self, saved: Any) -> bool:
        return True  # putting it back is as cheap as looking

    def restore(self, saved: Any) -> None:
        if saved is not _UNSET:
            self._set(self.owner, saved)


class Content(NamedTuple):
    """The content and location of a tensor, which a step may also point elsewhere (``.data``, ``set_``) or resize.

    Args:
        value: A copy of the content.
        alias: Another tensor with the same memory and shape, or None for large weights, to avoid holding their memory.
    """

    value: Tensor
    alias: Tensor | None = None


class TensorPlace(Place):
    """The content of a tensor. ``save`` copies it; :meth:`mark` and :func:`digest` are for those that are only read."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        tensor = self.owner
        return not is_lazy(tensor) and tensor.layout == torch.strided and 0 < tensor.nbytes <= _FEW_BYTES

    @property
    def is_small(self) -> bool:
        """Whether it can be saved together with others."""
        return self.is_watched and is_plain(self.owner) and _is_simple(self.owner)

    @property
    def has_mark(self) -> bool:
        return True

    def mark(self) -> tuple[int, int]:
        """A value that changes if the tensor is written in place or resized, but not on writes through ``.data``."""
        tensor = self.owner
        if is_lazy(tensor):
            return -1, 0
        if tensor.is_inference() or tensor.layout != torch.strided or tensor.is_nested:
            return 0 if tensor.is_inference() else tensor._version, 0
        return tensor._version, tensor.data_ptr()

    @torch.no_grad()
    def save(self) -> Content | None:
        tensor = self.owner
        if is_lazy(tensor):
            return None
        with torchs_own_methods():
            detached = Tensor.detach(tensor)
        can_be_large = tensor.requires_grad and not self.is_watched
        return Content(detached.clone(), None if can_be_large or is_distributed(tensor) else detached)

    def differs(self, saved: Any) -> bool:
        return True  # as a rule, putting it back is as cheap as looking

    @torch.no_grad()
    def has_changed(self, saved: Content | None) -> bool:
        """Whether the content differs from the saved one."""
        with torchs_own_methods():
            return saved is not None and not torch.equal(self.owner, saved.value)

    def restore(self, saved: Content | None) -> None:
        if saved is not None:
            restore_tensors([self.owner], [saved])


class FlagsPlace(Place):
    """The ``requires_grad`` flags of several tensors."""

    __slots__ = ()

    def save(self) -> list[bool]:
        return [tensor.requires_grad for tensor in self.owner]

    def differs(self, saved: list[bool]) -> bool:
        return self.save() != saved

    def restore(self, saved: list[bool]) -> None:
        for tensor, flag in zip(self.owner, saved, strict=True):
            if tensor.is_leaf and tensor.requires_grad != flag:
                tensor.requires_grad_(flag)


class ArrayPlace(Place):
    """The content of a NumPy array."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return bool(self.owner.nbytes <= _MOST_BYTES)

    @property
    def has_mark(self) -> bool:
        return True

    def mark(self) -> Any:
        flat = np.asarray(self.owner).reshape(-1) if self.owner.flags.c_contiguous else np.asarray(self.owner)[:1]
        return self.owner.shape, flat[:: max(1, len(flat) // 8)][:8].tobytes()

    def save(self) -> Any:
        return np.asarray(self.owner).copy()

    def differs(self, saved: Any) -> bool:
        # compare bytes, so that NaN equals itself and objects compare by address
        return bool(self.owner.shape != saved.shape or np.asarray(self.owner).tobytes() != saved.tobytes())

    def restore(self, saved: Any) -> None:
        if self.owner.shape != saved.shape:
            self.owner.resize(saved.shape, refcheck=False)
        np.copyto(np.asarray(self.owner), saved, casting="no")

    def children(self) -> Iterator[tuple[str, Any]]:
        array = np.asarray(self.owner)
        for name in array.dtype.names or ():
            if array.dtype[name].hasobject:
                yield f"{self.path}[{name!r}]", array[name]
        if array.dtype == object:
            for position, value in enumerate(array.flat):
                yield f"{self.path}[{position}]", value


class Hooked:
    """Wraps a tensor to represent its hooks."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class HooksPlace(Place):
    """The hooks on a leaf tensor, which a step may register, and their closures."""

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


def is_content(tensor: Tensor) -> bool:
    """Whether this is a value of its own, and not a result that belongs to a graph."""
    return not tensor.requires_grad or tensor.is_leaf


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a dense tensor of torch itself, with memory, a version and no bits that say how to read it."""
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized or is_lazy(tensor))
        and not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg())
    )


def is_uninitialized(module: nn.Module) -> bool:
    """Whether ``module`` is a lazy module that has not run its first forward pass."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


class LazyPlace(Place):
    """A module whose tensors have no shape yet. Its first forward pass initializes it, which is not undone."""

    __slots__ = ()

    def save(self) -> bool:
        return is_uninitialized(self.owner)

    def differs(self, saved: bool) -> bool:
        return self.save() != saved

    def restore(self, saved: bool) -> None:
        """Do nothing, so that the second pass uses the initialized module."""


@torch.no_grad()
def restore_tensors(tensors: list[Tensor], saved: list[Content]) -> None:
    """Restore contents in place, for any layout, including tensors that were resized or pointed elsewhere."""
    with torchs_own_methods():
        _restore(tensors, saved)


def _restore(tensors: list[Tensor], saved: list[Content]) -> None:
    simple, values = [], []
    for tensor, (value, alias) in zip(tensors, saved, strict=True):
        if alias is not None and _is_elsewhere(tensor, alias):
            tensor.data = alias
        elif alias is None and tensor.shape != value.shape:
            if tensor.requires_grad:  # it cannot be resized, only pointed elsewhere
                tensor.data = torch.empty_like(value)
            else:
                Tensor.resize_(tensor, value.shape)
        if _is_simple(tensor):
            simple.append(tensor.data)
            values.append(value)
        else:
            with torch.inference_mode(tensor.is_inference()):
                _copy_parts(tensor, value)
    if simple:
        torch._foreach_copy_(local_parts(simple), local_parts(values))


def _is_elsewhere(tensor: Tensor, alias: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested or alias.layout != torch.strided:
        # its parts are separate tensors, which only a jagged tensor keeps
        return not (tensor.is_nested and tensor.layout == torch.jagged)
    return (
        tensor.data_ptr() != alias.data_ptr()
        or tensor.dtype != alias.dtype
        or tensor.shape != alias.shape
        or tensor.stride() != alias.stride()
    )


def _is_simple(tensor: Tensor) -> bool:
    """Whether a foreach operator can write the tensor, which excludes, for example, entries that share an address."""
    return not (
        tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_inference()
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or (0 in tensor.stride() and tensor.numel() > 1)
    )


def _copy_parts(tensor: Tensor, value: Tensor) -> None:
    for part, kept in zip(dense_parts(Tensor.detach(tensor)), dense_parts(value), strict=True):
        one = tuple(slice(0, 1) if step == 0 else slice(None) for step in part.stride())
        part[one].copy_(kept[one])


def sample(tensors: list[Tensor]) -> list[Any]:
    """A few entries of each tensor, to detect writes through ``.data``, which do not bump the version counter."""
    with torchs_own_methods():
        return [_few(Tensor.detach(tensor)) for tensor in tensors]


def _few(tensor: Tensor) -> Any:
    count = tensor.numel()
    if count == 0:
        return ()
    few = tensor.reshape(-1)[:: max(1, count // 8)][:8].clone(memory_format=torch.contiguous_format)
    bits: Tensor = few.resolve_conj().view(torch.uint8)
    return bits.numpy().tobytes()  # in which NaN is equal to itself
