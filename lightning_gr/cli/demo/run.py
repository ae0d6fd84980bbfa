"""Runs the demonstration with a progress bar and shows what came out."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_gr.cli.demo.report import draw, make_table, verdicts
from lightning_gr.cli.demo.task import METHODS, EpochRecord, Interrupted, measure_costs, train, write_csv

__all__ = ["run_demo"]


def run_demo(methods: Sequence[str], seeds: int, epochs: int, output: Path) -> int:
    """Train, print the table and write the figure; returns the exit code, 130 after Ctrl-C."""
    console = Console()
    records: list[EpochRecord] = []
    costs: dict[str, float] = {}
    interrupted = False
    try:
        _train_all(methods, seeds, epochs, records, console)
        with console.status("measuring the cost of a step, the methods in turn"):
            costs = measure_costs(methods)
    except (Interrupted, KeyboardInterrupt, SystemExit):
        interrupted = True
    if records:
        _show(records, costs, output, console, f"digits, {TITLE.format(epochs=epochs, seeds=seeds)}")
    if interrupted:
        console.print("Interrupted: only the runs that had finished are kept.")
    return 130 if interrupted else 0


TITLE = "20 % of the labels random, {epochs} epochs, seeds: {seeds}"


def _train_all(methods: Sequence[str], seeds: int, epochs: int, records: list[EpochRecord], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(methods) * seeds * epochs)
        for seed in range(seeds):
            for method in methods:
                progress.update(task, description=f"{method:>8}, seed {seed}, epochs")
                records += train(method, METHODS[method](), seed, epochs, tick=lambda: progress.advance(task))


def _show(records: list[EpochRecord], costs: dict[str, float], output: Path, console: Console, title: str) -> None:
    console.print(make_table(records, costs, title))
    for line in verdicts(records):
        console.print(line, highlight=False)
    write_csv(records, output / "demo.csv")
    draw(records, output / "demo.png")
    console.print(f"Figure: {output / 'demo.png'}\nValues: {output / 'demo.csv'}", highlight=False, soft_wrap=True)
