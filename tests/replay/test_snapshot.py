"""Values that are saved in each step are restored, by each way of saving them."""

import gc
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from lightning_gr.replay.contents import LazyPlace, TensorPlace
from lightning_gr.replay.places import EntryPlace, ModuleEntryPlace, SequencePlace, SetPlace
from lightning_gr.replay.snapshot import Keeper, Kept, Snapshot, Storages, storage_of, storages_of


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


@pytest.mark.parametrize("keep", [lambda places: Kept([Keeper(places)]), Snapshot])
def test_tensors_in_moved_storages_are_not_restored(keep):
    owners, places = everything()
    *_, tensor, weight, counter = owners
    kept = keep(places)
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


def test_what_is_kept_of_tensors_can_be_read():
    _, places = everything()
    for kept in (Kept([Keeper(places)]), Snapshot(places)):
        found = {place.path: saved.value for place, saved in kept.saved if isinstance(place, TensorPlace)}
        assert found.keys() == {"tensor", "weight", "counter"}
        assert torch.equal(found["tensor"], torch.arange(3.0))
        assert torch.equal(found["weight"], torch.ones(2))
        assert int(found["counter"]) == 5


def test_large_tensors_are_kept_one_by_one():
    large, small = torch.zeros(2000), torch.zeros(3)
    kept = Kept([Keeper([TensorPlace(large, "large"), TensorPlace(small, "small")])])
    assert {place.path for place, _ in kept.saved} == {"large", "small"}
    for tensor in (large, small):
        tensor += 1
    kept.restore(storages_of([large]))
    assert bool(large.all())
    assert not bool(small.any())
    kept.restore()
    assert not bool(large.any())


def test_small_tensors_that_are_pointed_elsewhere_are_pointed_back_unless_they_are_moved():
    tensors = [torch.zeros(3), torch.zeros(3)]
    views = [tensor.data for tensor in tensors]
    kept = Kept([Keeper([TensorPlace(tensor, "x") for tensor in tensors])])
    for tensor in tensors:
        tensor.data = torch.ones(4)
    kept.restore(storages_of(tensors[:1]))
    assert torch.equal(tensors[0], torch.ones(4))
    assert tensors[1].data_ptr() == views[1].data_ptr()
    assert torch.equal(tensors[1], torch.zeros(3))
    kept.restore()
    assert tensors[0].data_ptr() == views[0].data_ptr()
    assert torch.equal(tensors[0], torch.zeros(3))


def test_which_small_tensors_are_moved_is_found_for_each_call():
    tensors = [torch.zeros(3), torch.zeros(3)]
    keeper = Keeper([TensorPlace(tensor, "x") for tensor in tensors])
    kept = Kept([keeper])
    for moved in (0, 1, 0):
        for tensor in tensors:
            tensor.fill_(1.0)
        kept.restore(storages_of([tensors[moved]]))
        assert [bool(tensor.all()) for tensor in tensors] == [position == moved for position in (0, 1)]


def test_a_small_tensor_that_is_pointed_into_moved_memory_stays_as_well():
    weight, tensor = torch.zeros(5000), torch.zeros(3)
    keeper, moved = Keeper([TensorPlace(tensor, "x")]), storages_of([weight])
    Kept([keeper]).restore(moved)
    tensor.data = weight.data[:3]
    kept = Kept([keeper])
    weight += 1
    kept.restore(moved)
    assert bool(weight.all())


@pytest.mark.parametrize("shape", [(3,), (4,)])
def test_what_is_kept_before_and_after_a_tensor_gets_other_memory(shape):
    tensor = torch.zeros(3)
    keeper = Keeper([TensorPlace(tensor, "x")])
    before = Kept([keeper])
    tensor.data = torch.ones(shape)
    after = Kept([keeper])
    before.restore()
    assert torch.equal(tensor, torch.zeros(3))
    after.restore()
    assert torch.equal(tensor, torch.ones(shape))


def test_places_of_one_kind_that_have_changed():
    for keep in (lambda places: Kept([Keeper(places)]), Snapshot):
        owners, places = everything()
        kept = keep(places)
        assert kept.changed(ModuleEntryPlace) == []
        owners[3]["c"] = 1
        assert [place.path for place in kept.changed(ModuleEntryPlace)] == ["ordered"]
        assert kept.changed(LazyPlace) == []


def test_places_can_be_taken_out_of_a_snapshot():
    owners, places = everything()
    before, snapshot = repr(owners), Snapshot(places)
    taken = snapshot.without({id(place) for place in places[:2]})
    assert [place for place, _ in taken.saved] == places[:2]
    assert [place for place, _ in snapshot.saved] == places[2:]
    write(owners)
    taken.restore()
    assert repr(owners[:2]) == repr(everything()[0][:2])
    assert repr(owners) != before
    snapshot.restore()
    assert repr(owners) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_only_dense_tensors_have_a_storage():
    tensor = torch.zeros(4)
    assert storage_of(tensor) == storage_of(tensor[2:]) == tensor.untyped_storage().data_ptr()
    nested = torch.nested.nested_tensor([torch.zeros(2)])
    others = [torch.eye(2).to_sparse(), nested, nn.LazyLinear(1).weight, torch.empty(2, device="meta")]
    assert [storage_of(other) for other in others] == [0] * 4
    assert storages_of([tensor, tensor[2:], *others]) == {storage_of(tensor)}


def test_storages_of_other_tensors_or_of_a_subclass_are_found_anew():
    first, second, storages = torch.zeros(3), torch.zeros(3), Storages()
    assert storages.of([first]) != storages.of([second])
    assert storages.of([first, second]) == storages_of([first, second])
    own = torch.zeros(3).as_subclass(type("Own", (torch.Tensor,), {}))
    assert storages.of([own]) == storages_of([own])
    own.data = torch.ones(3)
    assert storages.of([own]) == storages_of([own])
