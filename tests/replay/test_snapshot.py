"""Values that are saved in each step are restored, by each way of saving them."""

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
def test_everything_is_restored(keep):
    owners, places = everything()
    before = repr(owners)
    kept = keep(places)
    write(owners)
    assert repr(owners) != before
    kept.restore()
    assert repr(owners) == before


def test_a_renamed_entry_is_restored():
    table = {"a": 1}
    kept = Kept([Keeper([EntryPlace(table, "table")])])
    table["b"] = table.pop("a")
    kept.restore()
    assert table == {"a": 1}


def test_restoring_relative_to_known_values():
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


def test_tensors_in_moved_storages_are_not_restored():
    owners, places = everything()
    *_, tensor, weight, counter = owners
    kept = Kept([Keeper(places)])
    moved = storages_of([weight])
    write(owners)
    kept.restore(moved)
    assert torch.equal(weight, torch.full((2,), 2.0))
    assert torch.equal(tensor, torch.arange(3.0))
    assert int(counter) == 5


def test_restoring_keeps_version_counters():
    owners, places = everything()
    tensor = owners[4]
    kept, version = Kept([Keeper(places)]), tensor._version
    kept.restore()
    assert tensor._version == version


def test_memory_of_discarded_values_is_reused():
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


def test_several_values_are_kept_separately():
    tensor = torch.zeros(3)
    keeper = Keeper([TensorPlace(tensor, "tensor")])
    kept = []
    for number in range(4):
        tensor.fill_(number)
        kept.append(Kept([keeper]))
    for number in (2, 0, 3, 1):
        kept[number].restore()
        assert torch.equal(tensor, torch.full((3,), float(number)))


def test_storages_follow_a_tensor_to_new_memory():
    tensor, storages = torch.zeros(3), Storages()
    before = storages.of([tensor])
    assert before == storages_of([tensor]) == storages.of([tensor])
    tensor.data = torch.ones(3)
    assert storages.of([tensor]) == storages_of([tensor]) != before


@pytest.mark.parametrize("name", ["a", "z"])
def test_changes_since_an_earlier_value_are_saved(name):
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
