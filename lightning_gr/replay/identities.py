"""Compares what many containers refer to, by identity and in C."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Identities", "differing", "identities"]


class Identities(NamedTuple):
    """The addresses of the items of some containers, which identify them as long as somebody refers to them."""

    counts: list[int]
    addresses: bytes


def identities(
    containers: Sequence[Any],
    items: Callable[[Any], Iterable[Any]] = dict.values,
    count: Callable[[Any], int] = dict.__len__,
) -> Identities:
    """The identities of what ``containers`` hold: of the values of dictionaries, or of other ``items``."""
    counts = list(map(count, containers))
    found = np.fromiter(chain.from_iterable(map(items, containers)), object, sum(counts))
    return Identities(counts, found.tobytes())


def differing(now: Identities, before: Identities) -> list[int]:
    """The positions of the containers that hold other items."""
    if now == before:
        return []
    found, found_before = (np.frombuffer(each.addresses, np.intp) for each in (now, before))
    ends, ends_before = np.cumsum(now.counts), np.cumsum(before.counts)
    if now.counts == before.counts:
        at: list[int] = np.unique(np.searchsorted(ends, np.flatnonzero(found != found_before), "right")).tolist()
        return at
    pairs = zip(np.split(found, ends[:-1]), np.split(found_before, ends_before[:-1]), strict=True)
    return [position for position, (one, other) in enumerate(pairs) if not np.array_equal(one, other)]
