"""One look at all that a training step can reach, by types and ``__dict__``: no property of an object runs."""

import enum
import logging
import threading
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gr._compat import has_base_named, has_forward_hooks, is_writer
from lightning_gr.replay.contents import ArrayPlace, GeneratorPlace, Hooked, HooksPlace, TensorPlace
from lightning_gr.replay.machinery import WriterPlace
from lightning_gr.replay.places import (
    MOST_ENTRIES,
    AttributePlace,
    CellPlace,
    ClassPlace,
    EntryPlace,
    ModuleEntryPlace,
    OpaquePlace,
    Place,
    SequencePlace,
    SlotPlace,
    is_opaque,
)

__all__ = ["Walk", "walk"]

_MOST_OBJECTS = 200_000
_ATOMS = (
    int, float, complex, str, bytes, bool, type(None), type(...), range, slice, type, types.ModuleType, torch.dtype,
    torch.device, torch.layout, torch.Size, np.generic, np.dtype, enum.Enum, PurePath, logging.Logger, logging.Handler,
    weakref.ReferenceType, threading.Thread, types.BuiltinFunctionType, property,
)  # fmt: skip
_SIMPLE = frozenset(kind for kind in _ATOMS if isinstance(kind, type))
# whose objects lead out of the module, into the machinery that trains it
_FOREIGN = (
    "torch._", "torch.distributed", "torch.utils", "torch.cuda", "torch.autograd", "torch.jit", "torch.fx",
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_gr.", "lightning_utilities.", "concurrent.",
    "multiprocessing.", "asyncio.", "importlib", "inspect", "threading", "_thread", "logging", "typing", "abc",
)  # fmt: skip
_LIBRARIES = (*_FOREIGN, "torch.", "torchmetrics.", "builtins", "collections", "numpy", "functools", "types", "enum")
_MACHINERY = ("Trainer", "Strategy", "Accelerator", "Fabric", "DataLoader", "Logger", "ProcessGroup", "DeviceMesh",
              "TorchDispatchMode", "TorchFunctionMode")  # fmt: skip


class Walk:
    """One look at all that can be reached, breadth first.

    Args:
        hidden: Attributes of a LightningModule that belong to Lightning.
        closed: Objects that are not entered.
    """

    def __init__(self, hidden: frozenset[str], closed: Iterable[object]) -> None:
        self.hidden = hidden
        self.places: list[Place] = []
        self._seen: dict[int, object] = {id(each): each for each in closed}
        self._waiting: deque[tuple[str, Any]] = deque()

    def enter(self, roots: Iterable[tuple[str, Any]]) -> "Walk":
        """Look through ``roots``, pairs of path and object (or place); returns itself, with its finds in ``places``."""
        self._waiting.extend(roots)
        while self._waiting and len(self._seen) < _MOST_OBJECTS:
            path, value = self._waiting.popleft()
            if isinstance(value, Place):
                if id(value.owner) not in self._seen:
                    self._seen[id(value.owner)] = value.owner
                    self._add(value)
            elif type(value) not in _SIMPLE and id(value) not in self._seen and not isinstance(value, _ATOMS):
                self._seen[id(value)] = value
                self._visit(value, path)
        return self

    def _add(self, place: Place, *, enter: bool = True) -> None:
        self.places.append(place)
        if enter:
            self._waiting.extend(place.children())

    def _visit(self, value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            if not value.requires_grad or value.is_leaf:
                self._add(TensorPlace(value, path))
            if value.requires_grad and value.is_leaf:
                self._add(HooksPlace(Hooked(value), path))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self._add(ArrayPlace(value, path), enter=value.size <= MOST_ENTRIES)
        elif isinstance(value, (tuple, frozenset)):
            if len(value) <= MOST_ENTRIES:
                self._waiting.extend((f"{path}[{position}]", item) for position, item in enumerate(value))
        elif isinstance(value, dict):
            # a module has a dozen tables of hooks, which a step fills next to never
            quiet = not value and path.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
            self._add(EntryPlace(value, path, quiet=quiet), enter=len(value) <= MOST_ENTRIES)
            self._attributes(value, path)
        elif isinstance(value, (list, deque, set, bytearray, array)):
            self._add(SequencePlace(value, path), enter=len(value) <= MOST_ENTRIES)
            self._attributes(value, path)
        elif isinstance(value, GeneratorPlace.KINDS):
            self._add(GeneratorPlace(value, path))
        elif isinstance(value, nn.Module):
            self._attributes(value, path)
        elif isinstance(value, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            for name, cell in cells:
                self._waiting.append((name, cell))
            self._waiting.extend((path, default) for default in value.__defaults__ or ())
            self._attributes(value, path)
        elif isinstance(value, types.CellType):
            self._add(CellPlace(value, path))
        elif isinstance(value, types.MethodType):
            self._waiting.extend([(path, value.__self__), (path, value.__func__)])
        elif isinstance(value, partial):
            self._waiting.extend([(path, value.func), (path, value.args), (path, value.keywords)])
        elif is_writer(value):
            self._add(WriterPlace(value, path))
        elif is_opaque(value):
            self._add(OpaquePlace(value, path))
        else:
            self._object(value, path)

    def _object(self, value: Any, path: str) -> None:
        kind = type(value)
        if f"{kind.__module__}.".startswith(_FOREIGN) or has_base_named(value, *_MACHINERY):
            return
        slots = [vars(cls).get("__slots__", ()) for cls in kind.__mro__]
        every = [name for names in slots for name in ([names] if isinstance(names, str) else names)]
        names = tuple(name for name in every if not name.startswith("__"))
        if names and not kind.__module__.startswith(_LIBRARIES):
            self._add(SlotPlace(value, path, names))
        self._attributes(value, path)

    def _attributes(self, value: Any, path: str) -> None:
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            own = None
        if isinstance(value, nn.Module) and own is not None:
            for name in ("_parameters", "_buffers", "_modules"):
                if isinstance(own.get(name), dict) and id(own[name]) not in self._seen:
                    self._seen[id(own[name])] = own[name]
                    self._add(ModuleEntryPlace(own[name], path, quiet=_is_quiet(value)))
        if isinstance(own, dict) and (own or not isinstance(value, (types.FunctionType, OrderedDict))):
            is_lightning = isinstance(value, nn.Module) and has_base_named(value, "LightningModule")
            hidden = self.hidden if is_lightning else frozenset()
            self._add(AttributePlace(own, path, hidden, quiet=_is_quiet(value)))
        for cls in type(value).__mro__:
            if not f"{cls.__module__}.".startswith(_LIBRARIES) and id(cls) not in self._seen:
                self._seen[id(cls)] = cls
                self._add(ClassPlace(cls, f"{path}.{cls.__name__}"))


def _is_quiet(value: object) -> bool:
    """Whether this is a layer of torch itself without hooks, whose forward pass sets no attributes."""
    return (
        isinstance(value, nn.Module)
        and type(value).__module__.startswith("torch.nn.modules.")
        and not has_forward_hooks(value)
    )


def walk(roots: Mapping[str, Any], hidden: frozenset[str] = frozenset(), closed: Iterable[object] = ()) -> list[Place]:
    """The places that can be reached.

    Args:
        roots: Where to begin, by the names that paths begin with.
        hidden: Attributes of a LightningModule that belong to Lightning.
        closed: Objects that are not entered.
    """
    return Walk(hidden, closed).enter(roots.items()).places
