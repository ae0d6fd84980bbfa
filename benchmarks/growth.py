"""The growth of a step's cost with parameters, tensors, batch size and world size.

``python benchmarks/growth.py`` takes about ten minutes on two cores. ``docs/performance.md`` explains the table.
"""

import argparse
import csv
import os
import socket
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import STEPS, WARM_UP, Clock, Same, make_trainer, quiet, time_steps
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_cost import LOOK
from ways import WAYS
from workloads import Deep, Workload, make_mlp

CHOSEN = ("plain", "F-GR", "SAM")


class Row(NamedTuple):
    """The median CPU time of a step in one round, in seconds."""

    axis: str
    size: int
    way: str
    round: int
    seconds: float


def _mlp(width: int, batch: int) -> Workload:
    return Workload(lambda: make_mlp(*[width] * 7), lambda: (torch.randn(batch, width), torch.randint(width, (batch,))))


def _deep(tensors: int) -> Workload:
    return Workload(lambda: Deep(tensors), lambda: (torch.randn(16, 8), torch.randint(8, (16,))))


# parameters: six square layers, batch 2; tensors: 36 elements on average; batch: 0.4 M parameters
AXES: dict[str, dict[int, Workload]] = {
    "parameters": {6 * w * (w + 1): _mlp(w, 2) for w in (128, 408, 1290, 4082)},
    "tensors": {n: _deep(n) for n in (10, 100, 1000, 5000)},
    "batch": {n: _mlp(256, n) for n in (8, 64, 512, 4096)},
}


def measure(axis: str, size: int, rounds: int) -> list[Row]:
    """Measure one model with all methods, alternating between them."""
    times = time_steps(AXES[axis][size], CHOSEN, rounds, 2 if size >= 10**6 else STEPS)
    return [
        Row(axis, size, way, number, statistics.median(t.cpu for t in taken))
        for way, of_rounds in times.items()
        for number, taken in enumerate(of_rounds)
    ]


def measure_ranks(rounds: int) -> list[Row]:
    """Measure DDP on one and two ranks in new processes, using the CPU time of the first rank."""
    rows = []
    for ranks in (1, 2):
        results = torch.multiprocessing.get_context("spawn").SimpleQueue()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        torch.multiprocessing.spawn(_work, args=(ranks, port, rounds, results), nprocs=ranks, daemon=True)
        rows += [Row("ranks", ranks, *row) for row in results.get()]
    return rows


def _work(rank: int, ranks: int, port: int, rounds: int, results: Any) -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in variables.items()})
    work = _mlp(512, 128)
    with quiet():
        rows = [(way, number, _ddp_step(work, way, ranks)) for number in range(rounds) for way in CHOSEN]
    if rank == 0:
        results.put(rows)
    torch.distributed.destroy_process_group()


def _ddp_step(work: Workload, way: str, ranks: int) -> float:
    torch.manual_seed(0)
    clock = Clock(WARM_UP)
    options = {"devices": ranks, "strategy": DDPStrategy(), "plugins": [LightningEnvironment()]}
    trainer = make_trainer(clock, *WAYS[way].callbacks(), **options, use_distributed_sampler=False)
    trainer.fit(WAYS[way].module(work.model()), Same(work.batch(), WARM_UP + STEPS + 1))
    return statistics.median(timing.cpu for timing in clock.steps)


def make_table(rows: Sequence[Row]) -> Table:
    """Build a table of ratios to plain training, and of the difference between F-GR and two plain steps."""
    table = Table(title="Step time by size (CPU time)", **LOOK)
    for name in ("", "size", "plain, ms", "F-GR", "SAM", "F-GR minus\n2 plain, ms"):
        table.add_column(name, justify="left" if not name else "right")
    for axis in dict.fromkeys(row.axis for row in rows):
        for size in dict.fromkeys(row.size for row in rows if row.axis == axis):
            table.add_row(axis, f"{size:,}", *_cells([row for row in rows if (row.axis, row.size) == (axis, size)]))
        table.add_section()
    return table


def _cells(rows: Sequence[Row]) -> Iterator[str]:
    seconds = {(row.way, row.round): row.seconds for row in rows}
    rounds = sorted({row.round for row in rows})
    yield f"{1000 * statistics.median(seconds['plain', n] for n in rounds):.2f}"
    for way in CHOSEN[1:]:
        yield f"{statistics.median(seconds[way, n] / seconds['plain', n] for n in rounds):.2f}"
    yield f"{1000 * statistics.median(seconds['F-GR', n] - 2 * seconds['plain', n] for n in rounds):.2f}"


def main() -> None:
    """Parse the command line, then measure or read the values and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds per method, default: 3")
    parser.add_argument("--csv", type=Path, help="write all values to this file")
    parser.add_argument("--read", type=Path, help="show the values in such a file instead of measuring")
    args = parser.parse_args()
    if args.read:
        with args.read.open(newline="", encoding="utf-8") as file:
            rows = [
                Row(r["axis"], int(r["size"]), r["way"], int(r["round"]), float(r["seconds"]))
                for r in csv.DictReader(file)
            ]
    else:
        with quiet():
            rows = [
                row for axis in AXES for size in track(AXES[axis], axis) for row in measure(axis, size, args.rounds)
            ]
        rows += measure_ranks(args.rounds)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    Console().print(make_table(rows))


if __name__ == "__main__":
    main()
