"""What the methods cost on a GPU: time, memory, vector work, torch.compile, and two ranks on one card.

``python benchmarks/gpu.py`` measures everything on the first GPU; its results have not been looked at so far, since no
GPU was available. ``--device cpu --quick`` tries the program in miniature, and ``--read`` shows earlier results.
"""

import argparse
import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from large import LARGE, TINY
from measuring import quiet
from on_device import Effort, cpu_peak, time_copies, time_pass, train, train_on_ranks, vector_passes
from rich.console import Console
from rich.table import Table
from step_cost import LOOK

PRECISIONS = ("32-true", "bf16-mixed")
METHODS = ("plain", "flooding", "F-GR", "B-GR", "SAM", "ASAM", "Momentum-SAM")
OTHERS = ("SAM, by hand", "SAM, pytorch_optimizer", "double backward")
VECTORS = ("F-GR", "SAM", "Momentum-SAM")  # measured in the other parts
QUICK = Effort(warm_up=2, steps=2, copied=2**22)


class Row(NamedTuple):
    """One measured value."""

    part: str
    model: str
    precision: str
    way: str
    quantity: str
    round: int
    value: float


class Bench:
    """The settings of the command line, and the console."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.device, self.console, self.ways = torch.device(args.device), console, ["plain", *args.ways]
        self.models = {name: (TINY if args.quick else LARGE)[name] for name in args.models}
        self.rounds, self.effort = (1, QUICK) if args.quick else (args.rounds, Effort())
        self.backend = "aot_eager" if args.quick else "inductor"

    def few(self) -> list[str]:
        """The methods of the parts that do not compare all."""
        return [way for way in self.ways if way in ("plain", *VECTORS)]

    def refused(self, *what: str, error: Exception) -> None:
        """Say what does not run, such as double backward through fused attention."""
        reason = next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        self.console.print(f"{', '.join(what)}: {reason[:200]}", highlight=False, markup=False)

    def cost(self) -> Iterator[Row]:
        """The time of a step and its peak of memory, in alternating rounds."""
        for model, workload in self.models.items():
            for precision in PRECISIONS:
                failed: set[str] = set()
                for number in range(self.rounds):
                    for way in [way for way in self.ways if way not in failed]:
                        try:
                            spent = train(workload, way, precision, self.device, self.effort)
                        except RuntimeError as error:
                            failed.add(way)
                            self.refused(model, precision, way, error=error)
                            continue
                        yield Row("cost", model, precision, way, "seconds", number, spent.seconds)
                        if self.device.type == "cuda":
                            yield Row("cost", model, precision, way, "peak", number, spent.peak)

    def memory(self) -> Iterator[Row]:
        """The peak on a CPU, from a profile; on a GPU it is part of `cost`."""
        for model, workload in self.models.items() if self.device.type == "cpu" else ():
            for way in self.few():
                yield Row("cost", model, "32-true", way, "peak", 0, cpu_peak(workload, way))

    def bandwidth(self) -> Iterator[Row]:
        """What the least vector work would take: bytes moved, and the rate of a copy."""
        yield Row("bandwidth", "", "", "", "bytes per second", 0, time_copies(self.device, self.effort))
        for way, passes in vector_passes([way for way in self.few() if way != "plain"]).items():
            yield Row("bandwidth", "", "", way, "passes", 0, passes)
        for model, workload in self.models.items():
            size = sum(p.nbytes for p in workload.model().parameters())
            yield Row("bandwidth", model, "", "", "parameter bytes", 0, size)
            for number in range(self.rounds):
                seconds = time_pass(workload, "32-true", self.device, self.effort)
                yield Row("bandwidth", model, "32-true", "", "seconds of a pass", number, seconds)

    def compile(self) -> Iterator[Row]:
        """The time of a step with a compiled network."""
        for model, workload in self.models.items():
            for number in range(self.rounds):
                for way in self.few():
                    try:
                        spent = train(workload, way, "32-true", self.device, self.effort, self.backend)
                    except Exception as error:  # the compiler has exceptions of its own
                        self.refused(model, "torch.compile", way, error=error)
                        continue
                    yield Row("compile", model, "32-true", way, "seconds", number, spent.seconds)

    def ranks(self) -> Iterator[Row]:
        """Two ranks on the device: with NCCL, and with gloo if NCCL refuses."""
        model = next(iter(self.models))
        for backend in ("nccl", "gloo") if self.device.type == "cuda" else ("gloo",):
            try:
                found = train_on_ranks(self.models[model], self.few(), self.device, backend, self.effort, limit=300)
            except Exception as error:  # what a rank raised
                self.refused("two ranks on one device", backend, error=error)
                continue
            for way, (seconds, apart) in found.items():
                yield Row("ranks", model, backend, way, "seconds", 0, seconds)
                yield Row("ranks", model, backend, way, "apart", 0, apart)
            return


PARTS = ("cost", "memory", "bandwidth", "compile", "ranks")


def _values(rows: Sequence[Row], part: str, model: str, precision: str, way: str, quantity: str) -> list[float]:
    key = part, model, precision, way, quantity
    return [row.value for row in rows if row[:5] == key]


def _ratios(rows: Sequence[Row], part: str, model: str, precision: str, way: str, quantity: str) -> str:
    """The median ratio to plain training in the same round."""
    plain, own = (
        {r.round: r.value for r in rows if r[:5] == (part, model, precision, w, quantity)} for w in ("plain", way)
    )
    found = [own[number] / plain[number] for number in own if plain.get(number)]
    return f"{statistics.median(found):.2f}" if found else "–"


def _per_way(
    rows: Sequence[Row], title: str, part: str, precision: str, quantity: str, unit: str, factor: float
) -> Table:
    """A table of ratios to plain training, with the values of plain training in the last line."""
    chosen = [row for row in rows if (row.part, row.precision, row.quantity) == (part, precision, quantity)]
    models = list(dict.fromkeys(row.model for row in chosen))
    table = Table(title=title, **LOOK)
    table.add_column("")
    for model in models:
        table.add_column(model, justify="right")
    for way in dict.fromkeys(row.way for row in chosen):
        table.add_row(way, *(_ratios(rows, part, model, precision, way, quantity) for model in models))
    plain = [_values(rows, part, model, precision, "plain", quantity) for model in models]
    table.add_section()
    table.add_row(f"plain, in {unit}", *(f"{factor * statistics.median(found):.1f}" for found in plain))
    return table


def _floor(rows: Sequence[Row]) -> Table:
    """A table of the vector work: the least time that its bytes take, and what a step takes beyond its passes."""
    rate = next(row.value for row in rows if row.quantity == "bytes per second")
    table = Table(title=f"Vector work in ms, with copies at {rate / 1e9:.0f} GB/s (32-true)", **LOOK)
    for name in ("model", "method", "passes over\nparameters", "at least", "measured", "plain step"):
        table.add_column(name, justify="left" if name in ("model", "method") else "right")
    for row in [row for row in rows if row.quantity == "parameter bytes"]:
        plain = _values(rows, "cost", row.model, "32-true", "plain", "seconds")
        one_pass = statistics.median(_values(rows, "bandwidth", row.model, "32-true", "", "seconds of a pass"))
        for way, passes in {r.way: r.value for r in rows if r.quantity == "passes"}.items():
            further = 0 if way == "Momentum-SAM" else 1
            own = _values(rows, "cost", row.model, "32-true", way, "seconds")
            least = passes * row.value / rate
            spent = statistics.median(own) - statistics.median(plain) - further * one_pass if own and plain else None
            cells = (least, spent, statistics.median(plain) if plain else None)
            shown = ("–" if value is None else f"{1000 * value:.2f}" for value in cells)
            table.add_row(row.model, way, f"{passes:.1f}", *shown)
    return table


def _ranks(rows: Sequence[Row]) -> Table:
    chosen = [row for row in rows if row.part == "ranks" and row.quantity == "seconds"]
    table = Table(title=f"Two ranks on one device: {chosen[0].model}, DDP with {chosen[0].precision}", **LOOK)
    for name in ("", "ms per step", "ratio", "weights apart"):
        table.add_column(name, justify="right" if name else "left")
    for row in chosen:
        [apart] = _values(rows, "ranks", row.model, row.precision, row.way, "apart")
        ratio = _ratios(rows, "ranks", row.model, row.precision, row.way, "seconds")
        table.add_row(row.way, f"{1000 * row.value:.1f}", ratio, f"{apart:.1g}")
    return table


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Build all tables for which there are values."""
    for precision in PRECISIONS:
        for title, quantity, unit, factor in (
            ("Step time relative to plain training", "seconds", "ms", 1e3),
            ("Peak memory relative to plain training", "peak", "MiB", 2**-20),
        ):
            if any(row[:1] + row[2:3] + row[4:5] == ("cost", precision, quantity) for row in rows):
                yield _per_way(rows, f"{title}, {precision}", "cost", precision, quantity, unit, factor)
    if any(row.part == "bandwidth" for row in rows):
        yield _floor(rows)
    if any(row.part == "compile" for row in rows):
        title = "Compiled networks: step time relative to compiled plain training, 32-true"
        yield _per_way(rows, title, "compile", "32-true", "seconds", "ms", 1e3)
    if any(row.part == "ranks" for row in rows):
        yield _ranks(rows)


def read_rows(path: Path) -> list[Row]:
    """Read the rows of an earlier run."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(*list(r.values())[:5], int(r["round"]), float(r["value"])) for r in csv.DictReader(file)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, …, or cpu to try the program")
    parser.add_argument("--quick", action="store_true", help="one round of two steps with tiny models")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per method, default: 5")
    parser.add_argument("--models", nargs="+", choices=LARGE, default=list(LARGE), metavar="NAME")
    ways = [way for way in (*METHODS, *OTHERS) if way != "plain"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument("--csv", type=Path, help="write all values to this file after each part")
    parser.add_argument("--read", type=Path, help="show the values in such a file instead of measuring")
    args = parser.parse_args()
    if not args.read and args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU is available; `--device cpu --quick` tries the program")
    return args


def main() -> None:
    """Parse the command line, then measure or read the values and print the tables."""
    args, console = _parse(), Console()
    rows = read_rows(args.read) if args.read else []
    if not args.read:
        bench = Bench(args, console)
        for part in args.parts:
            with quiet(), console.status(part):
                rows += getattr(bench, part)()
            if args.csv:
                with args.csv.open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([Row._fields, *rows])
    for table in tables(rows):
        console.print(table)


if __name__ == "__main__":
    main()
