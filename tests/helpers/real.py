"""What is checked of every library: its own module and options, with our callbacks in its list of callbacks."""

import copy
import random

import numpy as np
import torch

from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr._compat import CallbackBase

RULE = {"gamma": 0.05, "epsilon": 0.02}


def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Observer(CallbackBase):
    """Stays the same object where a library copies its callbacks."""

    def __deepcopy__(self, memo):
        return self


class Watch(Observer):
    """Keeps what a run ends with."""

    def on_train_start(self, trainer, pl_module):
        self.before = {name: param.detach().clone() for name, param in pl_module.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        self.steps = trainer.global_step
        self.after = {name: param.detach().clone() for name, param in pl_module.named_parameters()}
        self.buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}
        metrics = {**trainer.logged_metrics, **trainer.callback_metrics}
        self.metrics = {name: float(value) for name, value in metrics.items() if not name.startswith("gr/")}


class Listen(Observer):
    """Before our callback in the list: notes the random state and the gradient of the first pass."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.random = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.batch, self.index = copy.deepcopy(batch), batch_idx
        self.state = {name: value.detach().clone() for name, value in pl_module.named_buffers()}

    def on_after_backward(self, trainer, pl_module):
        self.clean = gradients(pl_module)


class Compare(Observer):
    """Compares the gradient that the optimizer gets in one step with F-GR written by hand on the same module."""

    def __init__(self, listen, at_step=1):
        self.listen, self.at_step, self.error = listen, at_step, None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step != self.at_step:
            return
        found, clean = gradients(pl_module), self.listen.clean
        ratio = RULE["gamma"] / RULE["epsilon"]
        ascended = self.by_hand(pl_module, {name: RULE["epsilon"] * grad for name, grad in clean.items()})
        assert ascended.keys() == clean.keys() == found.keys()
        expected = {name: (1 - ratio) * clean[name] + ratio * ascended[name] for name in clean}
        change = norm({name: expected[name] - clean[name] for name in clean})
        self.error = norm({name: found[name] - expected[name] for name in clean}) / change

    def by_hand(self, pl_module, step):
        """The gradient at the weights moved by ``step``, with the first pass's batch, random numbers and buffers."""
        params, buffers = dict(pl_module.named_parameters()), dict(pl_module.named_buffers())
        kept = {name: param.detach().clone() for name, param in params.items()}
        after = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        now = torch.get_rng_state(), np.random.get_state(), random.getstate()
        with torch.no_grad():
            for name, value in step.items():
                params[name].add_(value)
            for name, value in self.listen.state.items():
                buffers[name].copy_(value)
        set_random(self.listen.random)
        arguments = [self.listen.batch, self.listen.index][: pl_module.training_step.__code__.co_argcount - 1]
        output = pl_module.training_step(*arguments)
        loss = output["loss"] if isinstance(output, dict) else output
        trained = {name: param for name, param in params.items() if param.requires_grad}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        set_random(now)
        with torch.no_grad():
            for name, value in kept.items():
                params[name].copy_(value)
            for name, value in after.items():
                buffers[name].copy_(value)
        return {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}


def set_random(state):
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def gradients(module):
    return {name: param.grad.clone() for name, param in module.named_parameters() if param.grad is not None}


def norm(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()]).norm().item()


def run(train, *callbacks):
    watch = Watch()
    seed()
    train([*callbacks, watch])
    return watch


def check_library(train, level=1e-3, rtol=1e-3):
    """Every check, on ``train(callbacks)``, which builds the library's model and trains it for a few steps."""
    plain, again = run(train), run(train)
    assert plain.steps >= 3
    assert_close(again.after, plain.after)  # or nothing could be compared
    # all of the second passes run, but what they add is far below float32's resolution
    unseen = run(train, GradientRegularization(gamma=1e-30, epsilon=1e-2, scheme="central"))
    assert_close(unseen.after, plain.after)
    assert_close(unseen.buffers, plain.buffers)
    assert unseen.metrics == plain.metrics
    listen = Listen()
    compare = Compare(listen)
    regularized = run(train, listen, GradientRegularization(**RULE), compare)
    assert compare.error is not None
    assert compare.error < rtol
    for callbacks in ([GradientRegularization(**RULE)], [SAM(0.1)], [SAM(0.5, adaptive=True), Flooding(level)]):
        moved = run(train, *callbacks)
        assert moved.steps == plain.steps
        assert all(value.isfinite().all() for value in moved.after.values())
        assert norm({name: moved.after[name] - plain.after[name] for name in plain.after}) > 0
    return plain, regularized


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
