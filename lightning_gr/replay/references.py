"""Detects what is new in attributes and containers in each step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_gr.replay.contents import is_content
from lightning_gr.replay.identities import differing, identities
from lightning_gr.replay.places import Place, SetPlace
from lightning_gr.replay.walk import SIMPLE

__all__ = ["References"]


class References:
    """The objects that some places refer to, compared by identity.

    Args:
        places: The places. Only those that are saved in each step are compared.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        watched = [place for place in places if place.is_watched]
        tables = [place for place in watched if place.table is not None]
        rows = [place for place in watched if place.row is not None]
        sets = [place for place in watched if isinstance(place, SetPlace) and type(place.owner) is set]
        chosen = {id(place) for place in (*tables, *rows, *sets)}
        self._groups = [
            _Group(tables, [place.table for place in tables], dict.values, dict.__len__),
            _Group([*rows, *sets], [*(place.row for place in rows), *(place.owner for place in sets)], iter, len),
        ]
        others = [place for place in watched if id(place) not in chosen and type(place).values is not Place.values]
        self._others = [(place, _Known(place.values())) for place in others]

    def changed(self) -> list[Place]:
        """The places with a new object since the last call, from which a search may find other places."""
        found = [place for group in self._groups for place in group.changed()]
        return found + [place for place, known in self._others if known.leads_on(place.values())]


class _Group:
    """Containers of one kind, compared all at once."""

    def __init__(
        self,
        places: Sequence[Place],
        containers: Sequence[Any],
        items: Callable[[Any], Iterable[Any]],
        count: Callable[[Any], int],
    ) -> None:
        self._places, self._containers, self._items, self._count = places, containers, items, count
        self._known = [_Known(items(each)) for each in containers]
        self._with_results = {position for position, known in enumerate(self._known) if known.has_results}
        self._before = identities(containers, items, count)

    def changed(self) -> list[Place]:
        now = identities(self._containers, self._items, self._count)
        positions = self._with_results.union(differing(now, self._before))
        self._before = now
        return [self._places[position] for position in sorted(positions) if self._leads_on(position)]

    def _leads_on(self, position: int) -> bool:
        known = self._known[position]
        found = known.leads_on(self._items(self._containers[position]))
        (self._with_results.add if known.has_results else self._with_results.discard)(position)
        return found


class _Known:
    """The objects that one place referred to at the last comparison."""

    __slots__ = ("_held", "_ids", "_in_order", "has_results")

    def __init__(self, values: Iterable[Any]) -> None:
        self._note(list(values))

    def _note(self, values: list[Any]) -> None:
        # a result of a graph is not kept alive, so another object may get its identity: it always counts as new
        results = {id(value) for value in values if isinstance(value, Tensor) and not is_content(value)}
        self.has_results = bool(results)
        self._in_order = list(map(id, values))
        self._ids = set(self._in_order) - results
        # the places of tensors keep them alive
        self._held = [value for value in values if not isinstance(value, Tensor)]

    def leads_on(self, values: Iterable[Any]) -> bool:
        """Whether there is a new object other than a number or the like; also records what there is now."""
        now = list(values)
        if not self.has_results and list(map(id, now)) == self._in_order:
            return False
        new = [value for value in now if id(value) not in self._ids]
        self._note(now)
        return any(type(value) not in SIMPLE for value in new)
