"""The state of a rule is saved in checkpoints, but not in copies of the callback."""

import copy

import torch
from modules import TinyModule, make_trainer

from lightning_gr.callbacks.rule_state import RuleState


def filled(module):
    state = RuleState()
    state.begin(make_trainer(), module)
    params = list(module.parameters())
    with state.vectors.of(params):
        state.vectors.set("average", [torch.full_like(p, 2.0) for p in params])
    return state


def test_continues_from_loaded_state():
    module = TinyModule()
    saved = filled(module).state_dict()
    other = RuleState()
    assert other.state_dict() == {}
    other.load_state_dict(saved)
    other.begin(make_trainer(), module)
    params = list(module.parameters())
    with other.vectors.of(params):
        assert all((value == 2.0).all() for value in other.vectors.get("average"))


def test_new_runs_and_copies_have_no_state():
    module = TinyModule()
    state = filled(module)
    assert copy.deepcopy(state).state_dict() == {}
    state.begin(make_trainer(), module)
    assert state.state_dict() == {}
