"""Tests of the oracle, against values computed by hand, and of the comparison that the contract tests rely on."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from contract import FORMS, Situation, as_dict, train
from fingerprints import differences, fingerprint
from oracle import FGR, HUGE, Method, by_hand, forward, sam


class Parabola(Situation):
    """L = w²/2 at w = 2."""

    def prepare(self):
        self.net = torch.nn.Linear(1, 1, bias=False).double()
        self.net.weight.data.fill_(2.0)

    def step(self, batch):
        return self.net.weight.square().sum() / 2


class Inner(Parabola):
    """A step with an inner backward pass."""

    def step(self, batch):
        (5 * self.net.weight).sum().backward()
        return super().step(batch)


@pytest.mark.parametrize("form", FORMS)
def test_forward_differences_and_sam(form):
    method, share = forward(0.1, 1.0), 1.0
    assert float(by_hand(Parabola, form, method, 0.0).gradients[0]["net.weight"]) == pytest.approx(2.2 * share)
    assert float(by_hand(Parabola, form, sam(0.5), 0.0).gradients[0]["net.weight"]) == pytest.approx(2.5)


@pytest.mark.parametrize(("form", "value"), [("automatic", 2.2), ("accumulation", 13.2), ("functional", 7.7)])
def test_an_inner_backward_pass(form, value):
    assert float(by_hand(Inner, form, forward(0.1, 1.0), 0.0).gradients[0]["net.weight"]) == pytest.approx(value)


class Counts(Parabola):
    def prepare(self):
        super().prepare()
        self.calls, self.seen = Counter(), []

    def step(self, batch):
        self.calls["step"] += 1
        self.seen.append(torch.rand(()).item())
        return super().step(batch) * self.seen[-1]


@pytest.mark.parametrize("form", FORMS)
def test_the_first_pass_by_hand_is_that_of_lightning(form):
    """A second pass with weight zero gives plain training."""
    zero = Method(1.0, ((0.1, 0.0),), True, None)
    found, plain = by_hand(Counts, form, zero, 0.1), train(Counts, form, lr=0.1)
    assert differences(found.state, plain.state) == []
    assert differences(as_dict(found.gradients), as_dict(plain.gradients), 1e-12) == []
    assert by_hand(Counts, form, HUGE, 0.0).state.keys() == plain.state.keys()
    assert differences(by_hand(Counts, form, FGR, 0.1).state, plain.state) != []


class Box:
    """An object with many kinds of state."""

    def __init__(self):
        self.tensor, self.array, self.deep = torch.zeros(3), np.zeros(3), [[{"a": (1, [2])}]]
        self.gen, self.rng = torch.Generator(), np.random.default_rng(0)
        self.counter, self.other = Counter("ab"), self.tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda box: box.tensor.data.add_(1),
        lambda box: box.array.__setitem__(0, 1.0),
        lambda box: box.deep[0][0]["a"][1].append(3),
        lambda box: torch.rand((), generator=box.gen),
        lambda box: box.rng.normal(),
        lambda box: box.counter.update("a"),
        lambda box: setattr(box, "other", box.tensor.clone()),
        lambda box: setattr(box, "new", None),
        lambda box: delattr(box, "counter"),
        lambda box: setattr(box.tensor, "mark", 1),
    ],
)
def test_the_comparison_detects_changes(change):
    box = Box()
    before = fingerprint(box)
    assert differences(fingerprint(copy.deepcopy(box)), before) == []
    change(box)
    assert differences(fingerprint(box), before) != []
