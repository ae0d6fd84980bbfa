"""The state of communication hooks is restored in place, whatever it consists of."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_gr.core.comm_states import CommStates


class Slotted:
    __slots__ = ("count", "group")

    def __init__(self):
        self.count, self.group = 3, object()


class Own:
    def __init__(self):
        self.error, self.seen, self.by_name = torch.ones(3), [1, torch.zeros(2)], {"q": torch.ones(2), 0: "a"}
        self.rng, self.generator = np.random.RandomState(0), torch.Generator().manual_seed(0)
        self.inner, self.itself, self.layer = Slotted(), self, nn.Linear(1, 1)


def test_everything_is_restored():
    own, slotted = Own(), Slotted()
    group, error, inner = slotted.group, own.error, own.inner
    kept = CommStates([own, slotted])
    for _ in range(2):  # it can be restored several times
        expected = np.random.RandomState(0).rand(), torch.rand(1, generator=torch.Generator().manual_seed(0))
        slotted.count, own.inner.count = 9, 8
        own.error.add_(5)
        own.error = torch.zeros(1)
        own.seen[1].add_(1)
        own.seen.append(2)
        own.by_name["q"].mul_(3)
        own.by_name[1] = own.by_name.pop(0)
        own.rng.rand()
        torch.rand(1, generator=own.generator)
        kept.restore()
        assert slotted.count == 3
        assert own.inner is inner
        assert inner.count == 3
        assert slotted.group is group
        assert own.error is error
        assert own.error.tolist() == [1.0, 1.0, 1.0]
        assert len(own.seen) == 2
        assert own.seen[1].tolist() == [0.0, 0.0]
        assert list(own.by_name) == ["q", 0]
        assert own.by_name["q"].tolist() == [1.0, 1.0]
        assert (own.rng.rand(), torch.rand(1, generator=own.generator)) == expected
        kept.restore()


def test_numbers_and_layers_are_not_saved():
    layer = nn.Linear(1, 1)
    kept = CommStates([True, "group", layer])
    with torch.no_grad():
        layer.weight.fill_(7.0)
    kept.restore()
    assert layer.weight.item() == 7.0


def test_objects_of_others_are_not_entered():
    """A hook may refer to the module, the optimizer or the Trainer, whose changes must not be undone."""
    net, trainer = nn.Linear(1, 1), Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = {"net": net, "optimizer": optimizer, "trainer": trainer, "torch": torch, "weight": net.weight}
    kept = CommStates([state])
    optimizer.param_groups[0]["lr"], trainer.should_stop = 0.2, True
    state["net"] = None
    with torch.no_grad():
        net.weight.fill_(7.0)
    kept.restore()
    assert state["net"] is net
    assert net.weight.item() == 7.0
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert trainer.should_stop


class Private:
    __slots__ = ("__count",)

    def __init__(self):
        self.__count = 3

    def add(self):
        self.__count += 1

    def __repr__(self):
        return f"Private({self.__count})"


class Derived(Private):
    __slots__ = "other"  # which has no value yet


KINDS = {
    "tuple": (lambda: (torch.ones(2), [1]), lambda x: (x[0].add_(1), x[1].append(2))),
    "tuple of tuples": (lambda: ((torch.ones(2),), 1), lambda x: x[0][0].mul_(2)),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda x: x.append(3)),
    "set": (lambda: {1, 2}, lambda x: x.add(3)),
    "array": (lambda: np.zeros(2), lambda x: x.__setitem__(1, 3.0)),
    "array that grows": (lambda: np.zeros(2), lambda x: x.resize(5, refcheck=False)),
    "private slot": (Private, Private.add),
    "private slot of a base": (Derived, Private.add),
}


@pytest.mark.parametrize("kind", KINDS)
def test_containers_and_objects_of_all_kinds_are_restored(kind):
    make, change = KINDS[kind]
    value = make()
    kept = CommStates([{"inner": value}])
    before = repr(value)
    for _ in range(2):
        change(value)
        assert repr(value) != before
        kept.restore()
        assert repr(value) == before


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: np.random.default_rng(0), lambda generator: generator.random()),
        (lambda: np.random.RandomState(0), lambda generator: generator.rand()),
        (lambda: random.Random(0), lambda generator: generator.random()),
        (torch.Generator, lambda generator: torch.rand((), generator=generator).item()),
    ],
)
def test_generators_go_on_from_where_they_were(make, draw):
    generator = make()
    draw(generator)
    kept = CommStates([generator])
    drawn = draw(generator)
    for _ in range(2):
        kept.restore()
        assert draw(generator) == drawn
