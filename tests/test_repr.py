"""The `repr` of callbacks."""

import pickle

import pytest

import lightning_gr
from lightning_gr import (
    SAM,
    Flooding,
    GradientNormMonitor,
    GradientRegularization,
    MomentumSAM,
    SharpnessMonitor,
    TwoPass,
    rules,
)

NAMES = {**vars(lightning_gr), **vars(rules)}
CASES = [
    (GradientRegularization(), "GradientRegularization(gamma=0.05, epsilon=0.05)"),
    (
        GradientRegularization(0.1, scheme="central"),
        "GradientRegularization(gamma=0.1, epsilon=0.05, scheme='central')",
    ),
    (SAM(0.1), "SAM(rho=0.1)"),
    (SAM(0.5, adaptive=True, eta=0.01, interval=2), "SAM(rho=0.5, adaptive=True, eta=0.01, interval=2)"),
    (SAM(0.1, metrics=["grad_norm"], prog_bar=True), "SAM(rho=0.1, metrics=['grad_norm'], prog_bar=True)"),
    (SAM(0.1, prefix="sam/", verbose=False, lazy=True), "SAM(rho=0.1, lazy=True, prefix='sam/', verbose=False)"),
    (SAM(0.1, gradient_clip=1), "SAM(rho=0.1, gradient_clip=(1.0, 1.0))"),
    (MomentumSAM(exclude=["*.bias"]), "MomentumSAM(rho=2.0, exclude=('*.bias',))"),
    (Flooding(1), "Flooding(level=1.0)"),
    (Flooding(0.1, sync=True, metrics=(), prefix="b/"), "Flooding(level=0.1, sync=True, metrics=(), prefix='b/')"),
    (TwoPass(rules.GSAMRule(0.05, 0.1)), "TwoPass(rule=GSAMRule(rho=0.05, alpha=0.1))"),
    (GradientNormMonitor(), "GradientNormMonitor()"),
    (GradientNormMonitor(True, prefix="g/"), "GradientNormMonitor(by_layer=True, prefix='g/')"),
    (SharpnessMonitor(5, trace=False), "SharpnessMonitor(every_n_epochs=5, trace=False)"),
]


@pytest.mark.parametrize(("callback", "said"), CASES, ids=[said for _, said in CASES])
def test_repr_is_the_code_to_create_the_callback(callback, said):
    assert repr(callback) == str(callback) == said
    assert repr(eval(said, NAMES)) == said
    assert repr(pickle.loads(pickle.dumps(callback))) == said


class Own(SAM):
    def __init__(self, when, **kwargs):
        super().__init__(**kwargs)
        self.when = when


class Forgets(SAM):
    def __init__(self, when):
        super().__init__(when / 10)


def test_subclasses():
    assert repr(Own(3, rho=0.2, interval=2)) == "Own(when=3, rho=0.2, interval=2)"
    assert repr(Forgets(1)) == "Forgets()"


def test_a_callback_whose_constructor_raised():
    half = SAM.__new__(SAM)
    assert repr(half) == "SAM()"
