"""Marks detect writes without copying tensors."""

import warnings

import pytest
import torch
from torch import nn

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.machinery import QuietTensorPlace
from lightning_gr.replay.marks import Marker, Marks
from lightning_gr.replay.snapshot import storages_of

NAN = float("nan")


def marker(*tensors, **options):
    return Marker([TensorPlace(tensor, str(position)) for position, tensor in enumerate(tensors)], **options)


def changed(marks):
    return [place.path for place in marks.changed()]


class Boxes(torch.Tensor):
    """A tensor subclass, such as for bounding boxes."""


TENSORS = {
    "empty": lambda: torch.zeros(0), "one": lambda: torch.zeros(()), "three": lambda: torch.zeros(3),
    "many": lambda: torch.zeros(1000), "transposed": lambda: torch.zeros(4, 5).T,
    "channels last": lambda:
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), "part": lambda: torch.zeros(9, 9)[2:5, 1:4],
    "half": lambda: torch.zeros(5, dtype=torch.bfloat16), "bool": lambda: torch.zeros(5, dtype=torch.bool),
    "complex": lambda: torch.zeros(5, dtype=torch.complex64),
    "long complex": lambda: torch.zeros(5, dtype=torch.complex128), "double": lambda: torch.zeros(5).double(),
    "float8": lambda: torch.zeros(5).to(torch.float8_e4m3fn), "nan": lambda: torch.full((5,), NAN),
    "buffer": lambda: nn.Buffer(torch.zeros(5)), "frozen": lambda: nn.Parameter(torch.zeros(5), requires_grad=False),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_a_write_is_detected_even_through_data(name):
    tensors = {key: make() for key, make in TENSORS.items()}
    watcher = marker(*tensors.values())
    position = str(list(tensors).index(name))
    writes = [
        lambda t: t.fill_(1), lambda t: t.data.fill_(0), lambda t: t.detach().data.copy_(torch.ones(())),
        lambda t: setattr(t, "data", torch.zeros_like(t)),
    ]  # fmt: skip
    for write in writes:
        before = Marks([watcher])
        assert changed(before) == []
        write(tensors[name])
        assert changed(before) == [position]


def test_a_write_to_the_base_of_an_expanded_tensor_is_detected():
    base = torch.zeros(3, 1)
    before = Marks([marker(base.expand(3, 4))])
    assert changed(before) == []
    base.data += 1
    assert changed(before) == ["0"]


def test_samples_follow_a_tensor_to_new_memory():
    tensors = torch.zeros(100), torch.zeros(100)
    watcher = marker(*tensors)
    Marks([watcher])
    tensors[0].data = torch.zeros(50)
    before = Marks([watcher])
    assert changed(before) == []
    tensors[0].data += 1
    assert changed(before) == ["0"]


def test_a_tensor_without_memory_is_skipped():
    tensor = torch.ones(100)
    watcher = marker(tensor)
    before = Marks([watcher])
    tensor.untyped_storage().resize_(0)
    assert changed(before) == ["0"]
    assert changed(Marks([watcher])) == []


def test_parameters_are_not_sampled_until_they_are_frozen():
    weight = nn.Parameter(torch.zeros(100))
    watcher = marker(weight)
    before = Marks([watcher])
    weight.data += 1
    assert changed(before) == []
    weight.requires_grad_(False)
    before = Marks([watcher])
    weight.data += 1
    assert changed(before) == ["0"]


OTHERS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.5, 0, torch.qint8),
    "conjugated": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "subclass": lambda: torch.zeros(3).as_subclass(Boxes),
    "lazy": lambda: nn.LazyLinear(2).weight,
    "meta": lambda: torch.empty(3, device="meta"),
}  # fmt: skip


@pytest.fixture
def _tensors_of_other_kinds():
    """Without torch's warnings that some kinds are prototypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_tensors_of_other_kinds")
@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_of_tensors_of_other_kinds_a_write_is_seen_only_where_it_was(name, thorough):
    tensors = [torch.zeros(3), *(make() for make in OTHERS.values()), torch.zeros(3)]
    before = Marks([marker(*tensors, thorough=thorough)])
    assert changed(before) == []
    position = 1 + list(OTHERS).index(name)
    tensor = tensors[position]
    if name == "meta":  # has no content
        return
    if name == "lazy":
        tensor.materialize((2, 3))
    else:
        tensor.mul_(2) if name != "quantized" else tensor.copy_(torch.ones(2))
    assert changed(before) == [str(position)]


def test_a_subclass_is_sampled_on_request():
    boxes = torch.zeros(50).as_subclass(Boxes)
    boxes[7] = NAN
    before = Marks([marker(boxes, thorough=True)])
    assert changed(before) == []
    boxes.data += 1
    assert changed(before) == ["0"]


def test_moved_tensors_do_not_count():
    tensors = torch.zeros(4), torch.zeros(4)
    before = Marks([marker(*tensors)])
    for tensor in tensors:
        tensor += 1
    assert [place.path for place in before.changed(storages_of(tensors[:1]))] == ["1"]


def test_a_write_is_detected_without_samples():
    weight = nn.Parameter(torch.zeros(3))
    before = Marks([marker(weight)])
    with torch.no_grad():
        weight += 1
    assert changed(before) == ["0"]


def test_a_weight_that_is_pointed_elsewhere_is_seen_even_if_nothing_is_read():
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    before = Marks([marker(*weights)])
    weights[1].data = weights[1].data.clone()
    assert changed(before) == ["1"]


def test_of_tensors_that_are_rarely_written_only_versions_are_compared():
    tensors = [torch.zeros(3) for _ in range(3)]
    with torch.inference_mode():
        tensors.append(torch.zeros(3))  # has no version
    places = [QuietTensorPlace(tensor, str(position)) for position, tensor in enumerate(tensors)]
    before = Marks([Marker([*places, TensorPlace(torch.zeros(3), "other")])])
    assert changed(before) == []
    tensors[0].data += 1
    assert changed(before) == []
    tensors[1] += 1
    assert changed(before) == ["1"]
