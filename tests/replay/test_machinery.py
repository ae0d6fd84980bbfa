"""Places in the Trainer and its optimizers, of which only the necessary parts are entered."""

import types

import torch
from torch import nn

from lightning_gr.replay.machinery import BindingPlace, QuietTensorPlace, StatePlace, WriterPlace


def test_bindings_are_restored_and_only_plain_containers_entered():
    owner = types.SimpleNamespace(limit=1, loop=types.SimpleNamespace(), names=["a"])
    for containers, entered in ((True, ["x.names"]), (False, [])):
        place = BindingPlace(vars(owner), "x", containers)
        assert [path for path, _ in place.children()] == entered
        saved = place.save()
        owner.limit, owner.new = 2, 3
        assert place.differs(saved)
        place.restore(saved)
        assert owner.limit == 1
        assert not hasattr(owner, "new")


def test_dictionaries_are_watched_and_their_tensors_by_version():
    owner = types.SimpleNamespace(metrics={"loss": torch.zeros(2)})
    ((path, inner),) = BindingPlace(vars(owner), "x", True).children()
    assert path == "x.metrics"
    assert isinstance(inner, StatePlace)
    assert inner.path == path
    assert inner.is_watched
    ((path, tensor),) = inner.children()
    assert path == tensor.path == "x.metrics['loss']"


def test_an_inference_tensor_has_no_version():
    with torch.inference_mode():
        tensor = torch.zeros(2)
    assert QuietTensorPlace(tensor, "x").mark() == (0, 0)


def test_the_state_of_an_optimizer_is_entered_without_its_parameters():
    param = nn.Parameter(torch.ones(2))
    state = {param: {"step": torch.zeros(()), "count": 1}, "name": {}}
    place = StatePlace(state, "x")
    assert not place.is_watched
    (first, inner), (second, _) = place.children()
    assert (first, second) == ("x[0]", "x['name']")
    assert isinstance(inner, StatePlace)
    found = dict(inner.children())
    assert isinstance(found["x[0]['step']"], QuietTensorPlace)
    assert found["x[0]['step']"].owner is state[param]["step"]
    assert found["x[0]['count']"] == 1


def test_a_quiet_tensor_detects_writes_by_its_version():
    tensor = torch.zeros(2)
    place = QuietTensorPlace(tensor, "x")
    assert not place.is_watched
    before = place.mark()
    assert place.mark() == before
    tensor.add_(1)
    assert place.mark() != before


def test_a_writer_has_nothing_to_restore():
    place = WriterPlace(object(), "x")
    assert not place.is_watched
    place.restore(place.save())
    assert not place.differs(None)
    assert list(place.children()) == []
