"""Accumulation: a window equals one large batch; separate micro-batches give the mean of their updates."""

import pytest
import torch
from modules import METHODS, SOME, TinyModule, assert_near, fit, make_batches, make_loader, mlp, weights
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from lightning_gr import Flooding, regularized_backward

EPOCHS = 2


def micro_batch_training(rule, size, level=None, strength=1.0):
    """Average each micro-batch's own update over the window, in a plain loop."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batches = make_batches(batch_size=4)
    for _ in range(EPOCHS):
        for start in range(0, len(batches), size):
            total = {name: torch.zeros_like(param) for name, param in net.named_parameters()}
            for x, y in batches[start : start + size]:
                optimizer.zero_grad()

                def loss(x=x, y=y):
                    return torch.nn.functional.cross_entropy(net(x), y)

                regularized_backward(loss, net, rule, level=level)
                for name, param in net.named_parameters():
                    total[name] += param.grad / size
            for name, param in net.named_parameters():
                param.grad = total[name]
            optimizer.step()
    return weights(net)


@pytest.mark.parametrize("level", [None, 1.0])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SOME)
def test_separate_micro_batches(name, size, level):
    # with six micro-batches and windows of four, the last window is short, but Lightning still divides by four
    module = TinyModule()
    callbacks = [METHODS[name].callback(accumulation="micro_batch")]
    callbacks += [] if level is None else [Flooding(level)]
    fit(module, *callbacks, loader=make_loader(batch_size=4), max_epochs=EPOCHS, accumulate_grad_batches=size)
    assert_near(weights(module.net), micro_batch_training(METHODS[name].rule, size, level))


@pytest.mark.parametrize("accumulation", ["window", "micro_batch"])
def test_no_batch_is_kept_after_a_step(accumulation):
    kept = []

    class Look(TinyModule):
        def on_before_zero_grad(self, optimizer):
            kept.append(len(callback._runs[self.trainer].recorder._calls))

    callback = METHODS["forward GR"].callback(accumulation=accumulation)
    fit(Look(), callback, loader=make_loader(batch_size=4), accumulate_grad_batches=3)
    # Lightning zeroes gradients after the first micro-batch of a window has been recorded
    assert kept == [1, 1]


def test_single_micro_batches_are_windows():
    modules = [TinyModule(), TinyModule()]
    for module, accumulation in zip(modules, ["window", "micro_batch"], strict=True):
        fit(module, METHODS["SAM"].callback(accumulation=accumulation))
    assert_near(weights(modules[0].net), weights(modules[1].net), rtol=0)


def test_window_follows_the_accumulation_scheduler():
    scheduled, large = TinyModule(), TinyModule()
    schedule = GradientAccumulationScheduler({0: 2})
    fit(scheduled, METHODS["forward GR"].callback(), schedule, loader=make_loader(batch_size=4))
    fit(large, METHODS["forward GR"].callback(), loader=make_loader(batch_size=8))
    assert_near(weights(scheduled.net), weights(large.net))
