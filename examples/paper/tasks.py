"""The data sets, networks and loops of the generalisation experiments. Nothing is downloaded."""

import functools
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_gr import SAM, Flooding, GradientRegularization, GRRule, SAMRule, regularized_backward
from lightning_gr.rules import Schedule

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "softplus": functools.partial(nn.Softplus, beta=5)}


class Method(NamedTuple):
    """A rule of the package (None: plain), a flood level (None: no flooding) and when the rule applies."""

    rule: GRRule | SAMRule | None = None
    level: float | None = None
    schedule: Schedule = Schedule()

    def callbacks(self, **options) -> list[pl.Callback]:
        """What a user adds to the Trainer."""
        options |= {"start_step": self.schedule.start_step, "warmup_steps": self.schedule.warmup_steps}
        found: list[pl.Callback] = []
        if isinstance(self.rule, GRRule):
            rule = self.rule
            found = [GradientRegularization(rule.gamma, rule.epsilon, scheme=rule.scheme, **options)]
        if isinstance(self.rule, SAMRule):
            found = [SAM(self.rule.rho, adaptive=self.rule.adaptive, eta=self.rule.eta, **options)]
        return found + ([] if self.level is None else [Flooding(self.level)])


class Split(NamedTuple):
    """Images and labels of three disjoint parts; only the training labels are noisy."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(x: Tensor, y: Tensor, test: int, training: int, noise: float, seed: int) -> Split:
    """``test`` examples, the same for each seed, and of the rest ``training`` drawn by the seed.

    A share ``noise`` of the training labels is replaced by labels drawn at random.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:test], order[test:]
    draw = torch.Generator().manual_seed(seed)
    rest = rest[torch.randperm(len(rest), generator=draw)]
    train, validation = rest[:training], rest[training:]
    labels = y[train].clone()
    flipped = torch.randperm(training, generator=draw)[: int(noise * training)]
    labels[flipped] = torch.randint(10, (len(flipped),), generator=draw)
    return Split((x[train], labels), (x[validation], y[validation]), (x[held_out], y[held_out]))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16 - 0.3, torch.tensor(labels)


@functools.cache
def mnist1d() -> tuple[Tensor, Tensor]:
    """5,000 one-dimensional digits of 40 points, made by the generator of the package (Greydanus & Kobak 2024)."""
    from mnist1d.data import make_dataset

    state = np.random.get_state()
    try:
        made = make_dataset()  # seeds NumPy's global generator by itself
    finally:
        np.random.set_state(state)
    x, y = (np.concatenate([made[name], made[f"{name}_test"]]) for name in ("x", "y"))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def mlp(activation: str = "relu") -> nn.Module:
    """64-512-512-10: width 512, as the paper's."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(nn.Linear(64, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 10))


class ResidualBlock(nn.Module):
    """Two convolutions of length 3 with BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = [nn.Conv1d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm1d(channels)]
        again = [nn.Conv1d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm1d(channels)]
        self.net = nn.Sequential(*half, nn.ReLU(), *again)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.net(x))


def resnet(channels: int = 16, blocks: int = 2) -> nn.Module:
    """A one-dimensional residual network for 40 points."""
    stem = [nn.Conv1d(1, channels, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(channels), nn.ReLU()]
    head = [nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(4 * channels, 10)]
    return nn.Sequential(nn.Unflatten(1, (1, 40)), *stem, *[ResidualBlock(channels) for _ in range(blocks)], *head)


class ViT(nn.Module):
    """A vision transformer for 40 points: patches of 5, pre-norm encoder, mean over tokens."""

    def __init__(self, width: int = 32, depth: int = 2, patch: int = 5) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(40 // patch, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unflatten(-1, (-1, self.patch))) + self.position
        return self.head[1](self.head[0](self.encoder(tokens)).mean(1))


@dataclass(frozen=True)
class Task:
    """Data, network and how it is trained."""

    data: Callable[[], tuple[Tensor, Tensor]]
    sizes: tuple[int, int]  # test, training
    network: Callable[..., nn.Module]
    batch: int
    epochs: int
    learning_rate: float
    adam: bool = False
    warmup: float = 0.0  # share of the steps over which the learning rate rises
    noise: float = 0.0

    def split(self, seed: int) -> Split:
        return split(*self.data(), *self.sizes, self.noise, seed)

    def steps_per_epoch(self) -> int:
        return math.ceil(self.sizes[1] / self.batch)

    def optimizer(self, net: nn.Module, epochs: int):
        """SGD with momentum, or Adam; warm-up and cosine, step by step."""
        total = epochs * self.steps_per_epoch()
        rise = int(self.warmup * total)

        def factor(step: int) -> float:
            return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))

        if self.adam:
            optimizer = torch.optim.Adam(net.parameters(), lr=self.learning_rate)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=self.learning_rate, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


DIGITS = Task(digits, (897, 500), mlp, batch=64, epochs=60, learning_rate=0.05)
RESNET = Task(mnist1d, (2000, 1000), resnet, batch=50, epochs=30, learning_rate=0.1)
VIT = Task(mnist1d, (2000, 1000), ViT, batch=100, epochs=30, learning_rate=3e-3, adam=True, warmup=0.2)


class Module(pl.LightningModule):
    """Any of the networks; knows nothing of regularization."""

    def __init__(self, net: nn.Module, task: Task, epochs: int) -> None:
        super().__init__()
        self.net, self.task, self.epochs = net, task, epochs

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer, schedule = self.task.optimizer(self.net, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(data: Split, size: int, seed: int) -> BatchSampler:
    """The indices of the batches, in a new order for each epoch."""
    order = RandomSampler(data.train[1], generator=torch.Generator().manual_seed(seed))
    return BatchSampler(order, size, drop_last=False)


def fit_with_trainer(task, net, data, method: Method, seed, epochs, micro_batches: int | None = None) -> None:
    """Train by Lightning's Trainer and our callbacks.

    Args:
        micro_batches: Emulate so many devices that ascend each along its own gradient, by as many micro-batches of a
            step; batches that would be smaller are dropped.
    """
    parts = micro_batches or 1
    options = {} if micro_batches is None else {"accumulation": "micro_batch"}
    dataset = TensorDataset(*data.train)
    whole = len(dataset) // task.batch * parts if micro_batches else None
    loader = DataLoader(dataset, sampler=batches(data, task.batch // parts, seed), batch_size=None)
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=epochs,
            limit_train_batches=whole,
            accumulate_grad_batches=parts,
            callbacks=method.callbacks(**options),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(Module(net, task, epochs), loader)
        except SystemExit:  # so Lightning ends on Ctrl-C
            raise KeyboardInterrupt from None


@contextmanager
def _quiet():
    """Silence what Lightning says about devices and loaders."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def fit_in_plain_loop(task, net, data, method: Method, seed, epochs) -> None:
    """The same training, bit for bit, in a plain loop, which is faster."""
    x, y = data.train
    optimizer, schedule = task.optimizer(net, epochs)
    order = batches(data, task.batch, seed)
    for step, batch in enumerate(batch for _ in range(epochs) for batch in order):
        due = method.rule is not None and method.schedule.due(step)
        optimizer.zero_grad()
        regularized_backward(
            lambda batch=batch: nn.functional.cross_entropy(net(x[batch]), y[batch]),
            net,
            method.rule if due else GRRule(gamma=0.0),
            strength=method.schedule.strength(step),
            level=method.level,
        )
        optimizer.step()
        schedule.step()


def train(task: Task, method: Method, seed: int, epochs: int, *, trainer=False, micro_batches=None, **network):
    """A trained network and its data; everything follows from the seed."""
    data = task.split(seed)
    # fused attention has no second derivative, which double backward needs
    exact = isinstance(method.rule, GRRule) and method.rule.scheme == "exact"
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = task.network(**network)
        if trainer or micro_batches:
            fit_with_trainer(task, net, data, method, seed, epochs, micro_batches)
        else:
            fit_in_plain_loop(task, net, data, method, seed, epochs)
    return net.eval(), data


@torch.no_grad()
def score(net: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy in per cent, and loss."""
    x, y = part
    out = net(x)
    return 100 * (out.argmax(1) == y).float().mean().item(), nn.functional.cross_entropy(out, y).item()
