"""The contents of containers are compared by identity, without calling any of their methods."""

from collections import OrderedDict

import pytest

from lightning_gr.replay.identities import differing, identities


class Equal:
    """Must not be compared."""

    def __eq__(self, other):
        raise AssertionError("it was asked")

    __hash__ = object.__hash__


class Bare(dict):
    """A dictionary whose methods must not be called."""

    def values(self):
        raise AssertionError("it was asked")

    __len__ = __iter__ = values


def tables():
    return [{}, {"a": Equal(), "b": [1, [2]]}, {}, OrderedDict(c=Equal()), Bare(d=(1, 2), e=Equal()), {}]


WRITES = {
    "value": lambda d: d.update(dict.fromkeys(dict.keys(d), Equal())), "more": lambda d: dict.update(d, z=Equal()),
    "fewer": dict.popitem,
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("position", [1, 3, 4])
def test_a_dictionary_with_other_contents_is_found(write, position):
    held = tables()
    before = identities(held)
    copies = [dict(dict.items(each)) for each in held]  # keeps objects alive, so that no identity is reused
    assert differing(identities(held), before) == []
    WRITES[write](held[position])
    assert differing(identities(held), before) == [position]
    assert differing(before, identities(held)) == [position]
    assert len(copies) == len(held)


def test_a_dictionary_that_was_empty_is_found():
    held = tables()
    before = identities(held)
    held[2]["x"], held[5]["x"] = Equal(), Equal()
    assert differing(identities(held), before) == [2, 5]


def test_a_renamed_entry_is_found_by_its_key():
    held = tables()
    before, keys = identities(held), identities(held, dict.__iter__)
    held[3]["d"] = held[3].pop("c")
    assert differing(identities(held), before) == []
    assert differing(identities(held, dict.__iter__), keys) == [3]


def test_items_of_lists_and_sets():
    held = [[1, 2], {"a"}, []]
    before = identities(held, iter, len)
    held[1].add("b")
    assert differing(identities(held, iter, len), before) == [1]


def test_no_containers():
    assert differing(identities([]), identities([])) == []
