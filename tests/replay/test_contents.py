"""Each kind of content: saving does not change it, changes are detected, and restoring leaves no trace."""

import ctypes
import io
import multiprocessing
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gr.replay import contents
from lightning_gr.replay.digest import digests

ARRAYS = {
    "numpy": (lambda: np.arange(4.0), lambda a: a.__setitem__(1, 9)),
    "numpy, resized": (lambda: np.arange(4.0), lambda a: a.resize((6,), refcheck=False)),
    "numpy, objects": (lambda: np.array([None, "a"]), lambda a: a.__setitem__(0, "b")),
    "numpy, structured": (
        lambda: np.zeros(2, dtype=[("a", "f8"), ("b", "i4")]),
        lambda a: a["b"].fill(3),
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_saved_changed_and_restored(name):
    make, change = ARRAYS[name]
    owner = make()
    before, place = repr(owner), contents.ArrayPlace(owner, "x")
    saved = place.save()
    assert not place.differs(saved)
    change(owner)
    assert place.differs(saved)
    for _ in range(2):
        place.restore(saved)
        assert repr(owner) == before
        assert not place.differs(saved)
    change(owner)  # must not change the saved copy
    place.restore(saved)
    assert repr(owner) == before


def test_nan_in_an_array_is_equal_to_itself():
    place = contents.ArrayPlace(np.array([np.nan, 1.0]), "x")
    assert not place.differs(place.save())


GENERATORS = [
    (torch.Generator, lambda g: torch.rand(3, generator=g).tolist()),
    (lambda: np.random.default_rng(0), lambda g: g.random(3).tolist()),
    (lambda: np.random.RandomState(0), lambda g: g.randn(3).tolist()),
    (lambda: np.random.PCG64(0), lambda g: g.random_raw(3).tolist()),
    (lambda: random.Random(0), lambda g: [g.gauss(0, 1) for _ in range(3)]),
]


@pytest.mark.parametrize(("make", "draw"), GENERATORS)
def test_generators_continue_from_the_saved_state(make, draw):
    generator = make()
    assert isinstance(generator, contents.STATES)
    place = contents.SettablePlace(generator, "x")
    draw(generator)
    saved = place.save()
    drawn = draw(generator)
    place.restore(saved)
    assert draw(generator) == drawn


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(6.0).view(2, 3),
        lambda: torch.arange(6.0).view(2, 3).T,
        lambda: torch.arange(6),
        lambda: torch.randn(3, dtype=torch.complex64),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: nn.Parameter(torch.ones(3)),
    ],
)
def test_tensors_are_restored_in_place(make):
    tensor = make()
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach().clone()
    place, mark = contents.TensorPlace(tensor, "x"), contents.TensorPlace(tensor, "x").mark()
    saved = place.save()
    with torch.no_grad():
        if tensor.layout == torch.strided:
            tensor.add_(1)
            assert place.mark() != mark
        else:
            tensor.data = 2 * tensor
    place.restore(saved)
    assert torch.equal(tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach(), dense)
    assert place.owner is tensor


def test_resized_tensors_and_inference_tensors_are_restored():
    tensor = torch.zeros(2)
    saved = tensor.clone()
    tensor.resize_(5).fill_(3.0)
    contents.restore_tensors([tensor], [contents.Content(saved)])
    assert tensor.tolist() == [0.0, 0.0]
    with torch.inference_mode():
        frozen = torch.zeros(2)
        saved = frozen.clone()
        frozen += 1
    contents.restore_tensors([frozen], [contents.Content(saved)])
    assert frozen.tolist() == [0.0, 0.0]


def test_lazy_tensors_have_nothing_to_save():
    for tensor in (nn.LazyLinear(2).weight, torch.empty(3, device="meta")):
        place = contents.TensorPlace(tensor, "x")
        assert contents.is_lazy(tensor)
        assert place.save() is None
        place.restore(None)


def test_a_sample_detects_a_write_through_data():
    tensors = [torch.zeros(0), torch.zeros(3), torch.zeros(1000), torch.zeros(4, 5).T]
    before = contents.sample(tensors)
    assert contents.sample(tensors) == before
    for position, tensor in enumerate(tensors[1:], start=1):
        tensor.data += 1
        now = contents.sample(tensors)
        assert now[position] != before[position]
        tensor.data -= 1


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: ctypes.c_int(3), lambda number: setattr(number, "value", 4)),
        (lambda: (ctypes.c_double * 2)(1.0, 2.0), lambda numbers: numbers.__setitem__(1, 5.0)),
        (lambda: multiprocessing.Value("i", 3).get_obj(), lambda number: setattr(number, "value", 4)),
    ],
)
def test_ctypes_values_are_restored(make, change):
    owner = make()
    before, place = bytes(owner), contents.SettablePlace(owner, "x")
    saved = place.save()
    assert place.is_watched
    change(owner)
    assert bytes(owner) != before
    place.restore(saved)
    assert bytes(owner) == before


def test_a_large_ctypes_array_is_only_saved_once_it_has_changed():
    assert not contents.SettablePlace((ctypes.c_double * 10_000)(), "x").is_watched


class Refuses(torch.Tensor):
    def clone(self):
        raise TypeError("refused")

    detach = reshape = flatten = copy_ = resize_ = clone


@pytest.mark.parametrize("change", [lambda t: t.mul_(2.0), lambda t: torch.Tensor.resize_(t, 5)])
def test_a_tensor_subclass_that_rejects_methods_is_restored(change):
    owner = torch.arange(3.0).as_subclass(Refuses)
    place = contents.TensorPlace(owner, "x")
    saved = place.save()
    assert not place.has_changed(saved)
    assert contents.sample([owner]) == contents.sample([torch.arange(3.0)])
    before = digests([owner])
    change(owner)
    assert digests([owner]) != before
    place.restore(saved)
    assert type(owner) is Refuses
    assert digests([owner]) == before


@pytest.mark.parametrize("kind", [io.StringIO, io.BytesIO])
def test_files_in_memory_may_be_closed(kind):
    stream = kind()
    place = contents.SettablePlace(stream, "x")
    saved = place.save()
    stream.write("a" if kind is io.StringIO else b"a")
    place.restore(saved)
    assert len(stream.getvalue()) == stream.tell() == 0
    stream.close()
    place.restore(saved)
    place.restore(place.save())
    assert stream.closed
