"""Prints a panel before training and a table after it, laid out for an 80-column terminal or a file."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gr._compat import has_base_named, stop_progress_bars
from lightning_gr.report.console import make_outputs_printable, printable, show
from lightning_gr.report.measurement import METRICS

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from lightning_gr.report.step_report import StepReport

__all__ = ["Summary", "make_panel", "make_table", "show_end", "show_start", "shows"]


@dataclass(frozen=True)
class Summary:
    """A callback's description of itself, printed before training.

    Args:
        title: The method's usual name.
        lines: The rows of the panel: label to text, in display order.
        verbose: Whether to print it.
    """

    title: str
    lines: dict[str, str] = field(default_factory=dict)
    verbose: bool = True


def shows(trainer: "Trainer") -> bool:
    """Whether Lightning itself prints on this rank: a progress bar or a model summary."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    prints = any(has_base_named(callback, "ProgressBar", "ModelSummary") for callback in callbacks)
    return prints and trainer.is_global_zero and not trainer.barebones


def show_start(summary: Summary, trainer: "Trainer") -> None:
    """Print the panel. Call this before the first progress bar starts."""
    if any(has_base_named(callback, "RichProgressBar") for callback in trainer.callbacks):  # type: ignore[attr-defined]
        # Lightning chooses this bar where rich is installed, as it is with us; its bullets would end the training
        make_outputs_printable()
    if summary.verbose and shows(trainer):
        show(make_panel(summary))


def make_panel(summary: Summary) -> Panel:
    """Build the panel at the start of training, with one row per line of the summary."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for key, value in summary.lines.items():
        grid.add_row(Text(printable(key)), Text(printable(value)))
    return Panel(grid, title=Text(printable(summary.title)), title_align="left", expand=False)


def show_end(report: "StepReport", title: str, trainer: "Trainer", *, verbose: bool) -> None:
    """Stop the progress bars and print the table below them, if there was an optimizer step."""
    if report.steps and verbose and shows(trainer):
        stop_progress_bars(trainer)
        show(make_table(report, title))


def make_table(report: "StepReport", title: str) -> Group:
    """Build the table at the end of training, with the range of each metric. This synchronizes with the device."""
    table = Table(title=Text(printable(f"{title}, logged steps"), style="table.title"), title_justify="left")
    table.add_column("metric", overflow="fold")
    for name in ("first", "last", "min", "max"):
        table.add_column(name, justify="right", overflow="fold")
    for key, values in report.log.ranges.items():
        if key.rpartition("/")[2] in METRICS:
            table.add_row(Text(printable(report.log.prefix + key)), *(f"{value.item():.4g}" for value in values))
    line = Text(f"regularized: {report.regularized:,} of {report.steps:,} steps")
    return Group(*([table] if table.row_count else []), line)
