"""State that cannot be rewound: iterators, files, objects of C extensions."""

import ctypes
import io
import operator
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from lightning_gr.replay.places import Place, SlotPlace, slot_names

__all__ = ["OpaquePlace", "can_be_moved", "is_opaque"]

_C_DATA = ctypes.c_int.__mro__[-2]  # the base class of all `ctypes` types
_MOST_BYTES = 2**16
_DEEPEST = 4  # generators that yield from generators


class OpaquePlace(Place):
    """An object that is compared as far as possible but cannot be restored."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return can_be_moved(self.owner)

    def save(self) -> Any:
        return _position(self.owner)

    def differs(self, saved: Any) -> bool:
        return bool(self.save() != saved)

    def restore(self, saved: Any) -> None:
        """Do nothing, because it cannot be restored."""


def is_opaque(value: object) -> bool:
    """Whether ``value`` is an iterator, a file or an object of a C extension, whose state is not accessible."""
    return can_be_moved(value) or _is_of_c(type(value))


def can_be_moved(value: object) -> bool:
    """Whether ``value`` is an iterator or a file."""
    return isinstance(value, io.IOBase) or _is_iterator(type(value))


def _is_iterator(kind: type) -> bool:
    return hasattr(kind, "__next__")


def _is_of_c(kind: type) -> bool:
    """Whether no class statement defines this class, since that would add ``__dict__`` or ``__slots__``."""
    return issubclass(kind, _C_DATA) or not any(
        "__dict__" in vars(cls) or "__slots__" in vars(cls) for cls in kind.__mro__
    )


def _position(owner: Any, depth: int = 0) -> Any:
    """The position of an iterator or file, as far as it can be determined without advancing it."""
    kind = type(owner)
    if isinstance(owner, types.GeneratorType):
        return _line(owner, depth)
    if isinstance(owner, io.IOBase):
        return _asked(owner.tell)
    # only the representation of an itertools iterator shows its position
    text = repr(owner) if kind.__module__ == "itertools" else ""
    hint = operator.length_hint(owner, -1) if hasattr(kind, "__length_hint__") else -1
    return hint, text, _attributes(owner), _inside(owner)


def _line(owner: Any, depth: int) -> Any:
    frame = owner.gi_frame
    if frame is None or depth > _DEEPEST:
        return None
    inner = [owner.gi_yieldfrom, *frame.f_locals.values()]
    return frame.f_lasti, [_position(each, depth + 1) if _is_iterator(type(each)) else _plain(each) for each in inner]


def _plain(value: object) -> object:
    return value if isinstance(value, (int, float, str, bytes)) else id(value)


def _attributes(owner: Any) -> list[tuple[str, object]]:
    own = SlotPlace(owner, "", slot_names(type(owner))).save()
    with suppress(AttributeError):
        own |= object.__getattribute__(owner, "__dict__")
    return [(name, _plain(value)) for name, value in own.items()]


def _inside(owner: Any) -> Any:
    """The readable state of an object of a C extension. Only for the standard library is reading known to be safe."""
    kind = type(owner)
    if not _is_of_c(kind) or _is_iterator(kind):
        return None
    known = kind.__module__.partition(".")[0] in _STANDARD
    readable = (types.MemberDescriptorType, types.GetSetDescriptorType) if known else types.MemberDescriptorType
    members = {name: member for cls in kind.__mro__ for name, member in vars(cls).items()}
    asked: list[Callable[[], Any]] = [
        partial(member.__get__, owner) for member in members.values() if isinstance(member, readable)
    ]
    if known:
        asked += [getattr(owner, name) for name in ("digest", "qsize", "tell", "__len__") if name in members]
    if known or isinstance(owner, _C_DATA):
        asked.append(partial(_bytes, owner))
    found = [_asked(ask) for ask in asked]
    return [value for value in found if isinstance(value, (int, float, str, bytes))]


def _bytes(owner: Any) -> bytes:
    view = memoryview(owner)
    return view.tobytes() if view.nbytes <= _MOST_BYTES else b""


_STANDARD = sys.stdlib_module_names


def _asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:  # closed or deleted objects raise different errors, depending on their type
        return None
