"""Tests the contract "nothing else changes": a step that writes state, in four forms, with and without a callback.

A :class:`Situation` is a module whose ``step`` writes some kind of state. :func:`check_no_trace` trains it with a
learning rate of zero and a huge radius, so that anything a second pass leaves behind shows up; :func:`check_gradient`
compares each gradient with :mod:`oracle`, which is independent of the package.
"""

import copy
import random
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fingerprints import differences, fingerprint
from oracle import CENTRAL, FGR, HUGE, by_hand
from torch import nn

from lightning_gr import GradientRegularizationMixin, in_second_pass, regularized_backward

FORMS = ("automatic", "accumulation", "mixin", "functional")
AUTOMATIC, CLOSURES = FORMS[:2], FORMS[2:]
LIGHTNING = FORMS[:3]
STEPS, WINDOW = 9, 3
FEATURES = 3

# What steps see, kept in globals because the package restores everything that is reachable from a module.
FIRST: list[Any] = []
SECOND: list[Any] = []
GRADIENTS: list[dict[str, torch.Tensor]] = []


def witness(value):
    """Record the state that a step starts from, separately for first and second passes."""
    (SECOND if in_second_pass() else FIRST).append(copy.deepcopy(value.detach() if torch.is_tensor(value) else value))


def seed():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def generators():
    """Return the state of all global generators."""
    return {"torch": torch.get_rng_state(), "numpy": repr(np.random.get_state()), "python": repr(random.getstate())}


class Batches:
    """A loader that yields its batches unchanged."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Situation(pl.LightningModule):
    """Base class of situations: ``prepare`` creates the state of a step, ``step`` computes the loss from ``self.net``.

    ``forms``: the forms it can be trained in. ``has_oracle``: whether a deep copy includes everything that it writes.
    """

    forms = FORMS
    has_oracle = True
    steps = STEPS

    def __init__(self, lr=0.0):
        super().__init__()
        self.hparams  # noqa: B018 - created on first access, which otherwise happens in the Trainer's loggers
        self.lr = lr
        self.net = nn.Linear(FEATURES, 2).double()
        self.prepare()

    def prepare(self):
        """Create the state that the step writes."""

    def step(self, batch):
        """Compute the loss."""
        raise NotImplementedError

    def hook(self):
        """Register hooks on parameters; called again on deep copies, which lose them."""

    def mse(self, batch):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def make_batches(self):
        return [(torch.randn(4, FEATURES).double(), torch.randn(4, 2).double()) for _ in range(self.steps)]

    def evaluate(self, batch):
        witness("call")
        return self.step(batch)

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.evaluate(batch)
        optimizer = self.optimizers()
        if isinstance(self, GradientRegularizationMixin):
            self.regularized_step(optimizer, lambda: self.evaluate(batch))
        else:
            optimizer.zero_grad()
            self.manual_backward(self.evaluate(batch))
            optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer):
        GRADIENTS.append(gradients(self))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def gradients(module):
    """Copy all gradients by name; zeros count as None, since they depend on ``set_to_none``."""
    named = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    return {name: grad.clone() for name, grad in named if grad.any()}


class Run(NamedTuple):
    """The final state of a training run."""

    module: Any
    trainer: Any
    state: dict
    numbers: dict
    first: list
    second: list
    gradients: list


def build(kind, form, lr=0.0, mixin=False):
    """Create the module, always with the same weights."""
    seed()
    module = (type(kind.__name__, (GradientRegularizationMixin, kind), {}) if mixin else kind)(lr)
    module.automatic_optimization = form != "mixin"
    module.hook()
    return module


def make_trainer(*callbacks, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "devices": 1, **quiet}
    return pl.Trainer(callbacks=list(callbacks), **{**fixed, **options})


def train(kind, form, method=None, lr=0.0, callbacks=(), **options):
    """Train ``kind`` in one of FORMS with ``method``, or plainly if it is None."""
    module = build(kind, form, lr, mixin=form == "mixin" and method is not None)
    seed()
    batches, trainer = module.make_batches(), None
    for kept in (FIRST, SECOND, GRADIENTS):
        kept.clear()
    if form == "functional":
        loop(module, batches, method)
    else:
        ours = [] if method is None else [method.callback()]
        trainer = make_trainer(
            *ours, *callbacks, accumulate_grad_batches=WINDOW if form == "accumulation" else 1, **options
        )
        trainer.fit(module, Batches(batches))
    state = fingerprint(module, batches)
    return Run(module, trainer, state, generators(), list(FIRST), list(SECOND), list(GRADIENTS))


def loop(module, batches, method):
    """Train in a plain loop with the functional API."""
    optimizer = module.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        if method is None:
            module.evaluate(batch).backward()
        else:
            regularized_backward(lambda batch=batch: module.evaluate(batch), module, method.rule)
        GRADIENTS.append(gradients(module))
        optimizer.step()


def over(*kinds, forms=FORMS):
    """Parametrize a test over situations and the forms that they support."""
    cases = [(kind, form) for kind in kinds for form in kind.forms if form in forms]
    return pytest.mark.parametrize(
        ("kind", "form"), [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}") for case in cases]
    )


def check_no_trace(kind, form, method=HUGE, **options):
    """With a learning rate of zero, training must be the same as without the callback, and replays exact."""
    plain = train(kind, form, **options)
    found = train(kind, form, method, **options)
    same("first passes", as_dict(found.first), as_dict(plain.first))
    same("what is left", found.state, plain.state)
    same("random numbers", found.numbers, plain.numbers)
    same("second passes", as_dict(found.second), as_dict(repeated(form, method, found.first)))
    if found.trainer is not None:
        same("Trainer", as_dict(effects(found.trainer)), as_dict(effects(plain.trainer)))
    return found


def repeated(form, method, first):
    """Return what second passes must see: everything the first passes of a window saw, once per probe."""
    calls = np.flatnonzero([isinstance(value, str) and value == "call" for value in first]).tolist()
    size = WINDOW if form == "accumulation" else 1
    bounds = [*calls[::size], len(first)]
    windows = [first[a:b] for a, b in pairwise(bounds)]
    return [value for window in windows for _ in method.probes for value in window]


def as_dict(values):
    return fingerprint(values)


def effects(trainer):
    """Return the effects that a step may have on its Trainer."""
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("gr/")}
    rates = [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return metrics, rates, schedules, trainer.global_step, trainer.should_stop, trainer.current_epoch


def check_gradient(kind, form, method=FGR, lr=0.05, rtol=1e-9):
    """Check that all gradients and written state match the oracle."""
    expected = by_hand(kind, form, method, lr)
    found = train(kind, form, method, lr)
    same("gradients", as_dict(found.gradients), as_dict(expected.gradients), rtol)
    same("what is left", found.state, expected.state, rtol)
    return found


def same(what, actual, expected, rtol=0.0):
    """Fail with a list of differences if there are any."""
    found = differences(actual, expected, rtol)
    if found:
        pytest.fail(f"{what}: {len(found)} differ\n" + "\n".join(found[:4]), pytrace=False)


def contract(*kinds, methods=(FGR, CENTRAL)):
    """Create the two tests of each situation, to be assigned to names that begin with ``test_``."""

    @over(*kinds)
    def leaves_no_trace(kind, form):
        check_no_trace(kind, form)

    # the mixin evaluates a closure just as the functional form does
    @over(*[kind for kind in kinds if kind.has_oracle], forms=("automatic", "accumulation", "functional"))
    def gradient_is_that_of_the_oracle(kind, form):
        for method in methods if form == "automatic" else methods[:1]:
            check_gradient(kind, form, method)

    return leaves_no_trace, gradient_is_that_of_the_oracle


# --- errors and reports


@contextmanager
def refused(match):
    """Expect a deliberate error with a message of one line."""
    with pytest.raises(Exception, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, (AttributeError, NotImplementedError, RecursionError, AssertionError))


def right_or_refused(check, match):
    """Check that ``check`` passes or raises a one-line error."""
    try:
        check()
    except AssertionError:
        raise
    except Exception as error:
        with refused(match):
            raise error


def report(callback):
    """Return the number of regularized steps and of all steps."""
    found = getattr(callback, "report", None) or callback.watch
    return found.regularized, found.steps
