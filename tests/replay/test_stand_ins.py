"""Second passes change a copy of a set instead of the set itself, wherever it is referred to."""

import random
import types
from collections import OrderedDict, deque

import pytest
from outside import Record
from torch import nn

from lightning_gr import in_second_pass
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.places import CellPlace, EntryPlace, SequencePlace, SetPlace
from lightning_gr.replay.stand_ins import SetsAtStart


class Slotted:
    __slots__ = ("inner",)


class Own(set):
    pass


def in_slot(items):
    holder = Slotted()
    holder.inner = items
    return holder


WAYS = {
    "attribute": (lambda s: types.SimpleNamespace(inner=s), lambda h: h.inner),
    "dictionary": (lambda s: {"a": s}, lambda h: h["a"]),
    "list": (lambda s: [0, s], lambda h: h[1]),
    "slot": (in_slot, lambda h: h.inner),
    "closure": (lambda s: lambda: s, lambda h: h()),
    "tuple": (lambda s: (s,), lambda h: h[0]),
    "bound method": (lambda s: s.add, lambda h: h.__self__),
}


def items_of(number):
    """Return a set with items whose hashes collide."""
    return {f"item {position}" for position in range(number)} | {8, 16, 32, 64}


def change(items):
    first = next(iter(items))
    items.discard(first)
    items.add(f"{first}+")


def train(way, items, steps=5, passes=2):
    """Change the set in each step; return what first passes found there, and what second passes did."""
    module, seen, again = nn.Module(), Record(), Record()
    module.held = WAYS[way][0](items)

    def compute():
        found = WAYS[way][1](module.held)
        (again if in_second_pass() else seen).append(sorted(map(str, found)))
        change(found)
        return found

    surroundings = Surroundings(Footprint(lambda: {"self": module}))
    for _ in range(steps):
        evaluation = Evaluation(compute, surroundings)
        evaluation.first()
        for _ in range(passes):
            order = list(items)
            with evaluation.again():
                pass
            assert WAYS[way][1](module.held) is items
            if way not in ("tuple", "bound method"):
                assert list(items) == order
            assert set(items) == set(order)
    return seen, again


@pytest.mark.parametrize("way", WAYS)
def test_each_pass_finds_the_items_of_the_first(way):
    items, plain = items_of(20), items_of(20)
    seen, again = train(way, items)
    assert list(again) == [found for found in seen for _ in range(2)]
    if way not in ("tuple", "bound method"):
        for _ in range(5):
            change(plain)
        assert list(items) == list(plain)


def test_a_subclass_and_an_empty_set():
    for items in (Own(items_of(3)), set()):
        before, module = set(items), nn.Module()
        module.held = items

        def compute(module=module):
            module.held.add(len(module.held))
            return len(module.held)

        evaluation = Evaluation(compute, Surroundings(Footprint(lambda module=module: {"self": module})))
        first = evaluation.first()
        with evaluation.again() as second:
            assert second == first
        assert set(items) == before | {len(before)}
        assert module.held is items


@pytest.mark.parametrize("seed", range(20))
def test_a_stand_in_has_the_items_of_the_start_in_their_order(seed):
    numbers = random.Random(seed)
    items, same = {numbers.randrange(10**6) for _ in range(10)}, {1}
    sets, order = SetsAtStart([SetPlace(items, "x"), SetPlace(same, "same")]), list(items)
    items.add(10**6)
    with sets.replaced() as pairs:
        ((original, stand_in),) = pairs
        assert original is items
        assert list(stand_in) == order


@pytest.mark.parametrize("seed", range(20))
def test_a_stand_in_for_a_set_that_has_shrunk_before_has_its_items(seed):
    """Their order depends on what was removed, so it cannot always be had."""
    numbers = random.Random(seed)
    items = {numbers.randrange(10**6) for _ in range(40)}
    for item in list(items)[:30]:
        items.discard(item)
    sets, before = SetsAtStart([SetPlace(items, "x")]), set(items)
    items.clear()
    with sets.replaced() as pairs:
        assert pairs[0][1] == before


@pytest.mark.parametrize(
    ("kind", "make", "values"),
    [
        (EntryPlace, lambda *each: dict(enumerate(each)), lambda owner: list(owner.values())),
        (EntryPlace, lambda *each: OrderedDict(enumerate(each)), lambda owner: list(owner.values())),
        (SequencePlace, lambda *each: list(each), list),
        (SequencePlace, lambda *each: deque(each), list),
    ],
)
def test_nothing_but_the_set_is_exchanged(kind, make, values):
    items, other, stand_in = {1}, {1}, {1}
    owner = make(0, items, other, items)
    cell = (lambda: other).__closure__[0]
    SetsAtStart.refer_to_stand_ins([(items, stand_in)], [kind(owner, "x"), CellPlace(cell, "other")])
    expected = [0, stand_in, other, stand_in]
    assert all(found is value for found, value in zip(values(owner), expected, strict=True))
    assert cell.cell_contents is other
