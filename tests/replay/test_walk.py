"""What a search from a module reaches, and what it does not enter."""

import functools
import logging
import types
from collections import UserDict
from dataclasses import dataclass, field

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_gr.replay.places import MOST_ENTRIES
from lightning_gr.replay.walk import walk


def owners(**roots):
    return [place.owner for place in walk(roots)]


def is_found(target, **roots):
    return any(owner is target for owner in owners(**roots))


# --- what can be reached


@dataclass
class Data:
    inner: dict = field(default_factory=dict)


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Object:
    def __init__(self, inner):
        self.inner = inner

    def method(self):
        return self.inner


class Function(torch.autograd.Function):
    pass


def captured(target):
    return lambda: target


def by_default(target):
    def function(x=target):
        return x

    return function


def with_attribute(target):
    def function():
        return None

    function.note = target
    return function


def with_hook(target):
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(captured(target))
    return layer


WAYS = {
    "list": lambda t: [t], "tuple": lambda t: (1, (t,)), "dict": lambda t: {"a": {"b": t}},
    "UserDict": lambda t: UserDict(a=t),
    "dataclass": lambda t: Data({"x": t}), "slots": Slots, "object": Object, "method": lambda t: Object(t).method,
    "closure": captured, "closure of a closure": lambda t: captured(captured(t)), "default": by_default,
    "attribute of a function": with_attribute, "partial": lambda t: functools.partial(print, t, x=1),
    "keyword of a partial": lambda t: functools.partial(print, x=t), "hook": with_hook,
    "class attribute": lambda t: type("Own", (), {"shared": t})(),
    "array of objects": lambda t: np.array([t, None], dtype=object),
    "namespace": lambda t: types.SimpleNamespace(x=t), "list subclass": lambda t: type("L", (list,), {})([t]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_is_reached_by(way):
    target = {"a": 1}
    assert is_found(target, self=WAYS[way](target))
    module = nn.Module()
    module.x = WAYS[way](target)
    assert is_found(target, self=module)


@pytest.mark.parametrize(
    "wrap",
    [
        logging.getLogger, type("DataLoader", (Object,), {}),
        type("MyTrainer", (type("Trainer", (Object,), {}),), {}),
        lambda t: dict.fromkeys(range(MOST_ENTRIES + 1), t),
    ],
)  # fmt: skip
def test_is_not_entered(wrap):
    target = {"a": 1}
    value = wrap("x") if wrap is logging.getLogger else wrap(target)
    assert not is_found(target, self={"value": value})


def test_module_objects_and_closed_objects_are_not_entered():
    target, record = [1], types.ModuleType("record")
    record.items = target
    assert not is_found(target, self=[record])
    assert not any(place.owner is target for place in walk({"self": [target]}, closed=[target]))


def test_no_property_runs_and_reference_cycles_end():
    class Loud:
        def __init__(self):
            self.itself = self

        @property
        def bad(self):
            raise AssertionError("a property was read")

        def __getattr__(self, name):
            raise AssertionError("an attribute was asked for")

    assert len(owners(self=Loud())) > 0


def test_hidden_attributes_of_a_lightning_module():
    module = pl.LightningModule()
    module.mine, module.theirs = {"a": 1}, {"b": 1}
    found = [place.owner for place in walk({"self": module}, frozenset({"theirs"}))]
    assert any(owner is module.mine for owner in found)
    assert not any(owner is module.theirs for owner in found)


class Plain:
    shared = 1


def test_paths_read_like_code():
    net = nn.Sequential(nn.Linear(1, 1))
    net.extra = {"k": [Plain()]}
    paths = [place.path for place in walk({"self": net})]
    assert {"self.0.weight", "self.extra['k'][0]", "self.extra['k'][0].Plain"} <= set(paths)
