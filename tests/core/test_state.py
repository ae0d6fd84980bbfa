"""The state of a rule: kept by parameter, saved by name, and restored if a gradient was not finite."""

import pytest
import torch
from modules import assert_same, cross_entropy, make_batches, mlp, weights
from torch import nn

from lightning_gr import regularized_backward
from lightning_gr.core.relatives import LookSAMRule
from lightning_gr.core.state import State


def filled(net, value=1.0):
    state = State()
    params = list(net.parameters())
    with state.of(params):
        state.set("average", [torch.full_like(param, value) for param in params])
    return state


def test_a_value_is_missing_unless_every_parameter_has_one():
    net, state = mlp(), State()
    first, *others = net.parameters()
    with state.of([first]):
        assert state.get("average") is None
        state.set("average", [torch.ones_like(first)])
        assert state.get("average")[0] is state.get("average")[0]
    with state.of([first, *others]):
        assert state.get("average") is None
        assert state.get("another") is None


def test_a_new_state_has_seen_no_step():
    assert State().step == 0


def test_set_requires_a_vector_for_each_parameter():
    state = State()
    with state.of(list(mlp().parameters())), pytest.raises(ValueError, match="shorter"):
        state.set("average", [torch.ones(1)])


def test_saved_and_restored_by_name():
    net, other = mlp(), mlp()
    saved = filled(net, 2.0).state_dict(net.named_parameters())
    assert_same(saved["vectors"]["average"], {name: torch.full_like(p, 2.0) for name, p in net.named_parameters()})
    state = State()
    state.load_state_dict(saved, other.named_parameters())
    with state.of(list(other.parameters())):
        assert all((vector == 2.0).all() for vector in state.get("average"))
    with state.of(list(net.parameters())):
        assert state.get("average") is None


def test_an_interval_continues_where_it_stopped():
    """In a loop of your own, LookSAM's direction is recomputed in the same steps after a restart."""
    rule, runs = LookSAMRule(0.2, interval=3), []
    for restarts in (False, True):
        net, state = mlp(), State()
        for batch in make_batches()[:5]:
            if restarts:
                saved, state = state.state_dict(net.named_parameters()), State()
                state.load_state_dict(saved, net.named_parameters())
            net.zero_grad()
            regularized_backward(lambda net=net, batch=batch: cross_entropy(net, batch), net, rule, state=state)
            with torch.no_grad():
                torch._foreach_add_(list(net.parameters()), [p.grad for p in net.parameters()], alpha=-0.1)
        runs.append(weights(net))
    assert_same(*runs)


def test_vectors_alone_can_be_loaded():
    """As version 0.1 saved them, even if one of them is named `step`."""
    net, state = mlp(), State()
    vector = {name: torch.ones_like(param) for name, param in net.named_parameters()}
    state.load_state_dict({"average": vector, "step": vector}, net.named_parameters())
    with state.of(list(net.parameters())):
        assert all((value == 1.0).all() for name in ("average", "step") for value in state.get(name))
    assert state.step == 0


def test_unknown_parameters_are_ignored():
    saved = filled(mlp()).state_dict(mlp().named_parameters())
    assert saved == {"step": 0, "vectors": {"average": {}}}
    net = mlp()
    saved = filled(net).state_dict(net.named_parameters())
    state = State()
    state.load_state_dict(saved, nn.Sequential(net[0]).named_parameters())
    with state.of(list(net[0].parameters())):
        assert state.get("average") is not None


@pytest.mark.parametrize("finite", [True, False])
def test_restored_unless_finite(finite):
    net = mlp()
    params = list(net.parameters())
    state = filled(net)
    with state.of(params):
        before = state.snapshot()
        state.get("average")[0].fill_(5.0)
        state.set("new", [torch.full_like(param, torch.nan) for param in params])
        state.restore_unless(torch.tensor(finite), before)
        assert (state.get("average")[0] == (5.0 if finite else 1.0)).all()
        assert (state.get("average")[1] == 1.0).all()
        if finite:
            assert state.get("new")[0].isnan().all()
        else:
            assert (state.get("new")[0] == 0.0).all()
