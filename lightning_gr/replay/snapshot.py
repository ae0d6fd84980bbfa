"""Saves, compares and restores the values of places: of any, or of the same ones in each step."""

import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gr.core.sharding import local_parts
from lightning_gr.replay.contents import Content, TensorPlace, is_lazy, is_plain, restore_tensors
from lightning_gr.replay.identities import Identities, differing, identities
from lightning_gr.replay.places import Place, SetPlace

__all__ = ["Keeper", "Kept", "Snapshot", "Storages", "storage_of", "storages_of"]


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage, or 0 if it has none."""
    if tensor.layout != torch.strided or tensor.is_nested or is_lazy(tensor):
        return 0
    return local_parts([tensor])[0].untyped_storage().data_ptr()


def storages_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    """The addresses of the storages of ``tensors`` now."""
    return frozenset(map(storage_of, tensors)) - {0}


class Snapshot:
    """The values of some places at one moment."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.saved = [(place, place.save()) for place in places]

    def changed(self, kind: type[Place] = Place) -> list[Place]:
        """The places of one kind that have another value now."""
        return [place for place, saved in self.saved if isinstance(place, kind) and place.differs(saved)]

    def without(self, chosen: set[int]) -> "Snapshot":
        """Take the places with these ids out; returns them with their values."""
        taken = Snapshot(())
        taken.saved = [pair for pair in self.saved if id(pair[0]) in chosen]
        self.saved = [pair for pair in self.saved if id(pair[0]) not in chosen]
        return taken

    def restore(self, moved: frozenset[int] = frozenset(), now: object = None) -> None:
        """Restore the values, except for tensors in the storages ``moved``."""
        tensors: list[Tensor] = []
        values: list[Content] = []
        for place, saved in self.saved:
            if isinstance(place, TensorPlace):
                if saved is not None and not (moved and storage_of(place.owner) in moved):
                    tensors.append(place.owner)
                    values.append(saved)
            elif place.differs(saved):
                place.restore(saved)
        if tensors:
            restore_tensors(tensors, values)


class Keeper:
    """Saves the same places in each step: dictionaries and small tensors all at once, the others one by one.

    Args:
        places: The places.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._containers = _Containers(places)
        small = [place for place in places if isinstance(place, TensorPlace) and place.is_small]
        by_kind: dict[Any, list[TensorPlace]] = {}
        for place in small:
            # on the host they are copied one after the other, whatever they are
            device = place.owner.device
            kind = device if device.type == "cpu" else (device, place.owner.dtype)
            by_kind.setdefault(kind, []).append(place)
        self._small = [_SmallTensors(group) for group in by_kind.values()]
        done = {id(place) for place in (*self._containers.places, *small)}
        self._others = [place for place in places if id(place) not in done]

    def save(self, before: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """Save the values now. Copies of ``before`` are shared where nothing has changed since."""
        return (
            self._containers.save(None if before is None else before[0]),
            [group.save() for group in self._small],
            Snapshot(self._others),
        )

    def restore(self, saved: tuple[Any, ...], moved: frozenset[int], now: tuple[Any, ...] | None = None) -> None:
        """Restore them, except for tensors in the storages ``moved``; see :meth:`Kept.restore`."""
        containers, small, others = saved
        self._containers.restore(containers, None if now is None else now[0])
        others.restore(moved)
        for group, copies in zip(self._small, small, strict=True):
            group.restore(copies, moved)

    def tensors(self, saved: tuple[Any, ...]) -> Iterator[tuple[Place, Any]]:
        """The tensors among the places with their saved contents."""
        _, small, others = saved
        for group, copies in zip(self._small, small, strict=True):
            yield from zip(group.places, map(Content, copies.values, copies.aliases), strict=True)
        yield from (pair for pair in others.saved if isinstance(pair[0], TensorPlace))


class Kept:
    """The values at one moment of the places that are saved in each step.

    Args:
        keepers: Save the values.
        before: What they saved earlier, whose copies may be shared.
    """

    def __init__(self, keepers: Iterable[Keeper], before: Iterable["Kept | Snapshot"] = ()) -> None:
        known = _by_keeper(before)
        self._saved = [(keeper, keeper.save(known.get(id(keeper)))) for keeper in keepers]

    @property
    def saved(self) -> Iterator[tuple[Place, Any]]:
        """The tensors among the places with their saved contents, which are valid as long as this object exists."""
        return chain.from_iterable(keeper.tensors(saved) for keeper, saved in self._saved)

    def changed(self, kind: type[Place]) -> list[Place]:
        """The places of one kind, among those saved one by one, that have another value now."""
        return [place for _, (*_, others) in self._saved for place in others.changed(kind)]

    def restore(self, moved: frozenset[int] = frozenset(), now: Iterable["Kept | Snapshot"] = ()) -> None:
        """Restore the values, except for tensors in the storages ``moved``.

        Args:
            moved: The addresses of storages.
            now: The current values, as far as they are known, which saves reading them again.
        """
        known = _by_keeper(now)
        for keeper, saved in self._saved:
            keeper.restore(saved, moved, known.get(id(keeper)))


def _by_keeper(kept: Iterable[Kept | Snapshot]) -> dict[int, tuple[Any, ...]]:
    return {id(keeper): saved for each in kept if isinstance(each, Kept) for keeper, saved in each._saved}


class _Saved(NamedTuple):
    """What containers held."""

    tables: list[dict[Any, Any]]
    values: Identities
    keys: Identities
    rows: list[list[Any]]


class _Containers:
    """Dictionaries, sequences and sets, which are saved, and compared by identity, all at once in C."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._tables = [place for place in places if place.table is not None]
        self._dicts: list[dict[Any, Any]] = [place.table for place in self._tables if place.table is not None]
        self._lists = [place for place in places if place.row is not None]
        # the owner of a place is looked up each time, since a set may have a stand-in
        self._sets = [place for place in places if isinstance(place, SetPlace) and type(place.owner) is set]
        self._rows = [*self._lists, *self._sets]

    @property
    def places(self) -> list[Place]:
        return [*self._tables, *self._rows]

    def save(self, before: _Saved | None) -> _Saved:
        # creating a dictionary for each module would trigger a garbage collection
        tables = list(map(dict.copy, self._dicts)) if before is None else before.tables.copy()
        values, keys = self._identities()
        if before is not None:
            for position in {*differing(values, before.values), *differing(keys, before.keys)}:
                tables[position] = dict.copy(self._dicts[position])
        return _Saved(tables, values, keys, list(map(list, map(_OWNER, self._rows))))

    def _identities(self) -> tuple[Identities, Identities]:
        return identities(self._dicts), identities(self._dicts, dict.__iter__)

    def restore(self, saved: _Saved, now: _Saved | None) -> None:
        values, keys = (now.values, now.keys) if now else self._identities()
        for position in {*differing(values, saved.values), *differing(keys, saved.keys)}:
            self._tables[position].restore(saved.tables[position])
        owners = list(map(_OWNER, self._rows))
        same = list(map(len, owners)) == list(map(len, saved.rows))
        if not same or any(map(operator.is_not, chain(*owners), chain(*saved.rows))):
            _restore(self._rows, saved.rows)


_OWNER = operator.attrgetter("owner")


def _restore(places: Sequence[Place], saved: Sequence[Any]) -> None:
    for place, value in zip(places, saved, strict=True):
        if place.differs(value):
            place.restore(value)


class _SmallTensors:
    """Plain tensors on one device, as small as running means, which are copied by one operator.

    The memory of copies is reused once nothing refers to them, since allocating takes longer than copying.
    """

    def __init__(self, places: Sequence[TensorPlace]) -> None:
        self.places = places
        self._tensors: list[Tensor] = [place.owner for place in places]
        self._forms: list[Any] = []
        self._aliases: list[Tensor] = []
        self._memory: list[tuple[weakref.ref[_Copies], list[Tensor]]] = []
        self._known: tuple[list[Any], frozenset[int]] = ([], frozenset())
        self._are_elsewhere: list[bool] = []

    def _look(self) -> list[Any]:
        return [*map(Tensor.data_ptr, self._tensors), *map(_FORM, self._tensors), *map(Tensor.stride, self._tensors)]

    def save(self) -> "_Copies":
        forms = self._look()
        if forms != self._forms:
            self._forms, self._memory = forms, []
            # by `.data`, which leaves version counters as they are and belongs to no graph
            self._aliases = [tensor.data for tensor in self._tensors]
        copies = _Copies(forms, self._free() or _empty_like(self._tensors), self._aliases)
        self._memory.append((weakref.ref(copies), copies.values))
        torch._foreach_copy_(copies.values, self._aliases)
        return copies

    def _free(self) -> list[Tensor] | None:
        for position, (copies, values) in enumerate(self._memory):
            if copies() is None:
                del self._memory[position]
                return values
        return None

    def restore(self, saved: "_Copies", moved: frozenset[int]) -> None:
        tensors, values, aliases = self._tensors, saved.values, saved.aliases
        forms = self._look()
        if moved and not all(where := self._which_lie_elsewhere(forms, moved)):
            tensors, values, aliases = (list(compress(each, where)) for each in (tensors, values, aliases))
        if forms != saved.forms:
            restore_tensors(tensors, list(map(Content, values, aliases)))
        elif tensors:
            torch._foreach_copy_(aliases, values)

    def _which_lie_elsewhere(self, forms: list[Any], moved: frozenset[int]) -> list[bool]:
        if (forms, moved) != self._known:
            self._known = forms, moved
            self._are_elsewhere = [storage_of(tensor) not in moved for tensor in self._tensors]
        return self._are_elsewhere


@dataclass(eq=False)
class _Copies:
    """Forms and contents of small tensors, and other tensors that share their memory."""

    forms: list[Any]
    values: list[Tensor]
    aliases: list[Tensor]


_FORM = operator.attrgetter("shape", "dtype")


def _empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.inference_mode(False):
        return [torch.empty_like(tensor) for tensor in tensors]


class Storages:
    """Caches the storages of the same tensors in each step, until one of them has another address."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # themselves, so that nothing else gets their identity
        self._ids: list[int] = []
        self._addresses: list[int] = []
        self._found: frozenset[int] = frozenset()

    def of(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        """The addresses of the storages of ``tensors`` now."""
        ids = list(map(id, tensors))
        if ids == self._ids and list(map(Tensor.data_ptr, self._tensors)) == self._addresses:
            return self._found
        found = storages_of(tensors)
        if all(map(is_plain, tensors)):
            self._tensors, self._ids, self._found = list(tensors), ids, found
            self._addresses = list(map(Tensor.data_ptr, tensors))
        return found
