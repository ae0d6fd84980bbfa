"""Values that are kept in each step are put back, by whichever way they are saved."""

import gc
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.places import EntryPlace, ModuleEntryPlace, SequencePlace, SetPlace
from lightning_gr.replay.snapshot import Keeper, Kept, Snapshot, Storages, storages_of


def everything():
    table, row, unique = {"a": 1, "b": []}, deque([1, 2]), {7, 8}
    ordered, tensor, weight = OrderedDict(a=1, b=2), torch.arange(3.0), nn.Parameter(torch.ones(2))
    counter = torch.tensor(5)
    owners = [table, row, unique, ordered, tensor, weight, counter]
    places = [
        EntryPlace(table, "table"), SequencePlace(row, "row"), SetPlace(unique, "unique"),
        ModuleEntryPlace(ordered, "ordered"), TensorPlace(tensor, "tensor"), TensorPlace(weight, "weight"),
        TensorPlace(counter, "counter"),
    ]  # fmt: skip
    return owners, places


def write(owners):
    table, row, unique, ordered, tensor, weight, counter = owners
    table["c"], table["a"] = 3, 4
    row.appendleft(0)
    unique.discard(7)
    ordered.move_to_end("a")
    tensor.mul_(2)
    weight.data.add_(1)
    counter.data = torch.tensor(7)


@pytest.mark.parametrize("keep", [lambda places: Kept([Keeper(places)]), Snapshot])
def test_all_is_put_back(keep):
    owners, places = everything()
    before = repr(owners)
    kept = keep(places)
    write(owners)
    assert repr(owners) != before
    kept.restore()
    assert repr(owners) == before


def test_a_name_exchanged_for_another_one_is_put_back():
    table = {"a": 1}
    kept = Kept([Keeper([EntryPlace(table, "table")])])
    table["b"] = table.pop("a")
    kept.restore()
    assert table == {"a": 1}


def test_values_that_are_known_are_not_looked_at_again():
    owners, places = everything()
    before, keeper = repr(owners), Keeper(places)
    start = Kept([keeper])
    write(owners)
    after = Kept([keeper])
    between = repr(owners)
    start.restore(now=[after])
    assert repr(owners) == before
    after.restore()
    assert repr(owners) == between


def test_tensors_in_storages_that_are_moved_stay():
    owners, places = everything()
    *_, tensor, weight, counter = owners
    kept = Kept([Keeper(places)])
    moved = storages_of([weight])
    write(owners)
    kept.restore(moved)
    assert torch.equal(weight, torch.full((2,), 2.0))
    assert torch.equal(tensor, torch.arange(3.0))
    assert int(counter) == 5


def test_version_counters_stay():
    owners, places = everything()
    tensor = owners[4]
    kept, version = Kept([Keeper(places)]), tensor._version
    kept.restore()
    assert tensor._version == version


def test_memory_is_used_again_when_nobody_refers_to_what_was_kept():
    keeper = Keeper([TensorPlace(torch.zeros(3), "tensor")])

    def address(kept):
        return [saved.value.data_ptr() for _, saved in kept.saved]

    first = Kept([keeper])
    second = Kept([keeper])
    used = address(first)
    assert address(second) != used
    del first
    gc.collect()
    third = Kept([keeper])
    assert address(third) == used


def test_two_values_are_kept_apart():
    tensor = torch.zeros(3)
    keeper = Keeper([TensorPlace(tensor, "tensor")])
    kept = []
    for number in range(4):
        tensor.fill_(number)
        kept.append(Kept([keeper]))
    for number in (2, 0, 3, 1):
        kept[number].restore()
        assert torch.equal(tensor, torch.full((3,), float(number)))


def test_storages_follow_a_tensor_that_is_pointed_elsewhere():
    tensor, storages = torch.zeros(3), Storages()
    before = storages.of([tensor])
    assert before == storages_of([tensor]) == storages.of([tensor])
    tensor.data = torch.ones(3)
    assert storages.of([tensor]) == storages_of([tensor]) != before


@pytest.mark.parametrize("name", ["a", "z"])
def test_what_has_changed_since_an_earlier_value_is_kept_as_it_is_now(name):
    first, second = {"a": 1}, {"a": 2}
    keeper = Keeper([EntryPlace(first, "first"), EntryPlace(second, "second")])
    start = Kept([keeper])
    second[name] = 3
    between = repr((first, second))
    after = Kept([keeper], [start])
    first["b"], second["a"] = 4, 5
    start.restore()
    assert (first, second) == ({"a": 1}, {"a": 2})
    after.restore()
    assert repr((first, second)) == between
