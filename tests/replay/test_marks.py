"""Marks detect writes without copying tensors."""

import pytest
import torch
from torch import nn

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.marks import Marker, Marks
from lightning_gr.replay.snapshot import storages_of

NAN = float("nan")


def marker(*tensors, **options):
    return Marker([TensorPlace(tensor, str(position)) for position, tensor in enumerate(tensors)], **options)


def changed(marks):
    return [place.path for place in marks.changed()]


def sparse(tensor):
    return tensor.to_sparse()


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


@pytest.mark.filterwarnings("ignore:.*sparse.*:UserWarning", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3).to_sparse(), lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: nn.LazyLinear(2).weight, lambda: torch.empty(3, device="meta"),
        lambda: torch.zeros(3, dtype=torch.complex64).conj(), lambda: torch.zeros(3).as_subclass(Boxes),
    ],
)  # fmt: skip
def test_tensors_of_other_kinds_have_marks(make):
    assert changed(Marks([marker(make())])) == []


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
