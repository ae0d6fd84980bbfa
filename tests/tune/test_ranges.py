"""The range test of whole programs."""

import json

import pytest
from tuned import Data, Problem

from lightning_gr.tune.ranges import Range, range_test
from lightning_gr.tune.space import TuneError

FLAGS = {"accelerator": "cpu", "max_epochs": 1}


@pytest.fixture(scope="module")
def found():
    return range_test(Problem, Data, methods=["F-GR", "SAM", "MomentumSAM", "flooding"], trainer=FLAGS, warmup_steps=6)


def test_each_method_has_bounds_and_a_suggestion_within_them(found):
    assert list(found) == ["F-GR", "SAM", "MomentumSAM", "flooding"]
    for each in found.values():
        for name, (low, high) in each.bounds.items():
            assert low < each.suggestion[name] < high


def test_gamma_may_be_twice_the_largest_epsilon(found):
    bounds = found["F-GR"].bounds
    assert bounds["gamma"][1] == 2 * bounds["epsilon"][1]


def test_a_range_can_be_stored(found):
    for each in found.values():
        assert Range.from_dict(json.loads(json.dumps(each.as_dict()))) == each


def test_training_beyond_the_bound_breaks_or_the_loss_rises_too_far(found):
    """The bound is at most twice the edge, and lower only if a short training with a larger one broke."""
    for each in found.values():
        high = each.bounds[each.sweep.constant][1]
        assert high <= 2.2 * each.sweep.edge
        assert (each.shortened == 0) == (high == pytest.approx(each.sweep.bound, rel=0.06))


@pytest.mark.filterwarnings("ignore:.*training_step. returned")
def test_a_training_without_steps():
    class WithoutLoss(Problem):
        def training_step(self, batch):
            return None

    with pytest.raises(TuneError, match="optimizer steps with a loss, but training ended before"):
        range_test(WithoutLoss, Data, methods=["SAM"], trainer=FLAGS, warmup_steps=5)


def test_a_method_that_does_not_fit_is_one_line():
    class WithoutMomentum(Problem):
        def configure_optimizers(self):
            from torch.optim import SGD

            return SGD(self.parameters(), lr=0.1)

    with pytest.raises(TuneError, match="keeps no momentum") as error:
        range_test(WithoutMomentum, Data, methods=["MomentumSAM"], trainer=FLAGS, warmup_steps=3)
    assert "\n" not in str(error.value)
