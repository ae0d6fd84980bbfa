"""Comparisons between ranks, in a single process; system/test_faults_between_ranks.py uses two."""

import pytest
import torch
from modules import make_trainer
from torch import nn

from lightning_gr import SAM, TwoPass
from lightning_gr._compat import MisconfigurationException
from lightning_gr.callbacks.ranks import (
    check_comm_hooks,
    check_same_arguments,
    check_same_settings,
    kept_comm_states,
    may_differ,
    passes_of,
    reduction,
    sharding,
)
from lightning_gr.core.rules import GRRule, MomentumSAMRule, Probe, SAMRule, Update
from lightning_gr.core.sharding import plain_are_shards
from lightning_gr.rules import GSAMRule


@pytest.mark.parametrize(
    ("update", "count"),
    [
        (None, 0),
        (SAMRule(0.1).update(), 1),
        (GRRule(scheme="central").update(), 2),
        (GRRule(scheme="exact").update(), 1),
        (MomentumSAMRule(0.1).update(), 0),
        (Update("gradient", 1.0, (Probe(0.1, 0.0),)), 0),
    ],
)
def test_number_of_additional_passes(update, count):
    assert passes_of(update) == count


class Own(SAM):
    def should_regularize(self, step):
        return step > 2


class OwnRule(SAMRule):
    pass


@pytest.mark.parametrize(("callback", "differs"), [(SAM(0.1), False), (Own(0.1), True), (TwoPass(OwnRule(0.1)), True)])
def test_only_custom_code_may_decide_differently_on_each_rank(callback, differs):
    assert may_differ(callback, TwoPass) is differs


def test_one_process_agrees_with_itself():
    trainer = make_trainer()
    check_same_arguments(trainer, "SAM", level=0.1)
    check_same_settings(trainer, SAMRule(0.1), SAMRule(0.1).update(), SAM(0.1))


class Feedback:
    pass


class PostLocalSGDState:
    pass


def hooked(*states):
    trainer = make_trainer()
    trainer.strategy.model = nn.Linear(1, 1)
    trainer.strategy.model._comm_hooks = [(print, state) for state in states]
    return trainer


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (GRRule(scheme="exact"), r"Feedback, the state of .* use `scheme='central'`, or `ascent_sync=False`"),
        (GSAMRule(), r"use `SAM`, or a hook without a state, such as `bf16_compress_hook`"),
    ],
)
def test_methods_that_error_feedback_would_bias_are_refused(rule, message):
    with pytest.raises(MisconfigurationException, match=message):
        check_comm_hooks(hooked(Feedback()), rule.update(), local=False)
    with pytest.raises(MisconfigurationException, match=message):
        kept_comm_states(hooked(Feedback()), rule.update())
    check_comm_hooks(hooked(None, PostLocalSGDState()), rule.update(), local=False)
    check_comm_hooks(hooked(Feedback()), rule.update(), local=True)
    check_comm_hooks(hooked(Feedback()), SAMRule(0.1).update(), local=False)


@pytest.mark.parametrize(
    ("states", "local", "writes", "expected"),
    [
        ((), False, False, {"apart": False, "weighted": False, "check_finite": True}),
        ((), True, False, {"apart": False, "weighted": False, "check_finite": False}),
        ((), False, True, {"apart": True, "weighted": False, "check_finite": True}),
        ((None,), False, False, {"apart": False, "weighted": True, "check_finite": False}),
        ((Feedback(),), False, False, {"apart": True, "weighted": True, "check_finite": False}),
        ((Feedback(),), True, False, {"apart": False, "weighted": True, "check_finite": False}),
    ],
)
def test_how_gradients_are_reduced(states, local, writes, expected):
    assert reduction(hooked(*states), local, writes) == expected


def test_plain_tensors_are_whole_without_a_sharding_group():
    trainer = make_trainer()
    with sharding(trainer, None):
        assert not plain_are_shards()
    with pytest.raises(KeyError), sharding(trainer, None):
        raise KeyError
    assert torch.is_grad_enabled()
