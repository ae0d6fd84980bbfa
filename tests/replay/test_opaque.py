"""Objects that cannot be rewound are noticed when they advance, and checking does not advance them."""

import hashlib
import itertools
import queue
import sqlite3
from collections import UserDict

import pytest
from torch import nn

from lightning_gr.replay import opaque


def counting():
    count = 0
    while True:
        yield count
        count += 1


def delegating():
    yield from range(7)


def nested():
    yield from delegating()


@pytest.mark.parametrize(
    "make",
    [counting, lambda: iter([1, 2, 3]), lambda: iter({1: 2, 3: 4}), lambda: itertools.count(), lambda: iter(range(9)),
     lambda: itertools.cycle([1, 2]), delegating, nested, lambda: (x for x in [1, 2, 3])],
)  # fmt: skip
def test_the_advance_of_an_iterator_is_detected(make):
    owner = make()
    assert opaque.is_opaque(owner)
    place = opaque.OpaquePlace(owner, "x")
    next(owner)
    saved = place.save()
    assert not place.differs(saved)
    if isinstance(owner, (itertools.cycle, zip)):
        return  # these do not reveal their position
    next(owner)
    assert place.differs(saved)


def test_objects_that_are_not_opaque():
    assert not any(map(opaque.is_opaque, (nn.Linear(1, 1), UserDict(), type("Own", (dict,), {})())))
    assert not any(map(opaque.can_be_moved, ([1], {}, "x", range(3))))


def test_the_position_of_a_file_is_compared(tmp_path):
    with (tmp_path / "x").open("w") as stream:
        place = opaque.OpaquePlace(stream, "x")
        saved = place.save()
        assert not place.differs(saved)
        stream.write("a")
        assert place.differs(saved)
    assert place.differs(saved)
    assert not place.differs(place.save())


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (hashlib.sha256, lambda digest: digest.update(b"a")),
        (queue.SimpleQueue, lambda items: items.put(1)),
    ],
)
def test_objects_of_extensions_are_compared_by_what_they_reveal(make, change):
    owner = make()
    assert opaque.is_opaque(owner)
    assert not opaque.can_be_moved(owner)
    place = opaque.OpaquePlace(owner, "x")
    saved = place.save()
    assert not place.differs(saved)
    change(owner)
    assert place.differs(saved)


def test_changes_of_a_database_are_detected_and_it_may_be_closed():
    base = sqlite3.connect(":memory:")
    place = opaque.OpaquePlace(base, "x")
    base.execute("create table t (x)")
    saved = place.save()
    assert not place.differs(saved)
    base.execute("insert into t values (1)")
    assert place.differs(saved)
    base.close()
    place.save()
