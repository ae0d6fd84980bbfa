"""The update of each rule, its schedule and description, and values that are refused."""

import dataclasses
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr import GRRule, SAMRule
from lightning_gr.core.rules import SCHEMES, Context, Probe, Update
from lightning_gr.core.schedule import Schedule

positive = st.floats(1e-4, 1e2)
strengths = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        (GRRule(0.1, 0.2), Update("gradient", 0.5, (Probe(0.2, 0.5),))),
        (GRRule(0.1, 0.2, "backward"), Update("gradient", 1.5, (Probe(-0.2, -0.5),))),
        (GRRule(0.1, 0.2, "central"), Update("gradient", 1.0, (Probe(0.2, 0.25), Probe(-0.2, -0.25)))),
        (GRRule(0.1, 0.2, "exact"), Update("gradient", 1.0, curvature=0.1)),
        (GRRule(0.1, 0.2, normalize=True), Update("normalized", 0.5, (Probe(0.2, 0.5),))),
        (GRRule(0.1, 0.2, "exact", normalize=True), Update("normalized", 1.0, curvature=0.1)),
        (GRRule(0.2, 0.2), Update("gradient", 0.0, (Probe(0.2, 1.0),))),
        (SAMRule(0.1), Update("normalized", 0.0, (Probe(0.1, 1.0),))),
        (SAMRule(0.1, adaptive=True, eta=0.01), Update("adaptive", 0.0, (Probe(0.1, 1.0),), eta=0.01)),
    ],
)
def test_updates(rule, row):
    assert rule.update() == row
    assert not row.is_plain


@given(gamma=positive, epsilon=positive, scheme=st.sampled_from(SCHEMES), normalize=st.booleans(), strength=strengths)
def test_coefficients_of_gr_sum_to_one(gamma, epsilon, scheme, normalize, strength):
    row = GRRule(gamma, epsilon, scheme, normalize).update(Context(strength))
    largest = max(1.0, *(abs(probe.weight) for probe in row.probes)) if row.probes else 1.0
    assert row.keep + sum(probe.weight for probe in row.probes) == pytest.approx(1.0, abs=1e-15 * largest)
    # the coefficient of H d to first order, which is the same in every scheme
    curvature = row.curvature + sum(probe.distance * probe.weight for probe in row.probes)
    assert curvature == pytest.approx(strength * gamma, rel=1e-12)
    assert {abs(probe.distance) for probe in row.probes} <= {epsilon}


@given(rho=positive, adaptive=st.booleans(), strength=strengths)
def test_sam_is_one_gradient_at_the_scaled_radius(rho, adaptive, strength):
    row = SAMRule(rho, adaptive).update(Context(strength))
    assert (row.keep, row.probes, row.curvature) == (0.0, (Probe(strength * rho, 1.0),), 0.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_strength_is_plain(scheme):
    assert GRRule(0.0, 0.1, scheme).update().is_plain
    assert GRRule(0.1, 0.1, scheme).update(Context(0.0)).is_plain
    assert SAMRule(0.0).update().is_plain
    assert SAMRule(0.1).update(Context(0.0)).is_plain


def test_the_adaptive_direction_cannot_keep_the_first_gradient():
    for arguments in ({"keep": 0.5}, {"keep": 0.0, "curvature": 0.1}):
        with pytest.raises(ValueError, match="to be 0 with the adaptive direction"):
            Update("adaptive", probes=(Probe(0.1, 1.0),), **arguments)


@pytest.mark.parametrize(
    ("schedule", "due", "strength"),
    [
        (Schedule(), "11111111", [1, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule(start_step=3), "00011111", [1, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule(interval=3), "10010010", [1, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule(start_step=1, interval=2), "01010101", [1, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule(warmup_steps=4), "11111111", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        (Schedule(interval=3, lazy=True), "10010010", [3, 3, 3, 3, 3, 3, 3, 3]),
        (Schedule(interval=2, warmup_steps=4, lazy=True), "10101010", [0, 0.5, 1, 1.5, 2, 2, 2, 2]),
        (Schedule(start_step=2, interval=2, warmup_steps=4), "00101010", [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]),
    ],
)
def test_schedule(schedule, due, strength):
    assert "".join(str(int(schedule.due(step))) for step in range(8)) == due
    assert [schedule.strength(step) for step in range(8)] == strength


@pytest.mark.parametrize("rule", [GRRule(0.1, 0.2, "central", True), SAMRule(0.1, True, 0.01), Schedule(1, 2, 3)])
def test_settings_are_frozen_and_picklable(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, field.name, 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equations_name_what_is_computed(scheme, normalize):
    equation = GRRule(scheme=scheme, normalize=normalize).equation
    assert ("/‖∇L(θ)‖" in equation) == normalize
    assert ("θ + ε" in equation) == (scheme in ("forward", "central"))
    assert ("θ − ε" in equation) == (scheme in ("backward", "central"))
    assert ("H" in equation) == (scheme == "exact")
    assert "\n" not in equation
    assert "T²" in SAMRule(adaptive=True).equation
    assert "T²" not in SAMRule().equation


GRADIENT, UNIT = "∇L(θ)", "∇L(θ)/‖∇L(θ)‖"
IN_WORDS = [
    (GRRule(0.1, 0.2), "F-GR", {"γ": 0.1, "ε": 0.2}, "(1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε d)"),
    (GRRule(0.1, 0.2, "backward"), "B-GR", {"γ": 0.1, "ε": 0.2}, "(1 + γ/ε) ∇L(θ) − (γ/ε) ∇L(θ − ε d)"),
    (GRRule(0.1, 0.2, "central"), "central GR", {"γ": 0.1, "ε": 0.2}, "∇L(θ) + (γ/2ε) [∇L(θ + ε d) − ∇L(θ − ε d)]"),
    (GRRule(0.1, 0.2, "exact"), "exact GR (double backward)", {"γ": 0.1}, "∇L(θ) + γ H d"),
]


@pytest.mark.parametrize(("rule", "name", "constants", "equation"), IN_WORDS)
def test_gr_in_words(rule, name, constants, equation):
    assert (rule.name, rule.constants, rule.equation) == (name, constants, equation.replace("d", GRADIENT))
    penalty = dataclasses.replace(rule, normalize=True)
    assert (penalty.name, penalty.constants) == (f"{name}, gradient-norm penalty", constants)
    assert penalty.equation == equation.replace("d", UNIT)


def test_sam_in_words():
    sam, asam = SAMRule(0.1), SAMRule(0.1, True, 0.01)
    assert (sam.name, sam.constants) == ("SAM", {"ρ": 0.1})
    assert (asam.name, asam.constants) == ("ASAM", {"ρ": 0.1, "η": 0.01})
    assert sam.equation == "∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖)"
    assert asam.equation == "∇L(θ + ρ T²∇L/‖T∇L‖), T = |θ| + η"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (GRRule, "gamma", -0.1),
        (GRRule, "epsilon", 0.0),
        (GRRule, "scheme", "upward"),
        (GRRule, "normalize", "false"),
        (SAMRule, "rho", -0.1),
        (SAMRule, "adaptive", 1),
        (SAMRule, "eta", -0.1),
        (SAMRule, "eta", 0.1),  # without `adaptive`
        (Schedule, "start_step", -1),
        (Schedule, "interval", 0),
        (Schedule, "warmup_steps", 0.5),
        (Schedule, "lazy", 1),
    ],
)
def test_errors_name_the_argument_and_its_value(kind, name, value):
    with pytest.raises(ValueError, match=re.escape(f"`{name}`") + f".*{re.escape(repr(value))}"):
        kind(**{name: value})
