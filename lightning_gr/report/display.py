"""What is printed around training: a panel at its start and a table at its end, in a terminal of 80 columns or a file.

Nothing that is printed stops a training: where standard output cannot encode the field's letters it gets their names,
and an output that is closed or full is reported by a warning.
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
    """What a callback says of itself before training.

    Args:
        title: The method's usual name.
        lines: What it will do: a text for each label, in the order in which they are shown.
        verbose: Whether it is to be shown at all.
    """

    title: str
    lines: dict[str, str] = field(default_factory=dict)
    verbose: bool = True


def shows(trainer: "Trainer") -> bool:
    """Whether Lightning shows something itself, on this rank: a progress bar or a summary of the model."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    loud = any(has_base_named(callback, "ProgressBar", "ModelSummary") for callback in callbacks)
    return loud and trainer.is_global_zero and not trainer.barebones


def show_start(summary: Summary, trainer: "Trainer") -> None:
    """Print the panel, which must come before the first progress bar."""
    if summary.verbose and shows(trainer):
        show(make_panel(summary))


def make_panel(summary: Summary) -> Panel:
    """The panel at the start of training: one row for each line of the summary."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for key, value in summary.lines.items():
        grid.add_row(Text(printable(key)), Text(printable(value)))
    return Panel(grid, title=Text(printable(summary.title)), title_align="left", expand=False)


def show_end(report: "StepReport", title: str, trainer: "Trainer", *, verbose: bool) -> None:
    """Print the table, below progress bars that are stopped for it."""
    if verbose and shows(trainer):
        stop_progress_bars(trainer)
        show(make_table(report, title))


def make_table(report: "StepReport", title: str) -> Group:
    """The table at the end of training: the range of each metric. It reads from the device."""
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
    """Print to where standard output goes now, which may have been redirected since the last time.

    Args:
        content: A text or anything else that rich prints.
        options: Those of rich's ``Console.print``.
    """
    make_console().print(content, **options)


def make_console() -> Console:
    """A console of rich that writes to standard output, with frames in ASCII where the encoding asks for them."""
    return Console(file=cast(IO[str], _Output()), highlight=False)


def printable(text: str) -> str:
    """The text as standard output can encode it: ``gamma`` for γ where it must, before columns are aligned."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_IN_ASCII).encode(encoding, "replace").decode(encoding)
    return text


class _Output:
    """Standard output, except that writing to it raises nothing."""

    def __init__(self) -> None:
        # behind rich's proxy, which would print into a live progress bar; None where the program began without one
        self.stream: Any = getattr(sys.stdout, "rich_proxied_file", sys.stdout) or io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(printable(text))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            _report(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            _report(error)


def _report(error: Exception) -> None:
    warnings.warn(f"lightning_gr could not print to standard output: {error}", stacklevel=2)
