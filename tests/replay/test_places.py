"""Each kind of place: saving does not change it, changes are detected, and restoring leaves no trace."""

import abc
import random
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


# --- marks, of what is too large to be saved in each step


NINE = "abcdefghi"
MARKED = {
    "dict, empty": (places.EntryPlace, dict, change_dict),
    "dict": (places.EntryPlace, lambda: dict.fromkeys(NINE, 1), change_dict),
    "dict, last value": (places.EntryPlace, lambda: dict.fromkeys(NINE, 1), lambda d: d.update(i=2)),
    "dict, last key": (places.EntryPlace, lambda: dict.fromkeys(NINE, 1), lambda d: d.update(j=d.pop("i"))),
    "ordered": (places.EntryPlace, lambda: OrderedDict.fromkeys(NINE, 1), lambda d: d.update(j=1)),
    "strict dict": (places.EntryPlace, lambda: Strict(a=1), change_dict),
    "list, empty": (places.SequencePlace, list, lambda x: x.append(1)),
    "list": (places.SequencePlace, lambda: list(NINE), lambda x: x.insert(4, "e")),
    "list, first": (places.SequencePlace, lambda: list(NINE), lambda x: x.__setitem__(0, "x")),
    "list, middle": (places.SequencePlace, lambda: list(NINE), lambda x: x.__setitem__(4, "x")),
    "list, last": (places.SequencePlace, lambda: list(NINE), lambda x: x.__setitem__(8, "x")),
    "deque": (places.SequencePlace, lambda: deque(NINE, maxlen=9), lambda x: x.append("x")),
    "bytearray": (places.SequencePlace, lambda: bytearray(9), lambda x: x.__setitem__(8, 1)),
    "array": (places.SequencePlace, lambda: array("d", [0.5] * 9), lambda x: x.__setitem__(4, 1.5)),
    "set": (places.SetPlace, lambda: set(NINE), lambda x: x.add("x")),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_a_mark_tells_of_a_change(name):
    kind, make, change = MARKED[name]
    owner = make()
    place = kind(owner, "x")
    assert place.has_mark
    mark = place.mark()
    assert place.mark() == mark
    change(owner)
    assert place.mark() != mark


def test_an_equal_item_in_the_place_of_another_has_another_mark():
    items = [[1], [1]]
    place = places.SequencePlace(items, "x")
    mark = place.mark()
    items[0] = [1]
    assert place.mark() != mark


# --- what is within


class Base:
    __slots__ = ("__private", "b")
    shared = 1


class Derived(Base):
    __slots__ = "a"


class Body(abc.ABC):
    number, nested = 1, Base
    by_name = property(lambda self: 1)

    @abc.abstractmethod
    def method(self):
        """Something."""

    fixed = staticmethod(len)
    of_class = classmethod(len)


def test_slots_of_bases_and_private_ones_are_slots():
    assert places.slot_names(Derived) == ("_Base__private", "a", "b")
    assert places.slot_names(Plain) == ()


def test_slots_without_a_value_are_left_out():
    owner = Derived()
    owner.a = 1
    place = places.SlotPlace(owner, "x", places.slot_names(Derived))
    assert list(place.children()) == [("x.a", 1)]
    assert list(place.values()) == [1]


def test_only_data_in_the_body_of_a_class_counts():
    place = places.ClassPlace(Body, "x")
    assert list(place.children()) == [("x.number", 1)]
    saved, method = place.save(), Body.method
    try:
        Body.method = lambda self: 2
        assert not place.differs(saved)
        Body.number = 2
        assert place.differs(saved)
        place.restore(saved)
        assert Body.number == 1
        assert Body.method is not method
    finally:
        Body.method = method


def entries():
    key = Plain()
    return {"a": 1, 2: 3, 0.5: 4, (1, "b"): 5, key: 6}, key


def test_entries_are_named_by_their_keys_except_for_keys_with_code_of_their_own():
    owner, key = entries()
    expected = [("x['a']", 1), ("x[2]", 3), ("x[0.5]", 4), ("x[(1, 'b')]", 5), ("x[...]", 6), ("x[...]", key)]
    place = places.EntryPlace(owner, "x")
    assert list(place.children()) == expected
    assert list(place.values()) == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("kind", "owner", "expected"),
    [
        (places.EntryPlace, OrderedDict(a=1, b=2), {"x['a']": 1, "x['b']": 2}),
        (places.EntryPlace, dict.__new__(Strict), {}),
        (places.ModuleEntryPlace, {"a": 1}, {"x.a": 1}),
        (places.AttributePlace, {"a": 1, "b": 2}, {"x.a": 1, "x.b": 2}),
        (places.SequencePlace, deque(["a", "b"]), {"x[0]": "a", "x[1]": "b"}),
        (places.SequencePlace, bytearray(b"ab"), {}),
        (places.SequencePlace, array("d", [1.0]), {}),
        (places.SetPlace, {"a"}, {"x[...]": "a"}),
        (places.CellPlace, cell_of("a"), {"x": "a"}),
        (places.CellPlace, empty_cell(), {}),
    ],
)
def test_what_a_place_leads_to(kind, owner, expected):
    place = kind(owner, "x")
    assert dict(place.children()) == expected
    assert list(place.values()) == list(expected.values())


def test_a_set_that_something_refers_to_for_good_cannot_be_replaced():
    items, other = {1}, {1}
    held = {id(other)}
    assert places.SetPlace(items, "x", held).can_be_replaced
    assert not places.SetPlace(other, "x", held).can_be_replaced
    assert not places.SetPlace(type("Own", (set,), {})(), "x", held).can_be_replaced


@pytest.mark.parametrize("seed", range(20))
def test_a_set_without_what_was_added_has_its_order(seed):
    """Which depends on all that was ever added to it, so that a new set with the same items may have another one."""
    numbers = random.Random(seed)
    items = {numbers.randrange(10**6) for _ in range(10)}  # to which one more can be added without more memory
    place = places.SetPlace(items, "x")
    saved = place.save()
    items.add(10**6)
    place.restore(saved)
    assert list(items) == saved


def test_the_order_of_a_set_is_restored_as_well():
    """These two collide, so the one that comes first is given first."""
    items = {8, 0}
    place = places.SetPlace(items, "x")
    saved = place.save()
    items.clear()
    items.update([0, 8] if saved == [8, 0] else [8, 0])
    assert place.differs(saved)
    place.restore(saved)
    assert list(items) == saved
