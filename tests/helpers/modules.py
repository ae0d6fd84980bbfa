"""Small modules, data and a quiet Trainer, shared by the tests."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import NamedTuple

import pytorch_lightning as pl
import reference
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import SAM, GradientRegularization, GradientRegularizationMixin, GRRule, MomentumSAM, SAMRule
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.core.rules import SCHEMES
from lightning_gr.rules import FriendlySAMRule, GSAMRule, LookSAMRule, MomentumSAMRule

FEATURES, CLASSES = 5, 3


def mlp(*hidden, activation=nn.Tanh, dtype=torch.float64, seed=0):
    """Create an MLP from FEATURES to CLASSES, always with the same weights."""
    sizes = (FEATURES, *(hidden or (8,)), CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def make_data(count=24, dtype=torch.float64, seed=1):
    """Create inputs and labels, always the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def make_batches(count=24, batch_size=8, dtype=torch.float64, seed=1):
    """Create the batches of ``make_loader`` as a list of (x, y)."""
    x, y = make_data(count, dtype, seed)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def make_loader(count=24, batch_size=8, dtype=torch.float64, seed=1):
    """Create a loader of (x, y) that does not shuffle."""
    return DataLoader(TensorDataset(*make_data(count, dtype, seed)), batch_size=batch_size)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


def cross_entropy(net, batch):
    x, y = batch
    return nn.functional.cross_entropy(net(x), y)


class TinyModule(pl.LightningModule):
    """Trains ``net`` on ``loss(net, batch)`` and keeps the gradients that the optimizer gets.

    Args:
        net: Any module.
        loss: A function of the network and the batch.
        optimizer: A function of the parameters.
        scheduler: A function of the optimizer, or None.
    """

    def __init__(self, net=None, loss=cross_entropy, optimizer=sgd, scheduler=None):
        super().__init__()
        self.net = mlp() if net is None else net
        self.loss, self.optimizer, self.scheduler = loss, optimizer, scheduler
        self.gradients = []

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])


class Manual(GradientRegularizationMixin, TinyModule):
    """Manual optimization with one step per batch, whose halves are micro-batches."""

    parts, groups, before = 2, 1, False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        halves = zip(*(t.chunk(self.parts) for t in batch), strict=True)
        losses = [lambda half=half: cross_entropy(self.net, half) for half in halves]
        for optimizer in optimizers if self.groups > 1 else [optimizers]:
            if self.before:
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.net, batch))
                self.regularized_backward(losses, optimizer)
                optimizer.step()
            else:
                self.regularized_step(optimizer, losses)

    def configure_optimizers(self):
        if self.groups == 1:
            return super().configure_optimizers()
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.0) for i in (0, 2)]


def make_trainer(*callbacks, max_epochs=1, **kwargs):
    """Create a Trainer on the CPU that prints and saves nothing."""
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"logger": False, "accelerator": "cpu", "devices": 1, **quiet, **kwargs}
    return pl.Trainer(callbacks=list(callbacks), max_epochs=max_epochs, **options)


def fit(module, *callbacks, loader=None, **kwargs):
    """Train ``module`` with ``callbacks`` and return the Trainer."""
    trainer = make_trainer(*callbacks, **kwargs)
    trainer.fit(module, make_loader() if loader is None else loader)
    return trainer


def weights(net):
    """Copy all parameters by name."""
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def gradients(net):
    """Copy all gradients by name."""
    return {name: param.grad.clone() for name, param in net.named_parameters() if param.grad is not None}


def assert_same(actual, expected):
    """Check that all tensors are equal bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_near(actual, expected, rtol=1e-10):
    """Check that all tensors, as one vector, agree relative to its norm."""
    assert actual.keys() == expected.keys()
    a, b = (torch.cat([d[name].double().flatten() for name in expected]) for d in (actual, expected))
    error = (a - b).norm() / b.norm()
    assert error <= rtol, f"relative error {error:.1e}"


class Method(NamedTuple):
    """A method: its rule, and a reference implementation."""

    rule: GRRule | SAMRule
    by_hand: Callable
    constants: dict

    def callback(self, **options):
        kind = SAM if isinstance(self.rule, SAMRule) else GradientRegularization
        return kind(**asdict(self.rule), **options)

    def gradient(self, loss, theta, strength=1.0):
        scaled = {k: v * strength if k in ("gamma", "rho") else v for k, v in self.constants.items()}
        return self.by_hand(loss, theta, **scaled)


def _gr(method, scheme):
    constants = {"gamma": 0.03, "epsilon": 0.1, "scheme": scheme}
    return Method(GRRule(**constants, normalize=method is reference.norm_penalty), method, constants)


METHODS = {
    **{f"{scheme} GR": _gr(reference.gradient_regularization, scheme) for scheme in SCHEMES},
    **{f"{scheme} norm penalty": _gr(reference.norm_penalty, scheme) for scheme in SCHEMES},
    "SAM": Method(SAMRule(0.2), reference.sam, {"rho": 0.2}),
    "ASAM": Method(SAMRule(0.5, adaptive=True), reference.asam, {"rho": 0.5}),
    "ASAM with eta": Method(SAMRule(0.5, adaptive=True, eta=0.01), reference.asam, {"rho": 0.5, "eta": 0.01}),
    "unnormalized SAM": Method(GRRule(0.1, 0.1), reference.unnormalized_sam, {"rho": 0.1}),
}
MOVING = [name for name, method in METHODS.items() if method.rule.update().probes]
FIRST_ORDER = [name for name, method in METHODS.items() if not method.rule.update().curvature]
# one method of each kind, for code that does not depend on the rest of the row
SOME = ["forward GR", "central norm penalty", "exact GR", "ASAM with eta"]
SOME_MOVING = [name for name in SOME if name in MOVING]


class Stateful(NamedTuple):
    """A rule that keeps state between steps or uses the optimizer's, and its reference implementation."""

    rule: object
    by_hand: type

    def callback(self, **options):
        if isinstance(self.rule, MomentumSAMRule):
            return MomentumSAM(self.rule.rho, **options)
        return TwoPass(self.rule, **options)

    def reference(self):
        return self.by_hand(**asdict(self.rule))


STATEFUL = {
    "Momentum-SAM": Stateful(MomentumSAMRule(0.5), reference.MomentumSAM),
    "GSAM": Stateful(GSAMRule(0.2, 0.4), reference.GSAM),
    "Friendly-SAM": Stateful(FriendlySAMRule(0.2, 0.8, 0.7), reference.FriendlySAM),
    "LookSAM": Stateful(LookSAMRule(0.2, 0.7, 3), reference.LookSAM),
}
OPTIMIZERS = {"SGD": (sgd, reference.SGD), "Adam": (adam, reference.Adam)}


class Counts(nn.Module):
    """A network whose output depends on the number of calls."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.count += 1
        return self.net(x) * (1 + self.count)


def with_momentum(net):
    """Return SGD for ``net`` after a step, so that it has a momentum."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(net, make_batches()[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer
