"""The arguments of a training step: containers are restored, writes to tensors are refused."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gr.replay.batch import Batch, _plain_places
from lightning_gr.replay.snapshot import Snapshot
from lightning_gr.replay.walk import walk

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
        torch.zeros(0), None, "x", 1j, hashlib.sha256(),
    ]  # fmt: skip
    batch = Batch(tuple(value), {}, nn.Module())
    batch.note_after_first()
    batch.check(LOADER)


SHARED = torch.zeros(2)
PLAIN = {
    "numbers": (1, 2.5, True, None, "a", b"b", torch.float32),
    "tuple": (torch.zeros(2), (torch.ones(3), 1)),
    "list": [torch.zeros(2), [torch.ones(3)], (torch.ones(1),)],
    "dictionary": {"x": torch.zeros(2), "y": {"z": [torch.ones(3)]}},
    "the same tensor twice": [SHARED, SHARED, {"x": SHARED}],
    "several": list(range(60)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_of_a_plain_batch_the_same_is_found_as_by_a_search(name):
    """Without what a search finds of the classes of tensors, and of the dictionaries in them."""
    roots = {"batch": PLAIN[name]}
    found = _plain_places(roots)
    assert found is not None
    assert {(type(place), id(place.owner)) for place in found} == {
        (type(place), id(place.owner)) for place in walk(roots)
    }
    assert all(place.path.startswith("batch") for place in found)


class Own(torch.Tensor):
    pass


def noted(tensor):
    tensor.note = [1]
    return tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimpleNamespace(), lambda: {1}, lambda: iter([1]), lambda: np.zeros(2), lambda: noted(torch.zeros(2)),
        lambda: torch.zeros(2).as_subclass(Own), lambda: torch.zeros(2, requires_grad=True), lambda: list(range(99)),
        lambda: nn.Parameter(torch.zeros(2)), lambda: torch.eye(2).to_sparse(), lambda: type("Own", (list,), {})(),
    ],
)  # fmt: skip
def test_what_else_a_batch_holds_takes_a_search(make):
    assert _plain_places({"batch": (1, [make()])}) is None


def test_the_number_of_containers_does_not_matter():
    """Few are saved in another way than many."""
    for count in (1, 30):
        value = [[position] for position in range(count)]
        batch = Batch((value,), {}, nn.Module())
        kept = batch.keep()
        for items in value:
            items.append(7)
        value.clear()
        kept.restore()
        assert value == [[position] for position in range(count)]


def test_a_thorough_batch_notices_a_write_to_a_single_entry():
    for thorough in (True, False):
        tensor = torch.zeros(1000)
        batch = Batch((tensor,), {}, nn.Module(), thorough=thorough)
        tensor.data[301] = 1
        batch.note_after_first()
        if thorough:
            with pytest.raises(RuntimeError, match="changed a tensor of its batch in place"):
                batch.check(LOADER)
        else:
            batch.check(LOADER)


def test_a_write_to_a_batch_is_learned_by_nobody():
    tensor = torch.zeros(2)
    batch = Batch((tensor,), {}, nn.Module())
    marks = batch.marks()
    tensor += 1
    assert marks.changed() == []
    batch.note(batch.places)
    assert not any(place.owner is tensor for place in batch.protected)


@pytest.mark.parametrize("make", [lambda: torch.zeros(2).as_subclass(Own), lambda: torch.zeros(2, requires_grad=True)])
def test_a_write_through_data_is_refused_for_all_kinds_of_tensors(make):
    tensor = make()
    batch = Batch((tensor,), {}, nn.Module())
    tensor.data.add_(1)
    batch.note_after_first()
    with pytest.raises(RuntimeError, match="changed a tensor of its batch in place"):
        batch.check(LOADER)


@pytest.mark.parametrize("other", [1, SimpleNamespace()])
def test_places_are_named_by_the_arguments(other):
    batch = Batch(([torch.zeros(2)], other), {"x": torch.zeros(2)}, nn.Module())
    assert {place.path.partition("[")[0] for place in batch.places if place.path != "requires_grad"} == {
        "batch",
        "keywords",
    }
