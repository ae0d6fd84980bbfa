"""The cost of a step: plain training, our methods, other SAM implementations and double backward, in one run.

``python benchmarks/step_cost.py`` takes about half an hour on one core, and ``--quick`` half a minute. ``--read`` shows
the results of an earlier run. ``docs/performance.md`` explains the tables.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from measuring import STEPS, WARM_UP, count, count_pass, quiet, time_steps
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from ways import WAYS
from workloads import WORKLOADS

LOOK = {"box": SIMPLE, "title_justify": "left", "title_style": "bold", "padding": (0, 1), "pad_edge": False}
NARROW = {**LOOK, "padding": (0, 1, 0, 0)}
FEW = {"100 M": 2}  # steps per round, where they take long
COUNTED = ("MLP, 32", "1,000 tensors")
QUICK = ("MLP, 32",)


class Row(NamedTuple):
    """One measured value."""

    workload: str
    way: str
    quantity: str
    round: int
    value: float


def measure_times(workload: str, ways: Sequence[str], rounds: int, steps: int, warm_up: int = WARM_UP) -> list[Row]:
    """Measure the median step time of each round, in seconds."""
    times = time_steps(WORKLOADS[workload], ways, rounds, steps, warm_up)
    rows = []
    for way, of_rounds in times.items():
        for number, taken in enumerate(of_rounds):
            rows.append(Row(workload, way, "cpu", number, statistics.median(t.cpu for t in taken)))
            rows.append(Row(workload, way, "wall", number, statistics.median(t.wall for t in taken)))
    return rows


def measure_counts(workload: str, ways: Sequence[str]) -> list[Row]:
    """Count what each method does in addition to plain training and its further forward and backward passes."""
    chosen = WORKLOADS[workload]
    size = sum(p.nbytes for p in chosen.model().parameters())
    plain, one_pass = count(chosen, "plain"), count_pass(chosen)
    rows = []
    for way in [name for name in ways if name != "plain"]:
        further = 0 if way in ("flooding", "Momentum-SAM") else 2 if way == "central" else 1
        counts = count(chosen, way)
        values = {
            "operators": counts.operators - plain.operators - further * one_pass.operators,
            "passes": (counts.bytes - plain.bytes - further * one_pass.bytes) / size,
            "syncs": counts.syncs - plain.syncs,
            "memory": (counts.peak - plain.peak) / size,
        }
        rows += [Row(workload, way, quantity, 0, value) for quantity, value in values.items()]
    return rows


def measure_imports(repeats: int) -> list[Row]:
    """Measure the CPU time to import Lightning without and with this package, in new processes."""
    rows = []
    for number in range(repeats):
        for what in ("pytorch_lightning", "pytorch_lightning, lightning_gr"):
            code = f"import time, {what}; print(time.process_time())"
            printed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True)
            rows.append(Row(what, "", "import", number, float(printed.stdout)))
    return rows


def ratios(rows: Iterable[Row], workload: str, way: str, clock: str) -> list[float]:
    """The step time relative to plain training in the same round, for each round."""
    chosen = {(row.way, row.round): row.value for row in rows if (row.workload, row.quantity) == (workload, clock)}
    rounds = sorted(number for name, number in chosen if name == way)
    return [chosen[way, number] / chosen["plain", number] for number in rounds]


def time_table(rows: Sequence[Row], clock: str) -> Table:
    """Build a table of ratios to plain training: the median over rounds and half the interquartile range."""
    title = {"cpu": "CPU time", "wall": "wall-clock time"}[clock]
    table = Table(title=f"Step time relative to plain training ({title})", **NARROW)
    table.add_column("", no_wrap=True)
    measured = {row.workload for row in rows if row.quantity == clock}
    timed = [workload for workload in WORKLOADS if workload in measured]
    for workload in timed:
        table.add_column(workload.replace(" ", "\n").replace("transformer", "trans-\nformer"), justify="right")
    measured_ways = {row.way for row in rows if row.quantity == clock}
    for way in [way for way in WAYS if way in measured_ways]:
        shown = way.replace("optimizer", "opt.")
        table.add_row(shown, *(_ratio(ratios(rows, workload, way, clock)) for workload in timed))
    plain = [[r.value for r in rows if (r.workload, r.way, r.quantity) == (w, "plain", clock)] for w in timed]
    table.add_section()
    table.add_row("plain, in ms", *(f"{1000 * statistics.median(values):.1f}" for values in plain))
    return table


def _ratio(values: list[float]) -> str:
    if not values:
        return "–"
    if len(values) < 2:
        return f"{values[0]:.2f}"
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    spread = (quartiles[2] - quartiles[0]) / 2
    shown = f"{spread:.2f}".removeprefix("0") if spread < 1 else f"{spread:.1f}"
    return f"{quartiles[1]:.2f}±{shown}"


COUNTS = {"operators": "opera-\ntors", "passes": "passes", "syncs": "syncs", "memory": "memory"}


def count_table(rows: Sequence[Row], workload: str) -> Table:
    """Build a table of the counts of :func:`measure_counts`."""
    table = Table(title=f"{workload}: beyond plain training and extra passes", **LOOK)
    table.add_column("")
    for heading in COUNTS.values():
        table.add_column(heading, justify="right")
    values = {(row.way, row.quantity): row.value for row in rows if row.workload == workload}
    for way in [way for way in WAYS if (way, "passes") in values]:
        cells = [values[way, quantity] for quantity in COUNTS]
        table.add_row(way, f"{cells[0]:.0f}", f"{cells[1]:.1f}", f"{cells[2]:.0f}", f"{cells[3]:.1f}")
    return table


def tables(rows: Sequence[Row]) -> list[Table]:
    """Build all tables for which there are values."""
    counted = {row.workload: None for row in rows if row.quantity == "passes"}
    return [*(time_table(rows, clock) for clock in ("cpu", "wall")), *(count_table(rows, name) for name in counted)]


def import_line(rows: Sequence[Row]) -> str:
    """Summarize the import times."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if row.quantity == "import":
            seconds.setdefault(row.workload, []).append(row.value)
    without, with_it = (min(values) for values in seconds.values())
    return f"import pytorch_lightning: {without:.2f} s of CPU time; with lightning_gr: {with_it - without:+.2f} s"


def measure(
    workloads: Sequence[str], ways: Sequence[str], rounds: int, quick: bool, console: Console
) -> Iterator[list[Row]]:
    """The rows of one workload after the other, and of importing."""
    for workload in workloads:
        with quiet(), console.status(f"timing {workload}"):
            if quick:
                rows = measure_times(workload, ways, 1, 2, warm_up=1)
            else:
                rows = measure_times(workload, ways, rounds, FEW.get(workload, STEPS))
        if workload in COUNTED:
            with quiet(), console.status(f"counting {workload}"):
                rows += measure_counts(workload, ways)
        yield rows
    yield measure_imports(1 if quick else 3)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows to a CSV file, keeping its rows of other workloads."""
    new = {row.workload for row in rows}
    old = [row for row in read_rows(path) if row.workload not in new] if path.exists() else []
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Row._fields, *old, *rows])


def read_rows(path: Path) -> list[Row]:
    """Read rows that :func:`write_rows` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(r["workload"], r["way"], r["quantity"], int(r["round"]), float(r["value"]))
            for r in csv.DictReader(file)
        ]


def main() -> None:
    """Parse the command line, then measure or read the values and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds per method, default: 5")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    others = [way for way in WAYS if way != "plain"]
    parser.add_argument("--ways", nargs="+", choices=others, default=others, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one short round with the smallest model")
    parser.add_argument("--csv", type=Path, help="write all values to this file after each model")
    parser.add_argument("--read", type=Path, help="show the values in such a file instead of measuring")
    args = parser.parse_args()
    console = Console()
    workloads = QUICK if args.quick else args.workloads
    rows = read_rows(args.read) if args.read else []
    for more in [] if args.read else measure(workloads, ["plain", *args.ways], args.rounds, args.quick, console):
        rows += more
        if args.csv:
            write_rows(rows, args.csv)
    for table in tables(rows):
        console.print(table)
    console.print(import_line(rows), highlight=False)


if __name__ == "__main__":
    main()
