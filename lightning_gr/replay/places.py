"""Saves, compares and restores state in Python objects, with one class per kind of object."""

import operator
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "MOST_ENTRIES",
    "AttributePlace",
    "CellPlace",
    "ClassPlace",
    "EntryPlace",
    "ModuleEntryPlace",
    "Place",
    "SequencePlace",
    "SetPlace",
    "SlotPlace",
    "slot_names",
]


# Larger containers, such as a replay memory or a data set, are not searched, and only saved once seen to change.
MOST_ENTRIES = 1024


class Place:
    """A piece of state that a training step can write to.

    Args:
        owner: The object with the state, whose identity does not change.
        path: The path to it, for messages.
    """

    __slots__ = ("owner", "path")

    def __init__(self, owner: Any, path: str) -> None:
        self.owner, self.path = owner, path

    def save(self) -> Any:
        """Save what is needed to compare and restore the value."""
        raise NotImplementedError

    def differs(self, saved: Any) -> bool:
        """Whether the value differs from the saved one."""
        raise NotImplementedError

    def restore(self, saved: Any) -> None:
        """Restore the saved value."""
        raise NotImplementedError

    def children(self) -> Iterable[tuple[str, Any]]:
        """The objects reachable from here, with their paths."""
        return ()

    def values(self) -> Iterable[Any]:
        """The objects that the state refers to."""
        return ()

    @property
    def is_watched(self) -> bool:
        """Whether it is saved in each step, even if never seen to change, because it is small."""
        return True

    @property
    def table(self) -> dict[Any, Any] | None:
        """The dictionary that this is, if all of its entries and nothing else has to be saved."""
        return None

    @property
    def row(self) -> Iterable[Any] | None:
        """The sequence that this is, if all of its items and nothing else has to be saved."""
        return None

    @property
    def has_mark(self) -> bool:
        """Whether :meth:`mark` detects most changes, for state that is too large to be saved in each step."""
        return False

    def mark(self) -> Any:
        """Return a value that is cheap to compute and differs after most changes."""
        raise NotImplementedError


class EntryPlace(Place):
    """The entries of a dictionary.

    Args:
        owner: The dictionary.
        path: The path to it.
        quiet: Whether its entries are not expected to change.
    """

    __slots__ = ("quiet",)

    def __init__(self, owner: dict[Any, Any], path: str, quiet: bool = False) -> None:
        super().__init__(owner, path)
        self.quiet = quiet

    @property
    def is_watched(self) -> bool:
        return not self.quiet and dict.__len__(self.owner) <= MOST_ENTRIES

    @property
    def table(self) -> dict[Any, Any] | None:
        # the order of an OrderedDict is elsewhere
        return None if isinstance(self.owner, OrderedDict) else self.owner

    def _kind(self) -> Any:
        # bypass the methods of subclasses, which may validate, count or forbid
        return OrderedDict if isinstance(self.owner, OrderedDict) else dict

    def save(self) -> dict[Any, Any]:
        kind = self._kind()
        return kind(kind.items(self.owner))  # type: ignore[no-any-return]

    def differs(self, saved: dict[Any, Any]) -> bool:
        kind, owner = self._kind(), self.owner
        return (
            len(owner) != len(saved)
            or any(map(operator.is_not, kind.values(owner), saved.values()))
            or any(map(operator.is_not, kind.keys(owner), saved.keys()))
        )

    def restore(self, saved: dict[Any, Any]) -> None:
        kind = self._kind()
        kind.clear(self.owner)
        kind.update(self.owner, saved)

    @property
    def has_mark(self) -> bool:
        return not self.quiet

    def mark(self) -> Any:
        kind, owner = self._kind(), self.owner
        last = next(iter(reversed(kind.items(owner))), None) if kind is dict else None
        return dict.__len__(owner), None if last is None else (id(last[0]), id(last[1]))

    def values(self) -> Iterable[Any]:
        return self._kind().values(self.owner)  # type: ignore[no-any-return]

    def children(self) -> Iterator[tuple[str, Any]]:
        for key, value in self._kind().items(self.owner):
            # formatting other objects would run the user's code
            plain = isinstance(key, (str, int, float, tuple))
            yield f"{self.path}[{key!r}]" if plain else f"{self.path}[...]", value
            if not plain:
                yield f"{self.path}[...]", key


class AttributePlace(Place):
    """The attributes of an object, in its ``__dict__``.

    Args:
        owner: The ``__dict__``.
        path: The path to the object.
        hidden: The names of attributes that belong to the framework.
    """

    __slots__ = ("hidden",)

    def __init__(self, owner: dict[str, Any], path: str, hidden: frozenset[str] = frozenset()) -> None:
        super().__init__(owner, path)
        self.hidden = hidden

    @property
    def table(self) -> dict[Any, Any] | None:
        return None if self.hidden else self.owner

    def save(self) -> dict[str, Any]:
        if not self.hidden:
            return dict(self.owner)
        return {name: value for name, value in self.owner.items() if name not in self.hidden}

    def differs(self, saved: dict[str, Any]) -> bool:
        now = self.owner if not self.hidden else self.save()
        return (
            len(now) != len(saved)
            or any(map(operator.is_not, now.values(), saved.values()))
            or any(map(operator.is_not, now, saved))
        )

    def restore(self, saved: dict[str, Any]) -> None:
        hidden = {name: self.owner[name] for name in self.hidden if name in self.owner}
        self.owner.clear()
        self.owner.update(saved | hidden)

    def values(self) -> Iterable[Any]:
        return self.save().values()

    def children(self) -> Iterator[tuple[str, Any]]:
        for name, value in list(self.owner.items()):
            if name not in self.hidden:
                yield f"{self.path}.{name}", value


class ModuleEntryPlace(EntryPlace):
    """The parameters, buffers or children of a module, whose entries are named like attributes."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return True

    def children(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.owner.items():
            yield f"{self.path}.{name}", value


_EMPTY = object()


def _slot(owner: Any, name: str) -> Any:
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return _EMPTY


def slot_names(kind: type) -> tuple[str, ...]:
    """The names of the slots of a class and its bases, with private names mangled."""
    bodies = [vars(cls) for cls in kind.__mro__ if "__slots__" in vars(cls)]
    found = {name for body in bodies for name, slot in body.items() if isinstance(slot, types.MemberDescriptorType)}
    return tuple(sorted(found))


class SlotPlace(Place):
    """The attributes of an object that has ``__slots__``."""

    __slots__ = ("names",)

    def __init__(self, owner: Any, path: str, names: tuple[str, ...]) -> None:
        super().__init__(owner, path)
        self.names = names

    def save(self) -> dict[str, Any]:
        found = {name: _slot(self.owner, name) for name in self.names}
        return {name: value for name, value in found.items() if value is not _EMPTY}

    def differs(self, saved: dict[str, Any]) -> bool:
        now = self.save()
        return now.keys() != saved.keys() or any(now[name] is not saved[name] for name in now)

    def restore(self, saved: dict[str, Any]) -> None:
        for name in self.save().keys() - saved.keys():
            object.__delattr__(self.owner, name)
        for name, value in saved.items():
            object.__setattr__(self.owner, name, value)

    def values(self) -> Iterable[Any]:
        return self.save().values()

    def children(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.save().items():
            yield f"{self.path}.{name}", value


class ClassPlace(Place):
    """The plain values among the attributes of a user's class."""

    __slots__ = ()

    def save(self) -> dict[str, Any]:
        return vars(self.owner).copy()  # type: ignore[no-any-return]

    def differs(self, saved: dict[str, Any]) -> bool:
        now = vars(self.owner)
        same = len(now) == len(saved) and not any(map(operator.is_not, now.values(), saved.values()))
        if same and not any(map(operator.is_not, now, saved)):
            return False
        plain, before = _plain(now), _plain(saved)
        return plain.keys() != before.keys() or any(plain[name] is not before[name] for name in plain)

    def restore(self, saved: dict[str, Any]) -> None:
        now, before = _plain(vars(self.owner)), _plain(saved)
        for name in now.keys() - before.keys():
            delattr(self.owner, name)
        for name, value in before.items():
            if name not in now or now[name] is not value:
                setattr(self.owner, name, value)

    def values(self) -> Iterable[Any]:
        return list(vars(self.owner).values())

    def children(self) -> Iterator[tuple[str, Any]]:
        for name, value in _plain(vars(self.owner)).items():
            yield f"{self.path}.{name}", value


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are data: no methods, no descriptors and nothing of Python's own."""
    return {
        name: value
        for name, value in attributes.items()
        if not (name.startswith("__") or callable(value) or hasattr(type(value), "__get__") or name == "_abc_impl")
    }


class CellPlace(Place):
    """A variable captured by a closure."""

    __slots__ = ()

    def save(self) -> Any:
        try:
            return self.owner.cell_contents
        except ValueError:
            return _EMPTY

    def differs(self, saved: Any) -> bool:
        return self.save() is not saved

    def restore(self, saved: Any) -> None:
        if saved is _EMPTY:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = saved

    def values(self) -> Iterable[Any]:
        value = self.save()
        return () if value is _EMPTY else (value,)

    def children(self) -> Iterator[tuple[str, Any]]:
        value = self.save()
        if value is not _EMPTY:
            yield self.path, value


_SEQUENCES: tuple[Any, ...] = (list, deque, bytearray, array)


class SequencePlace(Place):
    """The items of a list, deque, bytearray or array."""

    __slots__ = ("_kind",)

    def __init__(self, owner: Any, path: str) -> None:
        super().__init__(owner, path)
        # bypass the methods of subclasses, which may validate, count or forbid
        self._kind = next(kind for kind in _SEQUENCES if isinstance(owner, kind))

    @property
    def is_watched(self) -> bool:
        return self._count() <= MOST_ENTRIES

    @property
    def row(self) -> Iterable[Any] | None:
        return self.owner if type(self.owner) in (list, deque) else None

    def _count(self) -> int:
        return self._kind.__len__(self.owner)  # type: ignore[no-any-return]

    def _is_raw(self) -> bool:
        return self._kind is bytearray or self._kind is array

    def save(self) -> list[Any]:
        return list(self._kind.__iter__(self.owner))

    def differs(self, saved: list[Any]) -> bool:
        if self._count() != len(saved):
            return True
        compare = operator.ne if self._is_raw() else operator.is_not
        return any(map(compare, self._kind.__iter__(self.owner), saved))

    def restore(self, saved: list[Any]) -> None:
        owner, kind = self.owner, self._kind
        if kind is list:
            list.__setitem__(owner, slice(None), saved)
        elif kind is deque:
            deque.clear(owner)
            deque.extend(owner, saved)
        else:
            kind.__setitem__(owner, slice(None), bytes(saved) if kind is bytearray else array(owner.typecode, saved))

    @property
    def has_mark(self) -> bool:
        return True

    def mark(self) -> Any:
        count = self._count()
        if count == 0:
            return count
        ends = [self._kind.__getitem__(self.owner, position) for position in (0, count // 2, count - 1)]
        return count, ends if self._is_raw() else [id(item) for item in ends]

    def values(self) -> Iterable[Any]:
        return () if self._is_raw() else self.save()

    def children(self) -> Iterator[tuple[str, Any]]:
        for position, value in enumerate(self.values()):
            yield f"{self.path}[{position}]", value


class SetPlace(Place):
    """The items of a set. See :mod:`~lightning_gr.replay.stand_ins` for its order.

    Args:
        owner: The set.
        path: Where it was found.
        held: The ids of sets to which something refers for good: a tuple, a bound method.
    """

    __slots__ = ("_held",)

    def __init__(self, owner: set[Any], path: str, held: Collection[int] = ()) -> None:
        super().__init__(owner, path)
        self._held = held

    @property
    def can_be_replaced(self) -> bool:
        """Whether all that refers to the set can refer to another one."""
        return type(self.owner) is set and id(self.owner) not in self._held

    @property
    def is_watched(self) -> bool:
        return set.__len__(self.owner) <= MOST_ENTRIES

    @property
    def has_mark(self) -> bool:
        return True

    def mark(self) -> int:
        return set.__len__(self.owner)

    def save(self) -> list[Any]:
        return list(set.__iter__(self.owner))

    def differs(self, saved: list[Any]) -> bool:
        return set.__len__(self.owner) != len(saved) or any(map(operator.is_not, set.__iter__(self.owner), saved))

    def restore(self, saved: list[Any]) -> None:
        # one by one, since a set that is rebuilt gives its items in another order
        for item in set(set.__iter__(self.owner)) - set(saved):
            set.discard(self.owner, item)
        set.update(self.owner, saved)
        if self.differs(saved):
            set.clear(self.owner)
            for item in saved:
                set.add(self.owner, item)

    def values(self) -> Iterable[Any]:
        return self.save()

    def children(self) -> Iterator[tuple[str, Any]]:
        for value in self.save():
            yield f"{self.path}[...]", value
