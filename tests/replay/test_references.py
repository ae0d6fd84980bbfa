"""New objects in attributes and containers are found in the next step, once."""

from collections import deque

import pytest
import torch

from lightning_gr.replay.references import References
from lightning_gr.replay.walk import walk


class Thing:
    def __init__(self):
        self.count, self.table, self.row, self.unique = 0, {"a": []}, deque([{}]), {"x"}
        self.tensor = torch.zeros(2)


class Slotted:
    __slots__ = ("inner",)


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


def test_slots_are_compared():
    slotted = Slotted()
    slotted.inner = []
    references = References(walk({"slotted": slotted}))
    assert references.changed() == []
    slotted.inner = {}
    assert paths(references.changed()) == ["slotted"]
