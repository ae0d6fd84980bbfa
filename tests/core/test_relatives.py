"""GSAM, Friendly-SAM and LookSAM: their constants, and what they compute. As callbacks: system/test_family.py."""

import pickle

import pytest
import reference
import torch
from modules import STATEFUL, assert_near, cross_entropy, gradients, make_batches, mlp, sgd, weights

from lightning_gr import SAMRule, regularized_backward
from lightning_gr.core.rules import Context
from lightning_gr.rules import FriendlySAMRule, GSAMRule, LookSAMRule, MomentumSAMRule, State, Update


def gradient(rule, **options):
    net = mlp()
    regularized_backward(lambda: cross_entropy(net, make_batches()[0]), net, rule, **options)
    return gradients(net)


@pytest.mark.parametrize("rule", [GSAMRule(0.2, 0.0), FriendlySAMRule(0.2, 0.0), LookSAMRule(0.2, interval=1)])
def test_special_cases_equal_sam(rule):
    state = State()
    for _ in range(2):
        assert_near(gradient(rule, state=state), gradient(SAMRule(0.2)))


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", STATEFUL)
def test_training_equals_the_reference(name, scale):
    net, batches, state = mlp(), make_batches() * 2, State()
    optimizer, loss_scale = sgd(net.parameters()), None if scale is None else torch.tensor(scale, dtype=torch.float64)
    for batch in batches:
        optimizer.zero_grad()
        options = {"optimizer": optimizer, "state": state, "loss_scale": loss_scale}
        regularized_backward(lambda batch=batch: cross_entropy(net, batch), net, STATEFUL[name].rule, **options)
        for param in net.parameters():
            param.grad /= scale or 1.0
        optimizer.step()
    losses = [reference.loss_of(mlp(), cross_entropy, [batch]) for batch in batches]
    expected = reference.train_with(mlp(), losses, reference.SGD(), STATEFUL[name].reference())
    assert_near(weights(net), expected)


def test_looksam_may_begin_between_its_second_passes():
    """It then has nothing to use again, and its gradient is the clean one."""
    state = State()
    state.step = 1
    assert_near(gradient(LookSAMRule(0.2, interval=3), state=state), gradient(SAMRule(0.0)))


@pytest.mark.parametrize("make", [GSAMRule, FriendlySAMRule, LookSAMRule])
def test_strength_scales_the_radius(make):
    for strength in (1.0, 0.25):
        (probe,) = make(0.2).update(Context(strength)).probes
        assert probe == (0.2 * strength, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GSAMRule(-1.0), "`rho` to be a non-negative float but got -1.0"),
        (lambda: GSAMRule(alpha="x"), "`alpha` to be a non-negative float but got 'x'"),
        (lambda: FriendlySAMRule(sigma=-1.0), "`sigma` to be a non-negative float but got -1.0"),
        (lambda: FriendlySAMRule(decay=1.0), "`decay` to be below 1 but got 1.0"),
        (lambda: LookSAMRule(interval=0), "`interval` to be an integer of at least 1 but got 0"),
        (lambda: MomentumSAMRule(True), "`rho` to be a non-negative float but got True"),
    ],
)
def test_wrong_constants_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", STATEFUL)
def test_rules_describe_themselves(name):
    rule = STATEFUL[name].rule
    assert rule.name == name
    assert "θ" in rule.equation or "g₁" in rule.equation
    assert all(isinstance(value, (int, float)) for value in rule.constants.values())
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert not rule.update().is_plain


def test_looksam_makes_a_second_pass_on_every_kth_step():
    rule = LookSAMRule(interval=3)
    assert [len(rule.update(Context(step=step)).probes) for step in range(7)] == [1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"turn": print, "keep": 1.0},
        {"turn": print, "keep": 0.0, "combine": print},
        {"turn": print, "keep": 0.0, "clip": (1.0, 1.0)},
        {"combine": print, "keep": 0.0, "curvature": 1.0},
        {"clip": (1.0, 1.0), "keep": 0.0, "curvature": 1.0},
        {"ahead": 1.0, "keep": 0.5},
    ],
)
def test_incompatible_parts_of_an_update_are_refused(options):
    with pytest.raises(ValueError, match=r"^Expected "):
        Update("gradient", **options)
