"""Prints a panel before training and a table after it, laid out for an 80-column terminal or a file.

Printing never stops training. If standard output cannot encode Greek letters and math symbols, their names are printed
instead. If it is closed or the disk is full, a warning is issued.
"""

import io
import sys
import warnings
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gr._compat import has_base_named, stop_progress_bars
from lightning_gr.report.measurement import METRICS

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from lightning_gr.report.step_report import StepReport

__all__ = [
    "Summary",
    "make_console",
    "make_panel",
    "make_table",
    "printable",
    "show",
    "show_end",
    "show_start",
    "shows",
]

_IN_ASCII = str.maketrans(
    {
        "γ": "gamma", "ε": "epsilon", "ρ": "rho", "η": "eta", "θ": "theta", "λ": "lambda", "Σ": "sum", "∇": "grad ",
        "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "⊙": "*", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~",
        "‖": "||", "²": "^2", "₀": "_0", "ₖ": "_k", "…": ".", "’": "'",
    }
)  # fmt: skip


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
    """Stop the progress bars and print the table below them."""
    if verbose and shows(trainer):
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


def show(content: Any, **options: Any) -> None:
    """Print to the current standard output, which may have been redirected since the last call.

    Args:
        content: Text, or anything else that rich can print.
        options: Passed to rich's ``Console.print``.
    """
    make_console().print(content, **options)


def make_console() -> Console:
    """Create a rich console for standard output; rich draws ASCII boxes if the encoding requires it."""
    return Console(file=cast(IO[str], _Output()), highlight=False)


def printable(text: str) -> str:
    """Replace characters that standard output cannot encode, such as γ by ``gamma``. Call before aligning columns."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_IN_ASCII).encode(encoding, "replace").decode(encoding)
    return text


class _Output:
    """A wrapper around standard output whose writes never raise."""

    def __init__(self) -> None:
        # bypass rich's proxy, which would print into a live progress bar; stdout is None if the program has none
        self.stream: Any = getattr(sys.stdout, "rich_proxied_file", sys.stdout) or io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(printable(text))
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            _warn(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(f"lightning_gr could not print to standard output: {error}", stacklevel=2)
