"""Cost, accuracy and sharpness of methods that are cheaper than two passes, on the demo's digits.

``python benchmarks/cheaper.py`` takes about five minutes on one core and reports on the test split. The constants were
selected on the validation split with different seeds (``--choose``). ``--read`` shows the results of an earlier run.
"""

import argparse
import csv
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from cheaper_ways import CHOSEN, GRID, STEPS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_cost import LOOK

from lightning_gr import hessian_eigenvalue
from lightning_gr.cli.demo.task import Digits, train

EPOCHS, CHOOSING, REPORTING = 60, (100, 101), (0, 1, 2, 3, 4)


class Row(NamedTuple):
    """One measured value of one run."""

    way: str
    constants: str
    quantity: str
    seed: int
    value: float


class Sharpness(pl.Callback):
    """Computes the largest eigenvalue of the training loss's Hessian at the end of training."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute the eigenvalue on the full training set."""
        images, labels = Digits.load(self.seed).train
        with torch.enable_grad():
            result = hessian_eigenvalue(
                lambda: torch.nn.functional.cross_entropy(module.net(images), labels), module.net, tolerance=0.01
            )
        self.value = result.value


class Clock(pl.Callback):
    """Measures the CPU time of training steps, in seconds. Must be the first callback."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock before the other callbacks' hooks."""
        self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        """Add the CPU time of the step."""
        self.seconds += time.process_time() - self._start


def choose(show: Callable[..., Iterable[Any]]) -> list[Row]:
    """Measure the accuracy of all candidate constants on the validation split."""
    rows = []
    runs = [(way, constants) for way in GRID for constants in GRID[way]]
    for way, constants in show(runs, "choosing"):
        for seed in CHOOSING:
            records = train(way, GRID[way][constants](), seed, EPOCHS, validation=True)
            rows.append(Row(way, constants, "validation", seed, records[-1].accuracy))
    return rows


def report(seeds: Sequence[int], show: Callable[..., Iterable[Any]]) -> list[Row]:
    """Measure test accuracy, sharpness, and training time relative to plain training with the same seed."""
    rows = []
    for seed in show(seeds, "testing"):
        plain = 0.0
        for way, constants in CHOSEN.items():
            clock, sharpness = Clock(), Sharpness(seed)
            records = train(way, [clock, *GRID[way][constants](), sharpness], seed, EPOCHS)
            plain = plain or clock.seconds  # plain training comes first
            values = {"accuracy": records[-1].accuracy, "sharpness": sharpness.value, "cost": clock.seconds / plain}
            rows += [Row(way, constants, quantity, seed, value) for quantity, value in values.items()]
    return rows


def _of(rows: Sequence[Row], way: str, quantity: str, constants: str | None = None) -> list[float]:
    return [r.value for r in rows if (r.way, r.quantity) == (way, quantity) and constants in (None, r.constants)]


def _mean(rows: Sequence[Row], way: str, quantity: str, constants: str | None = None) -> float:
    return statistics.mean(_of(rows, way, quantity, constants))


def make_table(rows: Sequence[Row]) -> Table:
    """Build a table with one row per method."""
    table = Table(title=f"digits, 20% of the labels random, {STEPS} steps, {len({r.seed for r in rows})} seeds", **LOOK)
    for name in ("", "constants"):
        table.add_column(name)
    for name in ("cost", "accuracy", "sharpness"):
        table.add_column(name, justify="right")
    for way, constants in CHOSEN.items():
        accuracy, sharpness = _of(rows, way, "accuracy"), _of(rows, way, "sharpness")
        table.add_row(
            way,
            constants,
            f"{statistics.median(_of(rows, way, 'cost')):.2f}×",
            f"{100 * statistics.mean(accuracy):.1f} ± {100 * statistics.stdev(accuracy):.1f}%",
            f"{statistics.mean(sharpness):.2f} ± {statistics.stdev(sharpness):.2f}",
        )
    return table


def read_rows(path: Path) -> list[Row]:
    """Read the results of an earlier run."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(r["way"], r["constants"], r["quantity"], int(r["seed"]), float(r["value"]))
            for r in csv.DictReader(file)
        ]


def main() -> None:
    """Parse the command line, then measure or read the values and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="print the validation accuracy of all constants instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=REPORTING, help="default: 0 1 2 3 4")
    parser.add_argument("--csv", type=Path, help="write all values to this file")
    parser.add_argument("--read", type=Path, nargs="+", help="show the values in such files instead of measuring")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.choose:
        for row in choose(track):
            print(f"{row.way:28} {row.constants:12} seed {row.seed}: {row.value:.3f}")
        return
    rows = [row for path in args.read for row in read_rows(path)] if args.read else report(args.seeds, track)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    Console().print(make_table(rows))


if __name__ == "__main__":
    main()
