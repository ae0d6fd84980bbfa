"""Computes the expected result of a step with a second pass, without the package, on deep copies.

Slow and simple: for each micro-batch, module and batch are copied and the global generators saved before the step
runs. The first pass is then plain training on the real module. For the second pass, each copy is moved by hand and runs
its step from where the first one started; whatever it writes is discarded with the copy.
"""

import copy
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_gr import SAM, GradientRegularization, GRRule, SAMRule


class Method(NamedTuple):
    """g = keep · g₀ + Σ weight · g(θ + distance · d), and the corresponding callback of the package."""

    keep: float
    probes: tuple
    normalized: bool
    rule: Any

    def callback(self, **options):
        kind = SAM if isinstance(self.rule, SAMRule) else GradientRegularization
        return kind(**vars(self.rule), **options)

    def direction(self, clean):
        norm = torch.stack([grad.norm() for grad in clean.values()]).norm() if self.normalized and clean else 1.0
        return {name: grad / norm if norm > 0 else grad for name, grad in clean.items()}


def sam(rho):
    return Method(0.0, ((rho, 1.0),), True, SAMRule(rho))


def forward(gamma, epsilon):
    return Method(1 - gamma / epsilon, ((epsilon, gamma / epsilon),), False, GRRule(gamma, epsilon))


def central(gamma, epsilon):
    probes = ((epsilon, gamma / (2 * epsilon)), (-epsilon, -gamma / (2 * epsilon)))
    return Method(1.0, probes, False, GRRule(gamma, epsilon, scheme="central"))


HUGE, FGR, CENTRAL = sam(50.0), forward(0.2, 0.5), central(0.2, 0.5)


class Plain(NamedTuple):
    """The final state of a training run by hand."""

    module: Any
    state: dict
    gradients: list


def _numbers():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_numbers(numbers):
    torch.set_rng_state(numbers[0])
    np.random.set_state(numbers[1])
    random.setstate(numbers[2])


def _named(module):
    return dict(module.named_parameters())


def _grads(module):
    return {name: param.grad.clone() for name, param in _named(module).items() if param.grad is not None}


def _set_grads(module, grads):
    for name, param in _named(module).items():
        param.grad = grads[name].clone() if name in grads else None


class _Pass:
    """One micro-batch: evaluation and backward pass, in the order of Lightning or of a closure."""

    def __init__(self, form, position, parts):
        self.form, self.position, self.parts = form, position, parts

    def __call__(self, module, batch):
        loss = module.evaluate(batch)
        if self.form in ("automatic", "accumulation") and self.position == 0:
            # Lightning zeroes gradients between the evaluation and the backward pass
            _set_grads(module, {})
        if loss is None:
            return False
        module.backward(loss / self.parts)
        return True


class _Snapshot:
    """The current state of module, batch and generators."""

    def __init__(self, run, module, batch):
        self.run, self.numbers = run, _numbers()
        self.module, self.batch = copy.deepcopy((module, batch))

    def again(self, moves, carried):
        """Compute the gradient of this micro-batch at the weights moved by ``moves``, added to ``carried``."""
        module, batch = copy.deepcopy((self.module, self.batch))
        if isinstance(module, nn.Module) and hasattr(module, "hook"):
            module.hook()
        _set_numbers(self.numbers)
        for name, move in moves.items():
            _named(module)[name].data.add_(move)
        _set_grads(module, carried)
        self.run(module, batch)
        return _grads(module)


def by_hand(kind, form, method, lr):
    """Train a situation of :mod:`contract` by hand."""
    from contract import LIGHTNING, WINDOW, build, gradients, seed
    from fingerprints import fingerprint

    module = build(kind, form, lr)
    seed()
    batches, found = module.make_batches(), []
    optimizer = module.configure_optimizers()
    size, hooks = WINDOW if form == "accumulation" else 1, form in LIGHTNING
    if hooks:
        module.on_train_start()
        module.on_train_epoch_start()
    for start in range(0, len(batches), size):
        snapshots = []
        window = list(enumerate(batches))[start : start + size]
        if form not in ("automatic", "accumulation"):
            optimizer.zero_grad()
        for position, (index, batch) in enumerate(window):
            if hooks:
                module.on_train_batch_start(batch, index)
            snapshot = _Snapshot(_Pass(form, position, size), module, batch)
            if snapshot.run(module, batch):
                snapshots.append(snapshot)
            if hooks and position < len(window) - 1:
                module.on_train_batch_end(None, batch, index)
        clean, numbers = _grads(module), _numbers()
        final = _second(method, clean, snapshots)
        _set_numbers(numbers)
        _set_grads(module, final)
        found.append(gradients(module))
        optimizer.step()
        if hooks:
            module.on_train_batch_end(None, *window[-1][::-1])
    if hooks:
        module.on_train_epoch_end()
        module.on_train_end()
    return Plain(module, fingerprint(module, batches), found)


def _second(method, clean, snapshots):
    if not snapshots:
        return clean
    direction = method.direction(clean)
    final = {name: method.keep * grad for name, grad in clean.items()}
    for distance, weight in method.probes:
        moves, carried = {name: distance * value for name, value in direction.items()}, {}
        for snapshot in snapshots:
            carried = snapshot.again(moves, carried)
        for name, grad in carried.items():
            final[name] = final.get(name, 0.0) + weight * grad
    return final
