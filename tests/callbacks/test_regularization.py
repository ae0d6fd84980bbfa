"""Arguments of the callbacks: their order, documentation and effect."""

import inspect
import re

import pytest
from modules import TinyModule, assert_same, fit, weights

from lightning_gr import SAM, GradientRegularization, GRRule, SAMRule

KINDS = {GradientRegularization: ["gamma", "epsilon"], SAM: ["rho"]}
OTHERS = {
    "start_step": 3, "interval": 2, "warmup_steps": 4, "lazy": True, "exclude": ["*.bias"], "ascent_sync": False,
    "accumulation": "micro_batch", "metrics": ["grad_norm"], "prefix": "x/", "prog_bar": True, "verbose": False,
    "gradient_clip": (2.0, 1.0),
}  # fmt: skip
OF_RULE = {GradientRegularization: {"scheme": "central", "normalize": True}, SAM: {"adaptive": True, "eta": 0.1}}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_constants_of_the_paper_are_positional(kind):
    parameters = inspect.signature(kind).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == KINDS[kind]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [*OF_RULE[kind], *OTHERS]


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_arguments_are_documented(kind):
    arguments = inspect.getdoc(kind).split("Args:")[1].split("Raises:")[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(inspect.signature(kind).parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_each_argument_is_used(kind):
    callback = kind(**OTHERS)
    schedule = callback.schedule
    assert (schedule.start_step, schedule.interval, schedule.warmup_steps, schedule.lazy) == (3, 2, 4, True)
    assert (callback.exclude, callback.ascent_sync, callback.accumulation) == (("*.bias",), False, "micro_batch")
    assert (callback.report.names, callback.report.log.prefix, callback.report.log.in_bar) == (
        ("grad_norm",), "x/", ("grad_norm",),
    )  # fmt: skip
    assert callback.verbose is False
    assert callback.gradient_clip == (2.0, 1.0)


def test_the_rule_has_the_arguments():
    assert GradientRegularization(0.1, 0.2, scheme="central", normalize=True).rule == GRRule(0.1, 0.2, "central", True)
    assert SAM(0.1, adaptive=True, eta=0.2).rule == SAMRule(0.1, True, 0.2)
    assert (GradientRegularization().rule, SAM().rule) == (GRRule(0.05, 0.05), SAMRule(0.05))


def test_forward_gr_with_equal_constants_is_only_sam_if_normalized():
    modules = [TinyModule() for _ in range(3)]
    callbacks = [GradientRegularization(0.1, 0.1), GradientRegularization(0.1, 0.1, normalize=True), SAM(0.1)]
    for module, callback in zip(modules, callbacks, strict=True):
        fit(module, callback)
    assert_same(weights(modules[1].net), weights(modules[2].net))
    assert any((a != b).any() for a, b in zip(modules[0].net.parameters(), modules[2].net.parameters(), strict=True))
