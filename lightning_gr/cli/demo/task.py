"""The demo's task: a small classifier on real digits with noisy labels, trained without and with each method."""

import csv
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_gr.callbacks.base import TwoPass
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.momentum import MomentumSAM
from lightning_gr.callbacks.regularization import SAM, GradientRegularization
from lightning_gr.tune.trial import Interrupted

__all__ = [
    "DEMO_METHODS",
    "Digits",
    "DigitsModule",
    "EpochRecord",
    "measure_costs",
    "train",
    "write_csv",
]

TRAINING, NOISE, TEST = 500, 0.2, 897
LEARNING_RATE, MOMENTUM, BATCH = 0.05, 0.9, 64

# Selected on the validation split by `python examples/select_demo_constants.py`, which prints the full grid.
DEMO_METHODS: dict[str, Callable[[], list[TwoPass | Flooding]]] = {
    "plain": list,
    "F-GR": lambda: [GradientRegularization(gamma=1.0, epsilon=0.5)],
    "B-GR": lambda: [GradientRegularization(gamma=0.5, epsilon=0.3, scheme="backward")],
    "SAM": lambda: [SAM(rho=0.5)],
    "MSAM": lambda: [MomentumSAM(rho=2.0)],
    "flooding": lambda: [Flooding(level=0.8)],
}


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits in three disjoint splits. Only the training labels are noisy.

    Args:
        train: 500 images that depend on the seed, 20% of them with random labels.
        validation: The remaining 400 images, with clean labels, for selecting constants.
        test: 897 images with clean labels, the same for all seeds.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, seed: int) -> "Digits":
        """Split the digits bundled with scikit-learn according to ``seed``; nothing is downloaded."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels, dtype=torch.float32) / 16 - 0.3, torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        test, rest = order[:TEST], order[TEST:]
        draw = torch.Generator().manual_seed(seed)
        rest = rest[torch.randperm(len(rest), generator=draw)]
        train, validation = rest[:TRAINING], rest[TRAINING:]
        noisy = y[train].clone()
        flipped = torch.randperm(TRAINING, generator=draw)[: int(NOISE * TRAINING)]
        noisy[flipped] = torch.randint(10, (len(flipped),), generator=draw)
        return cls((x[train], noisy), (x[validation], y[validation]), (x[test], y[test]))


class DigitsModule(pl.LightningModule):
    """A 64-512-512-10 MLP without any regularization code."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the batch's cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        """Use SGD with momentum and a cosine schedule over all epochs."""
        optimizer = torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


@dataclass(frozen=True)
class EpochRecord:
    """The measurements of a run after one epoch."""

    method: str
    seed: int
    epoch: int
    train_loss: float
    gradient_norm: float
    accuracy: float


class _Curves(pl.Callback):
    """Records loss and gradient norm on the full training set, and accuracy on held-out images with clean labels."""

    def __init__(
        self, method: str, seed: int, data: Digits, held_out: tuple[Tensor, Tensor], tick: Callable[[], None]
    ) -> None:
        super().__init__()
        self.name, self.seed, self.data, self.held_out, self.tick = method, seed, data, held_out, tick
        self.records: list[EpochRecord] = []
        self.interrupted = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure with ``torch.autograd.grad``, which does not touch ``.grad``."""
        net: nn.Module = pl_module.get_submodule("net")
        images, labels = self.data.train
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(net(images), labels)
            grads = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        images, labels = self.held_out
        with torch.no_grad():
            accuracy = (net(images).argmax(1) == labels).float().mean()
        values = (float(value) for value in (loss.detach(), norm, accuracy))
        self.records.append(EpochRecord(self.name, self.seed, trainer.current_epoch + 1, *values))
        self.tick()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Record whether this is Ctrl-C, since Lightning then raises a SystemExit, as for other signals."""
        self.interrupted = isinstance(exception, KeyboardInterrupt)


class _StepTimes(pl.Callback):
    """Records the duration of each training step, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock before the other callbacks' hooks."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Record the time since the start of the step."""
        self.seconds.append(time.perf_counter() - self._start)


def _fit(seed: int, epochs: int, data: Digits, callbacks: Sequence[pl.Callback]) -> None:
    """Train once, quietly; initialization and batch order depend only on the seed."""
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        module = DigitsModule(epochs)
        dataset = TensorDataset(*data.train)
        order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
        loader: DataLoader[Any] = DataLoader(dataset, sampler=BatchSampler(order, BATCH, False), batch_size=None)
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages, and use one thread, since more slow down such a small MLP."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def train(
    method: str,
    callbacks: Sequence[pl.Callback],
    seed: int,
    epochs: int,
    *,
    validation: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> list[EpochRecord]:
    """Train once and return one record per epoch.

    Args:
        method: The method's name in the records.
        callbacks: Callbacks for the Trainer.
        seed: The seed of the split, the initialization and the batch order.
        epochs: The number of epochs, with 8 steps each.
        validation: Measure accuracy on the validation split instead of the test split.
        tick: Called after each epoch.

    Raises:
        Interrupted: On Ctrl-C.
    """
    data = Digits.load(seed)
    curves = _Curves(method, seed, data, data.validation if validation else data.test, tick)
    try:
        _fit(seed, epochs, data, [*callbacks, curves])
    except (KeyboardInterrupt, SystemExit) as stop:
        if curves.interrupted or isinstance(stop, KeyboardInterrupt):
            raise Interrupted from None
        raise
    return curves.records


def measure_costs(methods: Sequence[str], rounds: int = 5, epochs: int = 4) -> dict[str, float]:
    """Measure step times relative to plain training, alternating between methods; medians over ``rounds``."""
    data = Digits.load(0)
    ratios: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        plain = _step_seconds([], data, epochs)
        for method in methods:
            seconds = plain if method == "plain" else _step_seconds(DEMO_METHODS[method](), data, epochs)
            ratios[method].append(seconds / plain)
    return {method: statistics.median(values) for method, values in ratios.items()}


def _step_seconds(callbacks: Sequence[pl.Callback], data: Digits, epochs: int) -> float:
    times = _StepTimes()
    # first in the list, so that the other callbacks' start-of-step hooks are included in the time
    _fit(0, epochs, data, [times, *callbacks])
    return statistics.median(times.seconds)


def write_csv(records: Sequence[EpochRecord], path: Path) -> None:
    """Write a CSV file with one row per epoch of each run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [field.name for field in fields(EpochRecord)]
        writer.writerow(names)
        writer.writerows([getattr(record, name) for name in names] for record in records)
