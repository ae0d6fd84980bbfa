"""A fingerprint detects any write, and restores everything it has a copy of."""

import pytest
import torch
from torch import nn

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.fingerprint import Fingerprint
from lightning_gr.replay.machinery import QuietTensorPlace
from lightning_gr.replay.opaque import OpaquePlace
from lightning_gr.replay.places import EntryPlace
from lightning_gr.replay.snapshot import storages_of


def state():
    large, small, momentum, table = torch.zeros(40_000), torch.zeros(3), torch.zeros(3), {}
    places = [
        TensorPlace(large, "large"), TensorPlace(small, "small"), QuietTensorPlace(momentum, "momentum"),
        EntryPlace(table, "table"),
    ]  # fmt: skip
    return (large, small, momentum, table), places


WRITES = {
    "large": lambda s: s[0].data[12_345].add_(1), "small": lambda s: s[1].data.add_(1),
    "momentum": lambda s: s[2].add_(1), "table": lambda s: s[3].update(a=1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_detected_and_undone(name):
    owners, places = state()
    fingerprint = Fingerprint(places, 2**30)
    assert fingerprint.changed() == []
    WRITES[name](owners)
    changed = fingerprint.changed()
    assert [place.path for place in changed] == [name]
    assert fingerprint.restore(changed) == []
    assert not any(bool(each.any()) for each in owners[:3])
    assert owners[3] == {}


def test_values_beyond_the_budget_are_not_copied():
    owners, places = state()
    fingerprint = Fingerprint(places, 100)
    owners[0].add_(1)
    owners[1].add_(1)
    changed = fingerprint.changed()
    assert [place.path for place in fingerprint.restore(changed)] == ["large"]
    assert bool(owners[0].all())
    assert not bool(owners[1].any())


def test_tensors_in_moved_storages_do_not_count():
    owners, places = state()
    fingerprint = Fingerprint(places, 0)
    owners[0].add_(1)
    assert fingerprint.changed(storages_of([owners[0]])) == []


def test_places_that_are_taken_out_are_no_longer_compared():
    owners, places = state()
    fingerprint = Fingerprint(places, 2**30)
    owners[1].add_(1)
    taken = fingerprint.without(fingerprint.changed())
    assert fingerprint.changed() == []
    taken.restore()
    assert not bool(owners[1].any())


def test_the_smallest_tensors_are_copied_as_long_as_the_budget_lasts():
    tensors = [torch.zeros(size) for size in (30, 10, 20)]
    places = [TensorPlace(tensor, str(tensor.numel())) for tensor in tensors]
    for budget, left in ((4 * 60, []), (4 * 60 - 1, ["30"]), (4 * 30, ["30"]), (4 * 10, ["30", "20"]),
                         (0, ["30", "10", "20"])):  # fmt: skip
        fingerprint = Fingerprint(places, budget)
        for tensor in tensors:
            tensor += 1
        changed = fingerprint.changed()
        assert len(changed) == 3
        assert [place.path for place in fingerprint.restore(changed)] == left


def test_an_empty_tensor_is_none_of_those_that_cannot_be_put_back():
    tensor = torch.zeros(0)
    fingerprint = Fingerprint([TensorPlace(tensor, "x")], 100)
    tensor.resize_(3).fill_(1.0)
    assert fingerprint.restore(fingerprint.changed()) == []
    assert tensor.shape == (0,)


def test_a_large_state_of_an_optimizer_is_not_copied():
    small, large = torch.zeros(2**14), torch.zeros(2**14 + 1)
    fingerprint = Fingerprint([QuietTensorPlace(small, "small"), QuietTensorPlace(large, "large")], 2**30)
    small += 1
    large += 1
    assert [place.path for place in fingerprint.restore(fingerprint.changed())] == ["large"]
    assert not bool(small.any())


def test_a_moved_state_of_an_optimizer_does_not_count():
    momentum = torch.zeros(3)
    fingerprint = Fingerprint([QuietTensorPlace(momentum, "momentum")], 100)
    momentum += 1
    assert fingerprint.changed(storages_of([momentum])) == []
    assert len(fingerprint.changed()) == 1


def test_a_state_of_an_optimizer_that_is_taken_out_is_looked_at_no_more():
    first, second = torch.zeros(3), torch.zeros(3)
    places = [QuietTensorPlace(first, "first"), QuietTensorPlace(second, "second")]
    fingerprint = Fingerprint(places, 0)
    first += 1
    fingerprint.without(fingerprint.changed())
    first += 1
    assert fingerprint.changed() == []
    second += 1
    assert [place.path for place in fingerprint.changed()] == ["second"]


def test_an_iterator_cannot_be_put_back():
    numbers = iter([1, 2, 3])
    fingerprint = Fingerprint([OpaquePlace(numbers, "numbers")], 100)
    next(numbers)
    assert [place.path for place in fingerprint.restore(fingerprint.changed())] == ["numbers"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(300).to_sparse(), lambda: torch.eye(300).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda: torch.ones(2, 3).T,
    ],
)  # fmt: skip
def test_tensors_of_other_kinds_are_compared_and_those_without_content_are_not(make):
    tensor, lazy = make(), nn.LazyLinear(2).weight
    # which is less than the size that a sparse tensor would have if it were dense
    fingerprint = Fingerprint([TensorPlace(tensor, "x"), TensorPlace(lazy, "lazy")], 100)
    tensor.mul_(2)
    changed = fingerprint.changed()
    assert [place.path for place in changed] == ["x"]
    assert fingerprint.restore(changed) == []
