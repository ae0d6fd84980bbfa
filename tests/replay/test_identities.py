"""What containers hold is compared by identity, with no method of what they hold."""

from collections import OrderedDict

import pytest

from lightning_gr.replay.identities import differing, identities


class Equal:
    """Equal to everything, and asked by nobody."""

    def __eq__(self, other):
        raise AssertionError("it was asked")

    __hash__ = object.__hash__


class Bare(dict):
    """Refuses its methods."""

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
def test_each_dictionary_that_holds_something_else_is_found(write, position):
    held = tables()
    before = identities(held)
    copies = [dict(dict.items(each)) for each in held]  # so that no identity is used again
    assert differing(identities(held), before) == []
    WRITES[write](held[position])
    assert differing(identities(held), before) == [position]
    assert differing(before, identities(held)) == [position]
    assert len(copies) == len(held)


def test_an_empty_dictionary_that_is_filled_is_found():
    held = tables()
    before = identities(held)
    held[2]["x"], held[5]["x"] = Equal(), Equal()
    assert differing(identities(held), before) == [2, 5]


def test_a_name_that_is_exchanged_for_another_one_is_found_by_keys():
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


def test_of_nothing():
    assert differing(identities([]), identities([])) == []
