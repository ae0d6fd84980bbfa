"""GSAM, Friendly-SAM and LookSAM: their constants and special cases. What they compute: system/test_family.py."""

import pickle

import pytest
from modules import STATEFUL, assert_near, cross_entropy, gradients, make_batches, mlp

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
