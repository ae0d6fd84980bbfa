"""Objects that cannot be rewound are noticed when they advance, and checking does not advance them."""

import ctypes
import decimal
import hashlib
import itertools
import mmap
import queue
import sqlite3
from collections import UserDict
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from lightning_gr.replay import opaque


class Numbers(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int), ("second", ctypes.c_double))


class Steps:
    """An iterator of a user's own."""

    __slots__ = ("__dict__",)

    def __init__(self):
        self.count, self.last = 0, None

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1000  # no number that Python keeps only once
        return self.count


class Exchanges(Steps):
    def __next__(self):
        self.last = [self.last]


class Slotted(Steps):
    __slots__ = ("count", "last")


class Talks(Steps):
    """Must not be asked how it is, nor how long."""

    def __repr__(self):
        raise AssertionError

    def __len__(self):
        raise AssertionError


def with_a_tensor():
    tensor = torch.zeros(2)
    while True:
        tensor = tensor.clone()
        yield tensor


def with_an_iterator():
    numbers = iter(range(9))
    while True:
        next(numbers)
        yield


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
     lambda: itertools.cycle([1, 2]), delegating, nested, lambda: (x for x in [1, 2, 3]), Steps, Exchanges,
     Slotted, Talks, with_a_tensor, with_an_iterator],
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
        (decimal.Context, lambda context: setattr(context, "prec", 3)),
        (lambda: mmap.mmap(-1, 8), lambda memory: memory.seek(3)),
        (lambda: mmap.mmap(-1, 8), lambda memory: memory.__setitem__(3, 1)),
        (lambda: ElementTree.Element("a"), lambda element: setattr(element, "text", "b")),
        (lambda: ElementTree.Element("a"), lambda element: element.append(ElementTree.Element("b"))),
        (Numbers, lambda numbers: setattr(numbers, "second", 2.0)),
        (lambda: (ctypes.POINTER(ctypes.c_int) * 2)(), lambda row: row.__setitem__(1, ctypes.pointer(ctypes.c_int(1)))),
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


def test_a_generator_that_refers_to_itself_is_seen_to_move():
    def refers():
        itself = yield
        for _ in range(3):
            yield itself

    owner = refers()
    next(owner)
    owner.send(owner)
    place = opaque.OpaquePlace(owner, "x")
    saved = place.save()
    assert not place.differs(saved)
    next(owner)
    assert place.differs(saved)
    owner.close()
    assert place.save() is None


def test_an_equal_number_is_no_move():
    """As in the attributes of an iterator, where it is another object each time."""
    owner = Steps()
    next(owner)
    place = opaque.OpaquePlace(owner, "x")
    saved = place.save()
    owner.count = int("1000")
    assert not place.differs(saved)
