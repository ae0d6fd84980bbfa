"""Code shared by the experiments: resumable results in CSV files, their provenance, and the style of the figures."""

import argparse
import csv
import json
import math
import os
import platform
import shlex
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
IN_A_ROW = 4  # panels of a figure
FAST = HERE.parent.parent / "outputs" / "paper-fast"
PACKAGES = ("lightning_gr", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-learn", "mnist1d", "mlxtend")

# Okabe and Ito's color-blind-safe palette. Each method has the same color and marker in all figures
COLORS = {
    "plain": "#000000",
    "DB": "#D55E00",
    "B-GR": "#E69F00",
    "F-GR": "#0072B2",
    "SAM": "#CC79A7",
    "ASAM": "#56B4E9",
    "flooding": "#009E73",
    "GR+flooding": "#8A7500",
    "MSAM": "#7B3294",
    "nesterov": "#888888",
    "plain, untuned": "#A0522D",
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
    "MSAM": "p",
    "nesterov": "h",
    "plain, untuned": "d",
}

console = Console(highlight=False)


def arguments(doc: str, **more) -> argparse.Namespace:
    """Parse the command line of an experiment; ``more`` adds flags."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--fast", action="store_true", help="a small version of a few seconds; keeps the results")
    parser.add_argument("--draw-only", action="store_true", help="show table and figure from the existing results")
    parser.add_argument("--results", type=Path, help="folder for the CSV files; default: results/ next to this file")
    parser.add_argument("--figures", type=Path, help="folder for the figures; default: figures/ next to this file")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    root = FAST if args.fast else HERE
    args.results, args.figures = args.results or root / "results", args.figures or root / "figures"
    args.results.mkdir(parents=True, exist_ok=True)
    args.figures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return args


def text(value) -> str:
    """Format a value for a CSV file. Values read from a file format to the same text."""
    if isinstance(value, float):
        return f"{value:.7g}"
    return "" if value is None else str(value)


def parse(value: str):
    try:
        return float(value) if value else None
    except ValueError:
        return value


def read(path: Path) -> list[dict]:
    """Read the rows of a CSV file, with numbers as floats."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: parse(value) for name, value in row.items()} for row in csv.DictReader(file)]


def run_missing(args, name: str, runs: list[dict], measure) -> list[dict]:
    """Measure the runs that are missing in a CSV file, and return the rows of all ``runs`` in order.

    Each finished run is written immediately, so that an interrupted experiment can resume.

    Args:
        args: The command line, with the folder and whether to measure.
        name: The name of the CSV file. A JSON file next to it records the command and versions that produced it.
        runs: The settings of each run, all with the same names.
        measure: Takes the settings as keywords and returns the measured values, or a list of them for several rows.
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
        raise SystemExit(f"A CSV file in an older format lacks the columns {absent}: delete it to run again")
    return tuple(text(parse(text(row[name]))) for name in names)


def _append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(rows[0])
        writer.writerows([text(value) for value in row.values()] for row in rows)


def _with_progress(name: str, runs: list[dict], measure):
    """Yield each run with its values; show a progress bar in a terminal, or else a line every 30 seconds."""
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
    """Record the command and the versions that produce the values."""
    file = path.with_suffix(".json")
    origins = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    program = Path(sys.argv[0])
    origin = {
        "command": shlex.join(["python", f"examples/paper/{program.name}", *_public(sys.argv[1:])]),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if origin not in origins:
        origins.append(origin)
        file.write_text(json.dumps(origins, indent=1) + "\n", encoding="utf-8")


def _public(flags: list[str]) -> list[str]:
    """Strip local folders from flags."""
    return [Path(flag).name if "/" in flag else flag for flag in flags]


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "absent"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread / len(values) ** 0.5


def plus_minus(values: list[float], digits: int = 1, factor: float = 1.0) -> str:
    mean, error = mean_and_error([factor * value for value in values])
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def new_table(title: str, text_columns: list[str], number_columns: list[str], caption: str | None = None) -> Table:
    """Create a table that fits 80 columns."""
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
    """Create a figure and its axes, always as a two-dimensional array."""
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


def new_panels(count: int, height: float) -> tuple:
    """Create a figure with ``count`` panels of this height in inches, at most ``IN_A_ROW``; return it and its axes."""
    wide = min(count, IN_A_ROW)
    high = math.ceil(count / wide)
    figure, axes = new_figure(high, wide, 3.6 * wide, height * high)
    for one in axes.flat[count:]:
        one.remove()
    return figure, list(axes.flat[:count])


def save(figure, folder: Path, name: str) -> None:
    """Save as PNG and SVG; the same values give the same bytes."""
    figure.savefig(folder / f"{name}.png", dpi=95)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    say(f"Figure: {folder / name}.png")


def main(experiment) -> None:
    """Run an experiment, and exit quietly on Ctrl-C."""
    try:
        experiment()
    except KeyboardInterrupt:
        console.print("Interrupted: finished runs are saved; run the same command again to continue.")
        sys.exit(130)
