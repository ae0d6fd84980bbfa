"""Counting the steps of several optimizers separately."""

import copy
import pickle

import pytest
import torch
from modules import mlp, sgd

from lightning_gr.callbacks.step_counter import StepCounter


def ignore(regularized, due):
    """Do nothing on a step."""


@pytest.fixture
def optimizers():
    return [sgd(mlp().parameters()) for _ in range(2)]


def test_optimizers_are_counted_separately(optimizers):
    first, second = optimizers
    steps = StepCounter()
    steps.attach(optimizers, restart=True, on_step=ignore)
    for optimizer in (first, second, first, first):
        optimizer.step()
    assert (steps.count_of(first), steps.count_of(second)) == (3, 1)
    steps.detach()
    first.step()
    assert steps.made == [3, 1]


def test_continues_or_restarts(optimizers):
    steps = StepCounter()
    steps.attach(optimizers, restart=True, on_step=ignore)
    optimizers[0].step()
    steps.attach(optimizers, restart=False, on_step=ignore)
    optimizers[0].step()
    assert steps.made == [2, 0]  # attaching twice does not count twice
    steps.attach(optimizers, restart=True, on_step=ignore)
    assert steps.made == [0, 0]
    steps.attach(optimizers[:1], restart=False, on_step=ignore)
    assert steps.made == [0]


def test_a_step_that_a_gradient_scaler_skips_does_not_count(optimizers):
    optimizer, scaler = optimizers[0], torch.amp.GradScaler("cpu")
    steps = StepCounter()
    steps.attach([optimizer], restart=True, on_step=ignore)
    for bad in (0.0, float("inf"), 0.0):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, bad)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    assert steps.count_of(optimizer) == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda steps: pickle.loads(pickle.dumps(steps))])
def test_a_copy_has_the_counts_but_not_the_optimizers(optimizers, clone):
    steps = StepCounter()
    steps.attach(optimizers, restart=True, on_step=ignore)
    optimizers[1].step()
    other = clone(steps)
    optimizers[1].step()
    assert (steps.made, other.made) == ([0, 2], [0, 1])
    other.detach()
    assert steps.count_of(optimizers[1]) == 2


def test_each_step_reports_once_whether_it_was_regularized(optimizers):
    told, steps = [], StepCounter()
    steps.attach(optimizers, restart=True, on_step=lambda *noted: told.append(noted))
    first, second = optimizers
    for regularized in (True, False):  # two parts of the same step
        steps.note(first, regularized, due=True)
    steps.note(second, False, due=False)
    second.step()
    assert told == [(False, False)]
    first.step()
    assert told == [(False, False), (True, True)]
    first.step()  # without a note
    assert told == [(False, False), (True, True)]
