"""The arguments of a training step: containers are restored, writes to tensors are refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gr.replay.batch import Batch
from lightning_gr.replay.snapshot import Snapshot

LOADER = SimpleNamespace()


def make():
    return {"x": torch.arange(100.0).view(4, 25), "inner": [torch.ones(2), {"y": torch.zeros(3)}], "name": "a"}


def test_containers_are_restored_with_the_same_tensors():
    value, other = make(), SimpleNamespace(x=torch.ones(1))
    batch = Batch((value, 0), {"other": other}, nn.Module())
    start, tensors = Snapshot(batch.protected), (value["x"], value["inner"][1]["y"], other.x)
    value.pop("x")
    value["inner"][1].clear()
    value["inner"].append(3)
    other.x = other.x * 2
    start.restore()
    assert value.keys() == make().keys()
    assert len(value["inner"]) == 2
    now = value["x"], value["inner"][1]["y"], other.x
    assert all(a is b for a, b in zip(now, tensors, strict=True))
    batch.note_after_first()
    batch.check(LOADER)


def writes(tensor):
    return [
        lambda: tensor.mul_(2), lambda: tensor.data.add_(1), lambda: setattr(tensor, "data", tensor + 1),
        lambda: tensor.__setitem__(0, 7), lambda: tensor.resize_(0), lambda: tensor.detach().numpy().fill(9.0),
    ]  # fmt: skip


@pytest.mark.parametrize("way", range(6))
@pytest.mark.parametrize("find", [lambda v: v["x"], lambda v: v["inner"][0], lambda v: v["inner"][1]["y"]])
def test_a_written_tensor_is_refused(find, way):
    value = make()
    batch = Batch((value,), {}, nn.Module())
    writes(find(value))[way]()
    batch.note_after_first()  # does not raise yet
    with pytest.raises(
        RuntimeError, match=r"changed a tensor of its batch in place.*`x = batch\['x'\]\.clone\(\)`"
    ) as caught:
        batch.check(LOADER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", range(6))
def test_a_loader_that_writes_into_earlier_batches_is_named(way):
    value = make()
    batch = Batch((value,), {}, nn.Module())
    batch.note_after_first()
    batch.check(LOADER)
    writes(value["x"])[way]()
    with pytest.raises(
        RuntimeError, match=r"^The data loader .SimpleNamespace. wrote new data.*`x\.clone\(\)`.*='micro_batch'`"
    ):
        batch.check(LOADER)


@pytest.mark.parametrize(
    ("make_iterator", "kind"),
    [
        (lambda: iter([1]), "list_iterator"),
        (lambda: (i for i in ()), "generator"),
        (lambda: map(int, "1"), "map"),
    ],
)
def test_an_iterator_is_refused_at_once(make_iterator, kind):
    with pytest.raises(
        RuntimeError, match=rf"The batch contains an iterator \({kind}\), which the second pass would find exhausted"
    ):
        Batch(({"x": [make_iterator()]},), {}, nn.Module())


def test_a_batch_is_searched_once():
    batch = Batch((make(),), {}, nn.Module())
    places = batch.places
    assert not batch.begin()
    assert batch.places is places


def test_the_module_is_not_entered_from_a_batch():
    module = nn.Linear(2, 2)
    batch = Batch(([module],), {}, module)
    with torch.no_grad():
        module.weight += 1
    batch.note_after_first()
    batch.check(LOADER)


@pytest.mark.filterwarnings(
    "ignore:Sparse .* tensor support is in beta", "ignore:The PyTorch API of nested tensors", "ignore:.*quantize_per"
)
def test_other_kinds_of_tensors_and_values_are_allowed():
    value = [
        torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.nested.nested_tensor([torch.ones(2)]),
        torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8), torch.empty(3, device="meta"), np.arange(3),
        torch.zeros(0), None, "x", 1j,
    ]  # fmt: skip
    batch = Batch(tuple(value), {}, nn.Module())
    batch.note_after_first()
    batch.check(LOADER)
