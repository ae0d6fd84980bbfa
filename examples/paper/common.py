"""What the experiments share: resumable results in CSV files, where they came from, and the style of the figures."""

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

HERE = Path(__file__).parent
FAST = HERE.parent.parent / "outputs" / "paper-fast"
PACKAGES = ("lightning_gr", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-learn", "mnist1d")

# Okabe and Ito's palette, which colour-blind readers can tell apart; a colour and a mark stand for the same method
# in each figure
COLOURS = {
    "plain": "#000000",
    "DB": "#D55E00",
    "B-GR": "#E69F00",
    "F-GR": "#0072B2",
    "SAM": "#CC79A7",
    "ASAM": "#56B4E9",
    "flooding": "#009E73",
    "GR+flooding": "#8A7500",
}
MARKS = {
    "plain": "o",
    "DB": "D",
    "B-GR": "v",
    "F-GR": "^",
    "SAM": "s",
    "ASAM": "P",
    "flooding": "X",
    "GR+flooding": "*",
}

console = Console(highlight=False)


def arguments(doc: str, **more) -> argparse.Namespace:
    """The command line of an experiment; ``more`` are further flags."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--fast", action="store_true", help="a small form, a few seconds; does not touch the results")
    parser.add_argument("--draw-only", action="store_true", help="table and figure from the results that are there")
    parser.add_argument("--results", type=Path, help="folder of the CSV files; default: results/ beside this file")
    parser.add_argument("--figures", type=Path, help="folder of the figures; default: figures/ beside this file")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    home = FAST if args.fast else HERE
    args.results, args.figures = args.results or home / "results", args.figures or home / "figures"
    args.results.mkdir(parents=True, exist_ok=True)
    args.figures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return args


def text(value) -> str:
    """How a value stands in a CSV file; the same for one that was read from there."""
    if isinstance(value, float):
        return f"{value:.7g}"
    return "" if value is None else str(value)


def parse(value: str):
    try:
        return float(value) if value else None
    except ValueError:
        return value


def read(path: Path) -> list[dict]:
    """The rows of a CSV file, numbers as floats."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: parse(value) for name, value in row.items()} for row in csv.DictReader(file)]


def run_missing(args, name: str, runs: list[dict], measure) -> list[dict]:
    """Measure what is missing in a CSV file and return the rows of ``runs``, in their order.

    Each finished run is written at once, so that a run that was stopped goes on where it was.

    Args:
        args: The command line: the folder, and whether to measure at all.
        name: Of the CSV file. Beside it, a JSON file says with which command and versions it was made.
        runs: The settings, each with the same names.
        measure: Gets the settings as keywords and returns what it measured, for several rows (a curve) a list.
    """
    path, names = args.results / f"{name}.csv", list(runs[0])
    done: dict[tuple, list[dict]] = {}
    for row in read(path):
        done.setdefault(_key(row, names), []).append(row)
    missing = [] if args.draw_only else [run for run in runs if _key(run, names) not in done]
    if missing:
        _write_origin(path)
    for run, measured in _with_progress(name, missing, measure) if missing else ():
        rows = [{**run, **one} for one in (measured if isinstance(measured, list) else [measured])]
        _append(path, rows)
        done[_key(run, names)] = [{name: parse(text(value)) for name, value in row.items()} for row in rows]
    return [row for run in runs for row in done.get(_key(run, names), [])]


def _key(row: dict, names: list[str]) -> tuple:
    absent = [name for name in names if name not in row]
    if absent:
        raise SystemExit(f"A CSV file of an earlier form lacks the columns {absent}: delete it to run anew")
    return tuple(text(parse(text(row[name]))) for name in names)


def _append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(rows[0])
        writer.writerows([text(value) for value in row.values()] for row in rows)


def _with_progress(name: str, runs: list[dict], measure):
    """Each run and what it gave; a bar in a terminal, else a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    last = began = time.monotonic()
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(name, total=len(runs), visible=console.is_terminal)
        for number, run in enumerate(runs, 1):
            yield run, measure(**run)
            progress.advance(bar)
            now = time.monotonic()
            if not console.is_terminal and (now - last > 30 or number == len(runs)):
                left = (now - began) / number * (len(runs) - number) / 60
                say(f"{name}: {number} of {len(runs)} runs, about {left:.0f} min left")
                last = now


def _write_origin(path: Path) -> None:
    """Say where the numbers came from."""
    file = path.with_suffix(".json")
    origins = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    program = Path(sys.argv[0])
    origin = {
        "command": " ".join(["python", f"examples/paper/{program.name}", *_public(sys.argv[1:])]),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if origin not in origins:
        origins.append(origin)
        file.write_text(json.dumps(origins, indent=1) + "\n", encoding="utf-8")


def _public(flags: list[str]) -> list[str]:
    """Flags without this machine's folders."""
    return [Path(flag).name if "/" in flag else flag for flag in flags]


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "absent"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread / len(values) ** 0.5


def plus_minus(values: list[float], digits: int = 1, factor: float = 1.0) -> str:
    mean, error = mean_and_error([factor * value for value in values])
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def new_table(title: str, text_columns: list[str], number_columns: list[str], caption: str | None = None) -> Table:
    """A table for 80 columns."""
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in text_columns:
        made.add_column(column)
    for column in number_columns:
        made.add_column(column, justify="right")
    return made


def say(sentence: str) -> None:
    """Print without breaking lines."""
    console.print(sentence, soft_wrap=True)


def new_figure(rows: int, columns: int, width: float, height: float):
    """A figure and its axes, always as a two-dimensional array."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "paper", "svg.fonttype": "none"})
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, folder: Path, name: str) -> None:
    """As PNG and SVG, byte for byte the same for the same numbers."""
    figure.savefig(folder / f"{name}.png", dpi=95)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    say(f"Figure: {folder / name}.png")


def main(experiment) -> None:
    """Run, and end quietly on Ctrl-C."""
    try:
        experiment()
    except KeyboardInterrupt:
        console.print("Interrupted: what had finished is kept; the same command goes on from there.")
        sys.exit(130)
