"""Searches everything that a training step can reach, by types and ``__dict__``, without running any properties."""

import ctypes
import enum
import gc
import logging
import threading
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from multiprocessing.sharedctypes import SynchronizedBase
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gr._compat import has_base_named, is_writer
from lightning_gr.core.tensors import is_lazy
from lightning_gr.replay.contents import (
    NUMBERS_OF_C,
    STATES,
    ArrayPlace,
    Hooked,
    HooksPlace,
    LazyPlace,
    SettablePlace,
    TensorPlace,
    is_content,
    is_uninitialized,
)
from lightning_gr.replay.machinery import WriterPlace
from lightning_gr.replay.opaque import OpaquePlace, can_be_moved, is_opaque
from lightning_gr.replay.places import (
    MOST_ENTRIES,
    AttributePlace,
    CellPlace,
    ClassPlace,
    EntryPlace,
    ModuleEntryPlace,
    Place,
    SequencePlace,
    SetPlace,
    SlotPlace,
    slot_names,
)

__all__ = ["SIMPLE", "Walk", "walk"]

_MOST_OBJECTS = 200_000
_ATOMS = (
    int, float, complex, str, bytes, bool, type(None), type(...), range, slice, types.ModuleType, torch.dtype,
    torch.device, torch.layout, torch.Size, np.generic, np.dtype, enum.Enum, enum.EnumMeta, PurePath, logging.Logger,
    logging.Handler, weakref.ReferenceType, threading.Thread, property,
)  # fmt: skip
SIMPLE = frozenset(_ATOMS)
# modules whose objects lead out of the user's module into the training machinery
_FOREIGN = (
    "torch._", "torch.distributed", "torch.utils", "torch.cuda", "torch.autograd", "torch.jit", "torch.fx",
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_gr.", "lightning_utilities.", "concurrent.",
    "multiprocessing.", "asyncio.", "importlib", "inspect", "threading", "_thread", "logging", "typing", "abc",
)  # fmt: skip
_LIBRARIES = (*_FOREIGN, "torch.", "torchmetrics.", "builtins", "collections", "numpy", "functools", "types", "enum")
_MACHINERY = ("Trainer", "Strategy", "Accelerator", "Fabric", "DataLoader", "Logger", "ProcessGroup", "DeviceMesh",
              "TorchDispatchMode", "TorchFunctionMode")  # fmt: skip
_VIEWS: tuple[Any, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()), memoryview)
_CACHE = type(lru_cache(abs))


class Walk:
    """A breadth-first search of everything reachable.

    Args:
        hidden: Attributes of a LightningModule that belong to Lightning.
        closed: Objects that are not entered.
        seen: More of them, by their identities.
        managed: Attributes of other modules that belong to a strategy, by the identity of the module; ``"*"`` is all of
            them except the layers within.
    """

    def __init__(
        self,
        hidden: frozenset[str],
        closed: Iterable[object],
        seen: Mapping[int, object] | None = None,
        managed: Mapping[int, frozenset[str]] | None = None,
    ) -> None:
        self.hidden, self.managed = hidden, managed or {}
        self.places: list[Place] = []
        self._seen: dict[int, object] = dict(seen or ())
        self._seen.update((id(each), each) for each in closed)
        self._waiting: deque[tuple[str, Any]] = deque()
        self._held: set[int] = set()
        self._visits: dict[type, Callable[[Walk, Any, str], None]] = {}

    def enter(self, roots: Iterable[tuple[str, Any]]) -> "Walk":
        """Search from ``roots``, pairs of a path and an object (or place); return self, with ``places`` filled."""
        self._waiting.extend(roots)
        while self._waiting and len(self._seen) < _MOST_OBJECTS:
            path, value = self._waiting.popleft()
            if isinstance(value, Place):
                if id(value.owner) not in self._seen:
                    self._seen[id(value.owner)] = value.owner
                    self._add(value)
            elif type(value) not in SIMPLE and id(value) not in self._seen and not isinstance(value, _ATOMS):
                self._seen[id(value)] = value
                self._visit(value, path)
        return self

    def _visit(self, value: Any, path: str) -> None:
        visit = self._visits.get(type(value))
        if visit is None:
            rows = (visit for kinds, visit in _KINDS if isinstance(value, kinds))
            visit = self._visits[type(value)] = next(rows, Walk._other)
        visit(self, value, path)

    @property
    def seen(self) -> dict[int, object]:
        """What has been looked through, by identity, except for results of a graph, which are to be freed in time."""
        return {key: each for key, each in self._seen.items() if not isinstance(each, Tensor) or is_content(each)}

    def _add(self, place: Place, *, enter: bool = True) -> None:
        self.places.append(place)
        if enter:
            self._waiting.extend(place.children())

    def _hold(self, found: Iterable[tuple[str, Any]]) -> None:
        """Wait for what is referred to by something that cannot refer to anything else instead."""
        for path, value in found:
            if type(value) is set:
                self._held.add(id(value))
            self._waiting.append((path, value))

    # --- by kind

    def _tensor(self, value: Tensor, path: str) -> None:
        if is_lazy(value):  # there is nothing in it yet
            return
        if is_content(value):
            self._add(TensorPlace(value, path))
            self._attributes(value, path)
        if value.requires_grad and value.is_leaf:
            self._add(HooksPlace(Hooked(value), path))

    def _array(self, value: Any, path: str) -> None:
        if value.flags.writeable:
            self._add(ArrayPlace(value, path), enter=value.size <= MOST_ENTRIES)
            self._attributes(value, path)

    def _constant(self, value: Collection[Any], path: str) -> None:
        if len(value) <= MOST_ENTRIES:
            self._hold((f"{path}[{position}]", item) for position, item in enumerate(value))

    def _dictionary(self, value: dict[Any, Any], path: str) -> None:
        # a module has a dozen tables of hooks, which a step fills next to never
        quiet = not value and path.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        self._add(EntryPlace(value, path, quiet=quiet), enter=dict.__len__(value) <= MOST_ENTRIES)
        self._attributes(value, path)

    def _sequence(self, value: Any, path: str) -> None:
        place = SequencePlace(value, path)
        self._add(place, enter=place.is_watched)
        self._attributes(value, path)

    def _set(self, value: set[Any], path: str) -> None:
        place = SetPlace(value, path, self._held)
        self._add(place, enter=place.is_watched)
        self._attributes(value, path)

    def _module(self, value: nn.Module, path: str) -> None:
        if is_uninitialized(value):
            self._add(LazyPlace(value, path))
        else:
            self._attributes(value, path)

    def _function(self, value: types.FunctionType, path: str) -> None:
        self._closure(value)
        self._hold((path, default) for default in value.__defaults__ or ())
        self._waiting.append((path, value.__kwdefaults__))
        self._attributes(value, path)

    def _closure(self, function: types.FunctionType) -> None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._waiting.extend((name, cell) for name, cell in cells if name != "__class__")

    def _cell(self, value: types.CellType, path: str) -> None:
        self._add(CellPlace(value, path))

    def _method(self, value: Any, path: str) -> None:
        self._hold([(path, value.__self__), (path, getattr(value, "__func__", None))])

    def _partial(self, value: partial[Any], path: str) -> None:
        self._hold([(path, value.func), (path, value.args), (path, value.keywords)])

    def _view(self, value: Any, path: str) -> None:
        """Search the object behind a view of a dictionary or of bytes, unless it is the body of a class."""
        seen = gc.get_referents(value) if not isinstance(value, memoryview) else [value.obj]
        self._hold((path, each) for each in seen if not (isinstance(each, dict) and "__module__" in each))

    def _cache(self, value: Any, path: str) -> None:
        """Search the results of ``functools.lru_cache``, which are in a plain dictionary if the cache is unbounded.

        A bounded one refers to its arguments and results itself, and to a dictionary that must not be written to.
        """
        own, found = vars(value), gc.get_referents(value)
        if value.cache_parameters()["maxsize"] is None:
            self._waiting.extend((path, each) for each in found if type(each) is dict and each is not own)
        elif value.cache_info().currsize:
            self._hold((path, each) for each in found if type(each) is not object and not _has_links(each))
        self._waiting.extend(own.items())

    def _class(self, value: type, path: str) -> None:
        """Search the bodies of a class and its bases, except for those of known libraries."""
        for cls in value.__mro__:
            if not f"{cls.__module__}.".startswith(_LIBRARIES) and (cls is value or id(cls) not in self._seen):
                self._seen[id(cls)] = cls
                self._add(ClassPlace(cls, path if cls is value else f"{path}.{cls.__name__}"))
                for each in _callables(cls):
                    if isinstance(each, types.FunctionType):
                        self._closure(each)
                    else:
                        self._waiting.append((path, each))

    def _local(self, value: threading.local, path: str) -> None:
        self._waiting.append((path, value.__dict__))

    def _shared(self, value: Any, path: str) -> None:
        """``multiprocessing.Value``, which keeps its memory from the processes behind a lock."""
        self._waiting.append((path, value.get_obj()))

    def _array_of_c(self, value: "ctypes.Array[Any]", path: str) -> None:
        plain = issubclass(value._type_, NUMBERS_OF_C)
        self._add(SettablePlace(value, path) if plain else OpaquePlace(value, path))

    def _state(self, value: Any, path: str) -> None:
        self._add(SettablePlace(value, path))

    def _other(self, value: Any, path: str) -> None:
        if is_writer(value):
            self._add(WriterPlace(value, path))
            return
        kind = type(value)
        foreign = f"{kind.__module__}.".startswith(_FOREIGN) or has_base_named(value, *_MACHINERY)
        if can_be_moved(value) or (is_opaque(value) and not foreign):
            self._add(OpaquePlace(value, path))
        if foreign or is_opaque(value):
            return
        names = slot_names(kind)
        if names and not kind.__module__.startswith(_LIBRARIES):
            self._add(SlotPlace(value, path, names))
        self._attributes(value, path)

    def _attributes(self, value: Any, path: str) -> None:
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            own = None
        managed = self.managed.get(id(value), frozenset())
        if isinstance(value, nn.Module) and own is not None:
            for name in ("_parameters", "_buffers", "_modules"):
                skipped = name in managed or ("*" in managed and name != "_modules")
                if not skipped and isinstance(own.get(name), dict) and id(own[name]) not in self._seen:
                    self._seen[id(own[name])] = own[name]
                    self._add(ModuleEntryPlace(own[name], path))
        if "*" not in managed and isinstance(own, dict) and (own or not isinstance(value, _SELDOM_WITH_ATTRIBUTES)):
            is_lightning = isinstance(value, nn.Module) and has_base_named(value, "LightningModule")
            self._add(AttributePlace(own, path, managed | (self.hidden if is_lightning else frozenset())))
        if id(type(value)) not in self._seen:
            self._class(type(value), f"{path}.{type(value).__name__}")


_SELDOM_WITH_ATTRIBUTES = (types.FunctionType, OrderedDict, Tensor, np.ndarray)
# the first matching row applies
_KINDS: tuple[tuple[Any, Callable[[Walk, Any, str], None]], ...] = (
    (Tensor, Walk._tensor),
    (np.ndarray, Walk._array),
    ((tuple, frozenset), Walk._constant),
    (dict, Walk._dictionary),
    ((list, deque, bytearray, array), Walk._sequence),
    (set, Walk._set),
    (ctypes.Array, Walk._array_of_c),
    (STATES, Walk._state),
    (nn.Module, Walk._module),
    (types.FunctionType, Walk._function),
    (types.CellType, Walk._cell),
    ((types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType), Walk._method),
    (partial, Walk._partial),
    (_VIEWS, Walk._view),
    (_CACHE, Walk._cache),
    (type, Walk._class),
    (threading.local, Walk._local),
    (SynchronizedBase, Walk._shared),
)


def _has_links(value: object) -> bool:
    """Whether this is the dictionary of a bounded cache, whose entries are linked to each other."""
    return type(value) is dict and any(type(each).__name__ == "_lru_list_elem" for each in value.values())


_WRAPPERS = {property: ("fget", "fset", "fdel"), staticmethod: ("__func__",), classmethod: ("__func__",),
             cached_property: ("func",)}  # fmt: skip


def _callables(cls: type) -> Iterator[Any]:
    """The functions and caches in the body of a class, including those in properties and class methods."""
    for value in list(vars(cls).values()):
        for each in (value, *(getattr(value, name) for name in _WRAPPERS.get(type(value), ()))):
            if isinstance(each, (types.FunctionType, _CACHE)):
                yield each


def walk(roots: Mapping[str, Any], hidden: frozenset[str] = frozenset(), closed: Iterable[object] = ()) -> list[Place]:
    """Find the reachable places.

    Args:
        roots: The objects to start from, keyed by the first parts of their paths.
        hidden: Attributes of a LightningModule that belong to Lightning.
        closed: Objects that are not searched.
    """
    return Walk(hidden, closed).enter(roots.items()).places
