"""What ranks compare, in one process; what happens between them is in system/test_faults_between_ranks.py."""

import pytest
import torch
from modules import make_trainer

from lightning_gr import SAM, TwoPass
from lightning_gr.callbacks.ranks import check_same_arguments, check_same_settings, may_differ, passes_of, sharding
from lightning_gr.core.rules import GRRule, MomentumSAMRule, Probe, SAMRule, Update
from lightning_gr.core.sharding import plain_are_shards


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
def test_number_of_times_that_a_window_is_made_again(update, count):
    assert passes_of(update) == count


class Own(SAM):
    def should_regularize(self, step):
        return step > 2


class OwnRule(SAMRule):
    pass


@pytest.mark.parametrize(("callback", "differs"), [(SAM(0.1), False), (Own(0.1), True), (TwoPass(OwnRule(0.1)), True)])
def test_only_code_of_the_users_may_decide_differently(callback, differs):
    assert may_differ(callback, TwoPass) is differs


def test_one_process_agrees_with_itself():
    trainer = make_trainer()
    check_same_arguments(trainer, "SAM", 0.1)
    check_same_settings(trainer, SAMRule(0.1), SAMRule(0.1).update(), "schedule")


def test_plain_tensors_are_whole_unless_a_group_shares_them():
    trainer = make_trainer()
    with sharding(trainer, None):
        assert not plain_are_shards()
    with pytest.raises(KeyError), sharding(trainer, None):
        raise KeyError
    assert torch.is_grad_enabled()
