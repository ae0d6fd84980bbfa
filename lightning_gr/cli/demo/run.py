"""Runs the demo with a progress bar and shows the results."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_gr.cli.demo.report import draw, make_table, verdicts
from lightning_gr.cli.demo.task import DEMO_METHODS, EpochRecord, measure_costs, train, write_csv
from lightning_gr.report.console import complain, make_console, printable
from lightning_gr.tune.trial import Interrupted

__all__ = ["run_demo"]

TITLE = "digits, 20% of the labels random, epochs: {epochs}, seeds: {seeds}"


def run_demo(methods: Sequence[str], seeds: int, epochs: int, output: Path) -> int:
    """Train, write the figure and the values, and print the table; return the exit code, 130 after Ctrl-C."""
    console = make_console()
    records: list[EpochRecord] = []
    costs: dict[str, float] = {}
    interrupted = False
    try:
        _train_all(methods, seeds, epochs, records, console)
        with console.status("measuring the cost of a step for each method", spinner="line"):
            costs = measure_costs(methods)
    except (Interrupted, KeyboardInterrupt, SystemExit):
        interrupted = True
    written = not records or _write(records, output)
    if records:
        _show(records, costs, console, TITLE.format(epochs=epochs, seeds=seeds))
    if records and written:
        files = printable(f"Figure: {output / 'demo.png'}\nValues: {output / 'demo.csv'}")
        console.print(files, markup=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted: only finished runs are included.")
    return 130 if interrupted else 0 if written else 2


def _train_all(methods: Sequence[str], seeds: int, epochs: int, records: list[EpochRecord], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(methods) * seeds * epochs)
        for seed in range(seeds):
            for method in methods:
                progress.update(task, description=f"{method:>8}, seed {seed}, epochs")
                records += train(method, DEMO_METHODS[method](), seed, epochs, tick=lambda: progress.advance(task))


def _write(records: list[EpochRecord], output: Path) -> bool:
    """Write the files, before anything is printed; return whether that succeeded."""
    try:
        write_csv(records, output / "demo.csv")
        draw(records, output / "demo.png")
    except OSError as error:
        complain(f"lightning-gr: error: cannot write to the folder {output}: {error.strerror or error}")
        return False
    return True


def _show(records: list[EpochRecord], costs: dict[str, float], console: Console, title: str) -> None:
    """Print the table and the verdicts."""
    console.print(make_table(records, costs, title))
    for line in verdicts(records):
        console.print(printable(line))
