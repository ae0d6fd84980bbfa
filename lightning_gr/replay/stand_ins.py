"""Sets that stand in for others during a second pass.

The order in which a set gives its items depends on all that was ever added to it and removed from it, so no way leads
back to it. A set that the first pass has changed is therefore left alone if that is possible: wherever something
refers to it, a second pass finds another one, with the items that it had at the start.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from lightning_gr.replay.places import Place, SetPlace

__all__ = ["SetsAtStart"]


class SetsAtStart:
    """What some sets held at the start of an evaluation.

    Args:
        places: The places of sets that can be replaced.
    """

    def __init__(self, places: Iterable[SetPlace]) -> None:
        self._places = list(places)
        owners: list[set[Any]] = [place.owner for place in self._places]
        self._items, self._copies = list(map(list, owners)), list(map(set.copy, owners))

    @contextmanager
    def replaced(self) -> Iterator[Sequence[tuple[set[Any], set[Any]]]]:
        """Let the places of the sets that have changed mean their stand-ins; gives pairs of both."""
        with ExitStack() as stack:
            pairs = []
            for place, items, copy in self._changed():
                pairs.append((place.owner, _in_order(items, copy)))
                stack.callback(setattr, place, "owner", place.owner)
                place.owner = pairs[-1][1]
            yield pairs

    def _changed(self) -> list[tuple[SetPlace, list[Any], set[Any]]]:
        owners = [place.owner for place in self._places]
        same = list(map(len, owners)) == list(map(len, self._items))
        if same and not any(map(operator.is_not, chain(*owners), chain(*self._items))):
            return []
        everything = zip(self._places, self._items, self._copies, strict=True)
        return [(place, items, copy) for place, items, copy in everything if place.differs(items)]

    @staticmethod
    def refer_to_stand_ins(pairs: Sequence[tuple[set[Any], set[Any]]], places: Iterable[Place]) -> None:
        """Let whatever refers to a set refer to its stand-in. Who saved the places before puts them back."""
        if not pairs:
            return
        by_id = {id(original): stand_in for original, stand_in in pairs}
        for place in places:
            if any(id(value) in by_id for value in place.values()):
                place.restore(_exchanged(place.save(), by_id))


def _in_order(items: list[Any], copy: set[Any]) -> set[Any]:
    if list(copy) == items:
        return copy
    added: set[Any] = set()
    for item in items:
        added.add(item)
    return added


def _exchanged(saved: Any, by_id: dict[int, set[Any]]) -> Any:
    if isinstance(saved, dict):
        return type(saved)((key, by_id.get(id(value), value)) for key, value in saved.items())
    if isinstance(saved, list):
        return [by_id.get(id(value), value) for value in saved]
    return by_id.get(id(saved), saved)
