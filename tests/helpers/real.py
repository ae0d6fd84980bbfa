"""Checks for other libraries: their own modules and options, with our callbacks in the list of callbacks."""

import copy
import random
import warnings
from contextlib import contextmanager

import numpy as np
import pytorch_lightning as pl
import torch
from contract import same
from fingerprints import fingerprint

from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr._compat import CallbackBase

RULE = {"gamma": 0.05, "epsilon": 0.02}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Observer(CallbackBase):
    """A callback that stays the same object when a library copies its callbacks."""

    def __deepcopy__(self, memo):
        return self


class Watch(Observer):
    """Keeps the weights a run starts with, and its final weights, buffers and metrics."""

    def on_train_start(self, trainer, pl_module):
        self.before = {name: param.detach().clone() for name, param in pl_module.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        self.steps = trainer.global_step
        self.after = {name: param.detach().clone() for name, param in pl_module.named_parameters()}
        self.buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}
        metrics = {**trainer.logged_metrics, **trainer.callback_metrics}
        self.metrics = {name: float(value) for name, value in metrics.items() if not name.startswith("gr/")}


class StandStill(Observer):
    """Keeps all weights fixed, so that any difference at the end was left by a second pass."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for param in pl_module.parameters():
            if param.grad is not None:
                param.grad.zero_()

    def on_train_end(self, trainer, pl_module):
        numbers = dict(zip(("torch", "numpy", "python"), map(repr_of_state, get_random()), strict=True))
        # some libraries keep their options, and with them these callbacks, in `hparams`
        kept = {path: value for path, value in fingerprint(pl_module).items() if "['callbacks']" not in path}
        self.left = {**kept, **numbers}


class Listen(Observer):
    """Copies what a step starts from and the gradient of its first pass; comes before our callback in the list."""

    def __init__(self, mend):
        self.mend = mend

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.random = get_random()
        with detached_copies():
            self.arguments = copy.deepcopy([batch, batch_idx])
            self.module = copy.deepcopy(pl_module)
        self.module.trainer = trainer
        self.mend(self.module)
        set_random(self.random)

    def on_after_backward(self, trainer, pl_module):
        self.clean = gradients(pl_module)


class Compare(Observer):
    """Compares the gradient that the optimizer gets with F-GR by hand, on copies of module and batch.

    The copies were made before the first pass, so they contain nothing that the step writes.
    """

    def __init__(self, listen):
        self.listen, self.errors = listen, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = gradients(pl_module)
        # without gradients that the module itself has set to None since
        clean = {name: grad for name, grad in self.listen.clean.items() if name in found}
        ratio = RULE["gamma"] / RULE["epsilon"]
        ascended = self.by_hand({name: RULE["epsilon"] * grad for name, grad in clean.items()})
        ascended = {name: grad for name, grad in ascended.items() if name in found}
        assert ascended.keys() == clean.keys() == found.keys()
        expected = {name: (1 - ratio) * clean[name] + ratio * ascended[name] for name in clean}
        change = norm({name: expected[name] - clean[name] for name in clean})
        self.errors.append(norm({name: found[name] - expected[name] for name in clean}) / change)

    def by_hand(self, step):
        """Return the gradient at weights moved by ``step``, with the first pass's batch, random numbers and state."""
        module, now = self.listen.module, get_random()
        module.log = module.log_dict = lambda *args, **kwargs: None
        params = dict(module.named_parameters())
        with torch.no_grad():
            for name, param in params.items():
                param.grad = None
                if name in step:
                    param.data.add_(step[name])
        set_random(self.listen.random)
        count = module.training_step.__code__.co_argcount - 1
        output = module.training_step(*self.listen.arguments[:count])
        loss = output["loss"] if isinstance(output, dict) else output
        trained = {name: param for name, param in params.items() if param.requires_grad}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        set_random(now)
        return {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}


def copy_tensor(self, memo):
    """Return a deep copy of a tensor of any class, without its graph."""
    with torch._C.DisableTorchFunctionSubclass():
        copied = torch.Tensor.clone(torch.Tensor.detach(self)).requires_grad_(self.requires_grad and self.is_leaf)
    memo[id(self)] = made = copied.as_subclass(type(self))
    made.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return made


@contextmanager
def detached_copies():
    """Let deep copies detach tensors with a graph, such as a loss kept in an attribute, which torch refuses to copy."""
    original = torch.Tensor.__deepcopy__
    torch.Tensor.__deepcopy__ = lambda self, memo: (original if self.is_leaf else copy_tensor)(self, memo)
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = original


def get_random():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random(state):
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def repr_of_state(state):
    return repr(state.tolist() if torch.is_tensor(state) else state)


def gradients(module):
    return {name: param.grad.clone() for name, param in module.named_parameters() if param.grad is not None}


def norm(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()]).norm().item()


def run(train, *callbacks):
    watch = Watch()
    seed()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train([*callbacks, watch])
    # such as that something cannot be restored
    assert [str(each.message) for each in warned if "second pass" in str(each.message)] == []
    return watch


def check_library(train, level=1e-3, rtol=1e-3, rho=50.0, mend=lambda module: None):
    """Run all checks on ``train(callbacks)``, which builds the library's model and trains it for a few steps.

    ``rho``: the radius for the check that second passes leave no trace. ``mend``: completes deep copies of the module.
    """
    plain, again = run(train), run(train)
    assert plain.steps >= 3
    assert_close(again.after, plain.after)  # training is reproducible
    check_no_trace(train, rho)
    # all second passes run, but what they add is far below float32's resolution. Gradients are divided by a weight and
    # multiplied by it again, which is exact for powers of two
    unseen = run(train, GradientRegularization(gamma=2.0**-90, epsilon=2.0**-7, scheme="central"))
    assert_close(unseen.after, plain.after)
    assert_close(unseen.buffers, plain.buffers)
    assert repr(unseen.metrics) == repr(plain.metrics)  # as text, since NaN does not equal itself
    listen = Listen(mend)
    compare = Compare(listen)
    regularized = run(train, listen, GradientRegularization(**RULE), compare)
    assert len(compare.errors) == plain.steps
    assert max(compare.errors) < rtol
    for callbacks in ([GradientRegularization(**RULE)], [SAM(0.1)], [SAM(0.5, adaptive=True), Flooding(level)]):
        moved = run(train, *callbacks)
        assert moved.steps == plain.steps
        assert all(value.isfinite().all() for value in moved.after.values())
        assert norm({name: moved.after[name] - plain.after[name] for name in plain.after}) > 0
    return plain, regularized


def check_no_trace(train, rho):
    """With fixed weights, everything must be the same as without our callbacks, however large the radius."""
    left = []
    for callback in ([], [SAM(rho)], [GradientRegularization(gamma=0.1, epsilon=rho)]):
        still = StandStill()
        run(train, *callback, still)
        left.append(still.left)
    for found in left[1:]:
        same("what is left", found, left[0])


def trains(kind, *tensors, batch_size=4):
    """Return a function ``train(callbacks)`` that trains a LightningModule on tensors."""

    def train(callbacks):
        module, data = kind(), torch.utils.data.TensorDataset(*tensors)
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size))
        return module

    return train


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
