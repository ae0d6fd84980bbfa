"""What attributes and containers refer to, to see in each step what has been put there since."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_gr.replay.contents import is_content
from lightning_gr.replay.places import Place
from lightning_gr.replay.walk import SIMPLE

__all__ = ["References"]


class References:
    """What some places refer to, compared by identity: of dictionaries, one after the other in C.

    Args:
        places: The places. Those that are saved in each step are looked at.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        watched = [place for place in places if place.is_watched]
        tables = [place for place in watched if place.table is not None]
        rows = [place for place in watched if place.row is not None]
        self._others = [place for place in watched if place.table is None and place.row is None]
        self._places = [*tables, *rows, *self._others]
        self._tables: list[dict[Any, Any]] = [place.table for place in tables if place.table is not None]
        self._rows: list[Any] = [place.row for place in rows]
        self._note(*self._look())

    def _look(self) -> tuple[list[int], list[Any]]:
        """How many there are in each place, and all of them."""
        others = [list(place.values()) for place in self._others]
        counts = [*map(dict.__len__, self._tables), *map(len, self._rows), *map(len, others)]
        tables = chain.from_iterable(map(dict.values, self._tables))
        return counts, list(chain(tables, *self._rows, *others))

    def _note(self, counts: list[int], values: list[Any]) -> None:
        # a result of a graph is not held, so that another tensor may have its identity later: it always counts as new
        self._ids = [id(v) if not isinstance(v, Tensor) or is_content(v) else 0 for v in values]
        self._counts = counts
        # tensors are held by their places, as long as those are known
        self._held = [value for value in values if not isinstance(value, Tensor)]

    def changed(self) -> list[Place]:
        """The places in which there has been something new since the last time, which may lead to other places."""
        counts, values = self._look()
        ids = list(map(id, values))
        if ids == self._ids and counts == self._counts:
            return []
        found, at, before_at = [], 0, 0
        for place, count, before_count in zip(self._places, counts, self._counts, strict=True):
            now, before = ids[at : at + count], self._ids[before_at : before_at + before_count]
            if now != before:
                known = set(before)
                new = [value for value in values[at : at + count] if id(value) not in known]
                if any(type(value) not in SIMPLE for value in new):
                    found.append(place)
            at, before_at = at + count, before_at + before_count
        self._note(counts, values)
        return found
