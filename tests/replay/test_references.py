"""New objects in attributes and containers are found in the next step, once."""

import weakref
from collections import deque

import pytest
import torch

from lightning_gr.replay.places import SequencePlace
from lightning_gr.replay.references import References
from lightning_gr.replay.walk import walk


class Thing:
    def __init__(self):
        self.count, self.table, self.row, self.unique = 0, {"a": []}, deque([{}]), {"x"}
        self.tensor = torch.zeros(2)


class Slotted:
    __slots__ = ("__weakref__", "inner")


def paths(places):
    return [place.path for place in places]


WRITES = {
    "attribute": (lambda t: setattr(t, "other", []), ["thing"]),
    "exchanged attribute": (lambda t: setattr(t, "table", {}), ["thing"]),
    "entry": (lambda t: t.table.update(b={}), ["thing.table"]),
    "exchanged entry": (lambda t: t.table.update(a=[]), ["thing.table"]),
    "item": (lambda t: t.row.append([]), ["thing.row"]),
    "member": (lambda t: t.unique.add(Thing), ["thing.unique"]),
    "number": (lambda t: setattr(t, "count", 12345), []),
    "fewer": (lambda t: t.table.clear(), []),
    "order": (lambda t: t.table.update(a=t.table.pop("a")), []),
    "tensor": (lambda t: setattr(t, "tensor", torch.ones(2)), ["thing"]),
}


@pytest.mark.parametrize("write", WRITES)
def test_new_objects_are_found_once(write):
    thing = Thing()
    references = References(walk({"thing": thing}))
    assert references.changed() == []
    change, expected = WRITES[write]
    change(thing)
    assert paths(references.changed()) == expected
    assert references.changed() == []


def test_tensors_with_a_graph_always_count_as_new_since_identities_are_reused():
    thing, weight = Thing(), torch.ones(2, requires_grad=True)
    thing.tensor = weight * 2
    references = References(walk({"thing": thing}))
    assert paths(references.changed()) == ["thing"]
    thing.tensor = None
    references.changed()
    assert references.changed() == []


def test_a_result_of_a_graph_that_comes_later_counts_as_new_in_each_comparison_until_it_is_gone():
    thing, weight = Thing(), torch.ones(2, requires_grad=True)
    references = References(walk({"thing": thing}))
    thing.tensor = weight * 2
    for _ in range(3):
        assert paths(references.changed()) == ["thing"]
    thing.tensor = torch.zeros(2)
    references.changed()
    assert references.changed() == []


REMOVALS = {
    "all": lambda row: row.clear(),
    "one beside a tensor": lambda row: row.pop(0),
    "one in whose place another comes twice": lambda row: row.__setitem__(0, row[1]),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_what_is_removed_from_a_container_is_freed(removal):
    """A comparison after the removal at the latest, even if nothing new has come."""
    row = [Slotted(), torch.zeros(2)]
    removed = weakref.ref(row[0])
    references = References([SequencePlace(row, "row")])
    REMOVALS[removal](row)
    assert references.changed() == []
    assert removed() is None


def test_an_object_in_the_place_of_a_removed_one_is_new():
    """It would often have the same address if the removed one were not kept until then."""
    row = [Slotted()]
    references = References([SequencePlace(row, "row")])
    row.clear()
    row.append(Slotted())
    assert paths(references.changed()) == ["row"]


def test_slots_are_compared():
    slotted = Slotted()
    slotted.inner = []
    references = References(walk({"slotted": slotted}))
    assert references.changed() == []
    slotted.inner = {}
    assert paths(references.changed()) == ["slotted"]
