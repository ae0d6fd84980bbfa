"""The communication of an optimizer step, counted on two CPU ranks, and when it dominates, calculated.

``python benchmarks/communication.py`` counts; ``--calculate`` calculates. ``docs/scaling.md`` explains both.
"""

import argparse
import csv
from pathlib import Path

import step_time
from counting import CASES, Sent, start
from rich.console import Console
from rich.table import Table

BULK = {"DDP": ("all-reduce",)} | dict.fromkeys(("FSDP1", "FSDP2"), ("all-gather", "reduce-scatter"))
HEADINGS = {
    "all-reduce": "all-\nreduces",
    "all-gather": "all-\ngathers",
    "reduce-scatter": "reduce-\nscatters",
    "broadcast": "broad-\ncasts",
    "barrier": "bar-\nriers",
}


def tables(sent: list[Sent]) -> list[Table]:
    """Build one table for DDP and one each for FSDP1 and FSDP2."""
    made = []
    for name, bulk in BULK.items():
        chosen = {(s.case, s.kind): s for s in sent if (CASES[s.case].sharded or "DDP") == name}
        kinds = list(dict.fromkeys([*bulk, *sorted({kind for _, kind in chosen}, reverse=True)]))
        table = Table(title=f"{name}: one optimizer step (first pass + second)", **step_time.LOOK)
        table.add_column("method")
        for kind in kinds:
            table.add_column(HEADINGS.get(kind, f"{kind}s"), justify="right")
            table.add_column("byte/\nparam." if kind in bulk else "byte", justify="right")
        for case in dict.fromkeys(case for case, _ in chosen):
            cells = (cell for kind in kinds for cell in _cells(chosen.get((case, kind)), kind in bulk))
            table.add_row(case.removesuffix(f", {name}"), *cells)
        made.append(table)
    return made


def _cells(sent: Sent | None, relative: bool) -> tuple[str, str]:
    if sent is None:
        return "–", "–"
    size = f"{sent.bytes_per_parameter:.1f}" if relative else f"{sent.bytes:,.0f}"
    return f"{sent.number - sent.in_second_pass:g} + {sent.in_second_pass:g}", size


def show(made: list[Table]) -> None:
    """Print tables, separated by blank lines."""
    console = Console()
    for table in made:
        console.print(table)
        console.print()


def main() -> None:
    """Parse the command line, then count or calculate, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps to count, default: 3")
    parser.add_argument("--csv", type=Path, help="write the counts to this file")
    parser.add_argument("--limit", type=float, default=300, help="timeout in seconds, default: 300")
    parser.add_argument("--calculate", action="store_true", help="calculate step times without running anything")
    args = parser.parse_args()
    if args.calculate:
        return show(step_time.tables())
    sent, other = start(args.steps, args.limit)
    if sent != other:
        raise RuntimeError(f"the ranks sent different things: {sent} and {other}")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Sent._fields, *sent])
    return show(tables(sent))


if __name__ == "__main__":
    main()
