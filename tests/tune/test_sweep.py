"""The range test within a training: where the loss breaks, and how the method is changed."""

import math

import pytest
import pytorch_lightning as pl
import torch
from modules import TinyModule, fit, make_loader

from lightning_gr import SAM, Flooding, GradientRegularization, MomentumSAM
from lightning_gr._compat import MisconfigurationException
from lightning_gr.tune.sweep import GRID, RangeFinder, Sweep

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False}


class Quadratic(pl.LightningModule):
    """L(θ) = ‖θ‖²/2 with a learning rate of 0, so that everything can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

    def training_step(self, batch):
        return self.theta.square().sum() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)


def swept(method, steps=2):
    finder = RangeFinder(steps, method=method, apply=False)
    trainer = pl.Trainer(max_steps=steps, callbacks=[finder], **QUIET)
    trainer.fit(Quadratic(), make_loader())
    return finder.result


@pytest.mark.parametrize(
    ("method", "rise"),
    [
        # with ‖θ‖ = 5: (5 + ρ)²/2 − 25/2, or 25/2 ((1 + ε)² − 1) as ∇L = θ
        (SAM(rho=1.0), lambda rho: ((5 + rho) ** 2 - 25) / 2),
        (GradientRegularization(gamma=0.1, epsilon=0.1), lambda eps: 12.5 * ((1 + eps) ** 2 - 1)),
        (GradientRegularization(gamma=0.1, epsilon=0.1, scheme="backward"), lambda eps: 12.5 * ((1 - eps) ** 2 - 1)),
        # the momentum is parallel to θ, and the point ahead is downhill
        (MomentumSAM(rho=1.0), lambda rho: ((5 - rho) ** 2 - 25) / 2),
        (Flooding(level=1.0), lambda level: 2 * max(0.0, level - 12.5)),
    ],
    ids=["SAM", "F-GR", "B-GR", "MomentumSAM", "flooding"],
)
def test_rises_equal_those_computed_by_hand(method, rise):
    result = swept(method)
    assert result.first == result.clean == 12.5
    assert result.values == GRID[: len(result.values)]
    for value, found in zip(result.values, result.rises, strict=True):
        assert found == pytest.approx(rise(value), rel=1e-4, abs=1e-5)
    assert result.rises[-1] > 30 * result.scale or result.values[-1] == GRID[-1]


def test_rises_of_asam_along_its_scaled_direction():
    # T = |θ|, T²g/‖Tg‖ = (27, 64)/√(81 + 256)
    direction = torch.tensor([27.0, 64.0], dtype=torch.float64) / math.sqrt(81 + 256)
    theta = torch.tensor([3.0, 4.0], dtype=torch.float64)
    result = swept(SAM(rho=1.0, adaptive=True))
    for value, found in zip(result.values, result.rises, strict=True):
        assert found == pytest.approx(float((theta + value * direction).square().sum() / 2 - 12.5), rel=1e-4)


def test_at_the_edge_the_loss_has_risen_by_its_initial_value():
    # (5 + ρ)² = 50
    assert swept(SAM(rho=1.0)).edge == pytest.approx(math.sqrt(50) - 5, rel=0.1)


def test_a_loss_that_is_not_finite_ends_the_range():
    assert Sweep("rho", (0.1, 0.2, 0.4), (0.0, 0.1, math.nan), 2.0, 1.0).edge == 0.2
    assert Sweep("rho", (0.1,), (math.inf,), 2.0, 1.0).edge == 0.1
    assert Sweep("rho", (0.1, 0.2), (0.0, 0.1), 2.0, 1.0).edge == 0.2


def test_no_flood_level_above_the_loss_of_the_first_step():
    assert Sweep("level", (1.0, 2.0, 4.0), (0.0, 0.0, 4.0), 2.3, 1.0).bound == 2.3


def test_the_callback_does_not_change_plain_training():
    plain, tested = TinyModule(), TinyModule()
    fit(plain)
    fit(tested, RangeFinder(2, method=SAM(rho=0.1), apply=False))
    for a, b in zip(plain.parameters(), tested.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", [SAM(), GradientRegularization(), MomentumSAM(), Flooding(0.3)], ids=repr)
def test_the_suggestion_is_applied_to_the_method(method):
    finder = RangeFinder(2)
    fit(TinyModule(), finder, method, max_epochs=3)
    suggestion = finder.result.suggestion
    if isinstance(method, Flooding):
        assert method.level == suggestion
    else:
        assert set(method.rule.constants.values()) == {suggestion}
        assert method.schedule.start_step == 0
        assert method.report.regularized == method.report.steps - 2


def test_warns_if_training_is_too_short():
    with pytest.warns(UserWarning, match="ended after .* steps, before the test after 999"):
        fit(TinyModule(), RangeFinder(999), SAM())


@pytest.mark.parametrize("methods", [[], [SAM(), Flooding(0.1)]])
def test_requires_exactly_one_method(methods):
    with pytest.raises(MisconfigurationException, match="exactly one method"):
        fit(TinyModule(), RangeFinder(1), *methods)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="warmup_steps"):
        RangeFinder(0)
