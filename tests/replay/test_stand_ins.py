"""Second passes change a copy of a set instead of the set itself, wherever it is referred to."""

import types

import pytest
from outside import Record
from torch import nn

from lightning_gr import in_second_pass
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint


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
