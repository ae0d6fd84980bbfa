"""The state of a run: the point ahead, and the summary panel."""

import pytest
import torch
from modules import METHODS, STATEFUL, TinyModule, make_trainer, mlp, sgd

from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr.callbacks.run import Run
from lightning_gr.rules import MomentumSAMRule


def panel(callback, *others, **options):
    trainer, module = make_trainer(callback, *others, **options), TinyModule()
    callback._runs[trainer] = Run({id(module.net[0].bias)})
    return callback.summary(trainer, module).lines


@pytest.mark.parametrize("name", METHODS | STATEFUL)
def test_the_panel_of_each_method(name):
    method = (METHODS | STATEFUL)[name]
    lines = panel(method.callback(), Flooding(0.5))
    assert list(lines) == ["gradient", "constants", "parameters", "passes", "schedule", "flooding"]
    assert lines["gradient"] == f"g = {method.rule.equation}"
    assert lines["parameters"] == "67 regularized of 75 trainable"
    update = method.rule.update()
    passes = 1 + len(update.probes) + bool(update.curvature)
    assert lines["passes"] == ("1 per step" if update.ahead else f"{passes} per regularized step")
    assert lines["schedule"] == "every step"


def test_the_panel_with_options():
    lines = panel(SAM(0.1, gradient_clip=(10.0, 1.0), interval=2))
    assert lines["clipping"] == "first gradient at 10, further ones at 1"
    assert lines["schedule"] == "every 2 steps"
    lines = panel(GradientRegularization(accumulation="micro_batch"), accumulate_grad_batches=2)
    assert lines["passes"] == "2 per regularized step, each micro-batch separately"


def test_the_point_ahead_follows_the_update():
    net = mlp()
    optimizer, run = sgd(net.parameters()), Run({id(net[0].bias)})
    trainer = make_trainer()
    trainer.strategy.optimizers = [optimizer]
    run.look_ahead(trainer)
    assert run.ahead is None
    run.update = MomentumSAMRule(0.5).update()
    run.look_ahead(trainer)
    assert not run.ahead
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    run.look_ahead(trainer)
    assert run.ahead
    assert [id(param) for param in run.ahead.params] == [id(p) for n, p in net.named_parameters() if n != "0.bias"]
    run.update = None
    run.look_ahead(trainer)
    assert run.ahead is None
