"""Each kind of content: saving does not change it, changes are detected, and restoring leaves no trace."""

import contextvars
import ctypes
import io
import multiprocessing
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gr.core.hooks import OwnHook
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
    tensors += [torch.zeros(()).expand(size) for size in (1, 10, 100)]
    before = contents.sample(tensors)
    assert contents.sample(tensors) == before
    for position, tensor in enumerate(tensors[1:], start=1):
        written = tensor.data[:1] if 0 in tensor.stride() else tensor.data
        written += 1
        now = contents.sample(tensors)
        assert now[position] != before[position]
        written -= 1


@pytest.mark.parametrize("make", [lambda: torch.zeros(100), lambda: torch.zeros(10, 10).T])
def test_a_sample_is_of_entries_far_apart(make):
    tensor = make()
    before = contents.sample([tensor])
    for rows in (slice(0, 5), slice(5, 10)):
        tensor.view(10, 10)[rows] = 1
        assert contents.sample([tensor]) != before
        tensor.zero_()


@pytest.mark.parametrize("make", [lambda: torch.zeros(()), lambda: torch.zeros(8), lambda: torch.zeros(4, 2).T])
def test_of_a_tensor_with_few_entries_a_sample_is_all_of_them(make):
    tensor = make()
    before = contents.sample([tensor])
    for position in np.ndindex(*tensor.shape):
        tensor.data[position] = 1
        assert contents.sample([tensor]) != before
        tensor.data[position] = 0
    assert contents.sample([tensor]) == before


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


def test_a_context_variable_is_put_back_if_it_had_a_value():
    variable = contextvars.ContextVar("variable")
    place = contents.SettablePlace(variable, "x")
    unset = place.save()
    variable.set([1])
    saved = place.save()
    variable.set([2])
    place.restore(unset)  # nothing can take its value away
    assert variable.get() == [2]
    place.restore(saved)
    assert variable.get() == [1]


# --- arrays


@pytest.mark.parametrize(
    "make",
    [lambda: np.zeros(3), lambda: np.zeros(1000), lambda: np.zeros((30, 40)).T, lambda: np.zeros(30)[::2],
     lambda: np.zeros(()), lambda: np.zeros(0)],
)  # fmt: skip
def test_the_mark_of_an_array_tells_of_a_write_to_all_of_it_and_of_another_shape(make):
    array = make()
    place = contents.ArrayPlace(array, "x")
    mark = place.mark()
    assert place.mark() == mark
    array += 1
    assert (place.mark() != mark) == (array.size > 0)
    array -= 1
    assert place.mark() == mark
    assert contents.ArrayPlace(array[None], "x").mark() != mark


def test_the_mark_of_a_large_array_is_of_entries_far_apart():
    array = np.zeros(1000)
    place = contents.ArrayPlace(array, "x")
    mark = place.mark()
    array[:100] = 1
    assert place.mark() != mark
    array[:100], array[500:700] = 0, 1
    assert place.mark() != mark


def test_an_array_leads_to_the_objects_in_it():
    one, other = [1], [2]
    plain = contents.ArrayPlace(np.array([[one, None], [None, other], [1, 2]], dtype=object), "x")
    assert dict(plain.children()) == {"x[0]": one, "x[1]": None, "x[2]": None, "x[3]": other, "x[4]": 1, "x[5]": 2}
    structured = np.zeros(1, dtype=[("number", "f8"), ("object", object)])
    structured["object"][0] = one
    ((path, column),) = contents.ArrayPlace(structured, "x").children()
    assert path == "x['object']"
    assert column[0] is one
    assert list(contents.ArrayPlace(np.zeros(3), "x").children()) == []


def test_an_array_that_has_grown_or_got_another_shape_is_put_back():
    array = np.arange(6.0).reshape(2, 3)
    place = contents.ArrayPlace(array, "x")
    saved = place.save()
    array.shape = (3, 2)
    assert place.differs(saved)
    place.restore(saved)
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


# --- tensors


def point_at(make):
    """Point a tensor elsewhere, or at its own memory in another way."""
    return lambda tensor: setattr(tensor, "data", make(tensor.data))


ELSEWHERE = {
    "other memory": point_at(torch.clone),
    "other strides": point_at(torch.t),
    "another shape": point_at(lambda t: t.view(-1)[:4]),
    "another type": point_at(lambda t: t.view(torch.int32)),
    "a part": point_at(lambda t: t[1:]),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_tensor_that_is_pointed_elsewhere_is_pointed_back(name):
    tensor = torch.arange(9.0).view(3, 3)
    place, address, view = contents.TensorPlace(tensor, "x"), tensor.data_ptr(), tensor.data[0]
    saved = place.save()
    ELSEWHERE[name](tensor)
    tensor.data.mul_(2)
    place.restore(saved)
    assert tensor.dtype == torch.float32
    assert tensor.data_ptr() == address
    assert tensor.stride() == (3, 1)
    assert torch.equal(tensor, torch.arange(9.0).view(3, 3))
    view += 1  # it is still one
    assert tensor[0].tolist() == [1, 2, 3]


def test_of_a_large_weight_no_other_memory_is_held():
    weight, small = nn.Parameter(torch.zeros(2000)), nn.Parameter(torch.zeros(3))
    for param, held in ((weight, False), (small, True), (weight.detach(), True)):
        saved = contents.TensorPlace(param, "x").save()
        assert (saved.alias is not None) == held
        assert not saved.value.requires_grad
    place, address = contents.TensorPlace(weight, "x"), weight.data_ptr()
    saved = place.save()
    weight.data += 1
    place.restore(saved)
    assert not weight.any()
    assert weight.data_ptr() == address
    weight.data = torch.ones(5)
    place.restore(saved)
    assert torch.equal(weight, torch.zeros(2000))


OTHERS = {
    "expanded": lambda: torch.arange(3.0).view(3, 1).expand(3, 4),
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(3.0), 0.5, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "sparse columns": lambda: torch.eye(3).to_sparse_csc(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_tensors_of_other_kinds_are_put_back(name):
    tensor = OTHERS[name]()
    assert not contents.is_plain(tensor) or name == "expanded"
    place, before = contents.TensorPlace(tensor, "x"), digests([tensor])
    saved = place.save()
    part = contents.dense_parts(tensor.data)[-1]
    part = part[:, :1] if name == "expanded" else part
    part.copy_(torch.zeros(part.shape))
    assert digests([tensor]) != before
    for _ in range(2):
        place.restore(saved)
        assert digests([tensor]) == before


def test_a_sparse_tensor_that_is_pointed_elsewhere_is_put_back():
    tensor = torch.eye(3).to_sparse()
    place, before = contents.TensorPlace(tensor, "x"), digests([tensor])
    saved = place.save()
    tensor.data = torch.ones(3, 3).to_sparse()
    assert digests([tensor]) != before
    place.restore(saved)
    assert digests([tensor]) == before


def test_only_dense_tensors_of_torch_are_plain():
    assert all(map(contents.is_plain, (torch.zeros(2), nn.Parameter(torch.zeros(2)), nn.Buffer(torch.zeros(2)))))
    with torch.inference_mode():
        frozen = torch.zeros(2)
    others = [frozen, torch.zeros(2).as_subclass(Refuses), nn.LazyLinear(2).weight, torch.empty(3, device="meta")]
    assert not any(map(contents.is_plain, others))


def test_the_mark_of_a_tensor_that_has_no_version_or_no_address():
    with torch.inference_mode():
        frozen = torch.zeros(2)
    sparse, lazy = torch.eye(3).to_sparse(), nn.LazyLinear(2).weight
    places = [contents.TensorPlace(tensor, "x") for tensor in (frozen, sparse, lazy)]
    marks = [place.mark() for place in places]
    assert [place.mark() for place in places] == marks
    sparse.mul_(2)
    lazy.materialize((2, 3))
    assert places[1].mark() != marks[1]
    assert places[2].mark() != marks[2]


# --- flags and hooks


def test_flags_are_put_back_where_that_is_possible():
    tensors = [torch.zeros(2), torch.zeros(2, requires_grad=True), torch.zeros(2)]
    place = contents.FlagsPlace(tensors, "x")
    saved = place.save()
    assert saved == [False, True, False]
    assert not place.differs(saved)
    tensors[0].requires_grad_()
    tensors[1].requires_grad_(False)
    tensors[2] += tensors[0].sum()  # a result of a graph from now on
    assert place.differs(saved)
    place.restore(saved)
    assert place.save() == [False, True, True]


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_the_hooks_of_a_weight_are_put_back_but_not_those_of_the_package(register):
    weight, ran = nn.Parameter(torch.ones(1)), []
    place = contents.HooksPlace(contents.Hooked(weight), "x")
    assert not place.is_watched
    first = getattr(weight, register)(lambda _: ran.append("first"))
    hook = place.values()[0]
    assert place.children() == [("x.hook", hook)]
    saved = place.save()
    assert not place.differs(saved)
    own = getattr(weight, register)(OwnHook())
    assert not place.differs(saved)
    getattr(weight, register)(lambda _: ran.append("second"))
    assert place.differs(saved)
    place.restore(saved)
    assert not place.differs(saved)
    (weight * 2).sum().backward()
    assert ran == ["first"]
    assert any(own.id in table for table in place._tables())
    first.remove()
    assert place.differs(saved)
    place.restore(saved)
    (weight * 2).sum().backward()
    assert ran == ["first"] * 2


def test_a_lazy_module_stays_initialized():
    layer = nn.LazyLinear(2)
    place = contents.LazyPlace(layer, "x")
    saved = place.save()
    assert not place.differs(saved)
    layer(torch.zeros(1, 3))
    assert place.differs(saved)
    place.restore(saved)
    assert not contents.is_uninitialized(layer)
    assert not contents.is_uninitialized(nn.Linear(1, 1))
