"""Each kind of place: saving does not change it, changes are detected, and restoring leaves no trace."""

from array import array
from collections import OrderedDict, defaultdict, deque

import pytest

from lightning_gr.replay import places


class Strict(dict):
    """A dictionary whose methods must not be called."""

    def __setitem__(self, key, value):
        raise AssertionError("its methods are not to be called")

    update = clear = items = values = keys = __setitem__


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self):
        self.a = 1


class Plain:
    shared = 1

    def __init__(self):
        self.a = 1


def cell_of(value):
    return (lambda: value).__closure__[0]


def empty_cell():
    if False:
        late = 1
    return (lambda: late).__closure__[0]


def change_dict(d):
    dict.__setitem__(d, "new", 1)


def reorder(d):
    d["a"] = d.pop("a")


def set_cell(cell):
    cell.cell_contents = "other"


def clear_cell(cell):
    del cell.cell_contents


CASES = {
    "dict": (places.EntryPlace, lambda: {"a": 1, "b": 2}, change_dict),
    "dict, other value": (places.EntryPlace, lambda: {"a": 1, "b": 2}, lambda d: d.update(a=3)),
    "dict, other key": (places.EntryPlace, lambda: {"a": None, "b": 2}, lambda d: (d.pop("a"), d.update(c=None))),
    "dict, order": (places.EntryPlace, lambda: {"a": 1, "b": 2}, reorder),
    "ordered": (places.EntryPlace, lambda: OrderedDict(a=1, b=2), lambda d: d.move_to_end("a")),
    "default": (places.EntryPlace, lambda: defaultdict(list), lambda d: d["x"].append(1)),
    "strict dict": (places.EntryPlace, lambda: Strict(a=1), change_dict),
    "list": (places.SequencePlace, lambda: [1, 2], lambda x: x.append(3)),
    "list, item": (places.SequencePlace, lambda: [1, 2], lambda x: x.__setitem__(0, 3)),
    "list, cleared": (places.SequencePlace, lambda: [1, 2], lambda x: x.clear()),
    "deque": (places.SequencePlace, lambda: deque([1, 2], maxlen=2), lambda x: x.append(3)),
    "set": (places.SetPlace, lambda: {1, 2}, lambda x: x.add(3)),
    "set, replaced": (places.SetPlace, lambda: {1, 2}, lambda x: (x.remove(1), x.add(3))),
    "bytearray": (places.SequencePlace, lambda: bytearray(b"ab"), lambda x: x.__setitem__(0, 200)),
    "array": (places.SequencePlace, lambda: array("d", [1.0]), lambda x: x.append(1e300)),
    "array, item": (places.SequencePlace, lambda: array("q", [10**10, 2]), lambda x: x.__setitem__(0, 10**11)),
    "attributes": (places.AttributePlace, lambda: vars(Plain()), lambda d: d.update(a=2)),
    "attributes, new": (places.AttributePlace, lambda: vars(Plain()), lambda d: d.update(b=2)),
    "slots": (places.SlotPlace, Slotted, lambda x: setattr(x, "a", 2)),
    "slots, new": (places.SlotPlace, Slotted, lambda x: setattr(x, "b", 2)),
    "slots, deleted": (places.SlotPlace, Slotted, lambda x: delattr(x, "a")),
    "class": (places.ClassPlace, lambda: type("Own", (), {"x": 1}), lambda c: setattr(c, "x", 2)),
    "class, new": (places.ClassPlace, lambda: type("Own", (), {"x": 1}), lambda c: setattr(c, "y", 2)),
    "class, deleted": (places.ClassPlace, lambda: type("Own", (), {"x": 1}), lambda c: delattr(c, "x")),
    "cell": (places.CellPlace, lambda: cell_of("one"), set_cell),
    "cell, emptied": (places.CellPlace, lambda: cell_of("one"), clear_cell),
    "cell, filled": (places.CellPlace, empty_cell, set_cell),
}  # fmt: skip


def make_place(name):
    kind, make, change = CASES[name]
    owner = make()
    return (kind(owner, "x", ("a", "b")) if kind is places.SlotPlace else kind(owner, "x")), change


def content(place):
    """Return a description of the content by ``repr`` and types."""
    saved = place.save()
    items = list(saved.items()) if isinstance(saved, dict) else saved
    if isinstance(place.owner, type):
        items.sort(key=str)  # restored attributes of a class come last
    return type(place.owner), repr(items), repr(getattr(place.owner, "maxlen", None))


@pytest.mark.parametrize("name", CASES)
def test_saved_changed_and_restored(name):
    place, change = make_place(name)
    owner, before, saved = place.owner, content(place), place.save()
    assert not place.differs(saved)
    change(owner)
    assert place.differs(saved)
    assert content(place) != before
    for _ in range(2):  # the second time there is nothing to do
        place.restore(saved)
        assert place.owner is owner
        assert content(place) == before
        assert not place.differs(saved)
    change(owner)  # must not change the saved copy
    place.restore(saved)
    assert content(place) == before


def test_values_are_compared_by_identity():
    """Comparing values fails for arrays, and equal values may differ later."""
    items, one, other = [], [1], [1]
    items.append(one)
    place = places.SequencePlace(items, "x")
    saved = place.save()
    items[0] = other
    assert place.differs(saved)
    place.restore(saved)
    assert items[0] is one


def test_hidden_attributes_are_left_alone():
    owner = {"mine": 1, "theirs": 1}
    place = places.AttributePlace(owner, "x", frozenset({"theirs", "late"}))
    saved = place.save()
    owner["theirs"], owner["late"] = 2, 3
    assert not place.differs(saved)
    owner["mine"] = 2
    place.restore(saved)
    assert owner == {"mine": 1, "theirs": 2, "late": 3}
    assert [path for path, _ in place.children()] == ["x.mine"]
