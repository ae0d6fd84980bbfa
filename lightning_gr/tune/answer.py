"""The answer: which methods help, by paired differences over seeds, in a table and one sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lightning_gr.report.console import printable
from lightning_gr.tune.space import PLAIN, Constants
from lightning_gr.tune.trial import Goal

__all__ = ["Row", "TuneResult", "make_tables", "sentence"]

# two-sided 95% quantiles of Student's t distribution, by degrees of freedom
_T = (math.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Row:
    """The final trainings of one method, or of plain training.

    Args:
        method: Its name.
        constants: Its constants.
        values: The metric by seed.
        plain: The metric of plain training by seed.
        cost: The duration of a step relative to plain training; NaN if unknown.
        test: The metric on the test set by seed, if it was evaluated.
        plain_test: That of plain training.
        error: Why there are no values.
    """

    method: str
    constants: Constants = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    plain: dict[int, float] = field(default_factory=dict)
    cost: float = math.nan
    test: dict[int, float] = field(default_factory=dict)
    plain_test: dict[int, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def label(self) -> str:
        """The call that makes it, such as ``"SAM(rho=0.2)"``."""
        inner = ", ".join(f"{name}={value:g}" for name, value in sorted(self.constants.items(), reverse=True))
        return f"{self.method}({inner})" if inner else self.method

    @property
    def mean(self) -> float:
        """The mean of the metric over seeds; NaN without any."""
        return statistics.mean(self.values.values()) if self.values else math.nan

    def gain(self, sign: float) -> "Gain":
        """The improvement over plain training, paired by seed."""
        return Gain.of(self.values, self.plain, sign)


@dataclass(frozen=True)
class Gain:
    """A paired difference to plain training, positive if better.

    Args:
        mean: The mean over seeds.
        error: The standard error of the mean; NaN for one seed.
        count: The number of pairs.
    """

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Mapping[int, float], plain: Mapping[int, float], sign: float) -> "Gain":
        """The difference on the seeds that both have."""
        pairs = [sign * (values[seed] - plain[seed]) for seed in values if seed in plain]
        mean = statistics.mean(pairs) if pairs else math.nan
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        return cls(mean, error, len(pairs))

    @property
    def is_clear(self) -> bool:
        """Whether it lies beyond the spread of seeds: outside the 95% confidence interval around 0."""
        quantile = _T[min(self.count - 1, len(_T) - 1)] if self.count > 0 else math.inf
        return self.count > 1 and abs(self.mean) > quantile * self.error

    @property
    def helps(self) -> bool:
        """Whether it is clear, and better."""
        return self.is_clear and self.mean > 0


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Args:
        goal: The monitored metric.
        rows: The final trainings: plain first, then each method.
        trials: One dictionary per trial of the search.
        ranges: The range test of each method.
        errors: The first error of each method that failed altogether.
    """

    goal: Goal
    rows: list[Row]
    trials: list[dict[str, Any]]
    ranges: dict[str, Any]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Row:
        """The method that helps most, or plain training if none does."""
        helping = [row for row in self.rows[1:] if row.gain(self.goal.sign).helps]
        return max(helping, key=lambda row: row.gain(self.goal.sign).mean, default=self.rows[0])

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        return sentence(self.rows, self.goal)


def in_points(goal: Goal, rows: Sequence[Row]) -> bool:
    """Whether the metric is an accuracy or similar fraction, whose differences are given in points."""
    values = [value for row in rows for value in row.values.values()]
    return goal.mode == "max" and bool(values) and all(0 <= value <= 1 for value in values)


def _number(value: float, spread: float, points: bool, *, signed: bool = False) -> str:
    """A value with its spread, with as many digits as the spread makes meaningful."""
    if math.isnan(value):
        return "–"
    factor = 100.0 if points else 1.0
    digits = 1 if points else _digits(spread if spread > 0 else abs(value) / 100)
    text = f"{factor * value:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(spread) else f"{text} ± {factor * spread:.{digits}f}"


def _digits(spread: float) -> int:
    """Decimals that show two digits of the spread."""
    return max(0, min(8, 1 - math.floor(math.log10(spread)))) if spread > 0 and math.isfinite(spread) else 3


def _spread(values: Mapping[int, float]) -> float:
    return statistics.stdev(values.values()) if len(values) > 1 else math.nan


def sentence(rows: Sequence[Row], goal: Goal) -> str:
    """The answer in one sentence, which says what to use and what it gains and costs."""
    gains = {row.label: row.gain(goal.sign) for row in rows[1:]}
    ordered = sorted((row for row in rows[1:] if row.values), key=lambda row: gains[row.label].mean, reverse=True)
    points = in_points(goal, rows)
    helping = [row for row in ordered if gains[row.label].helps]
    if not helping:
        return _no_help(ordered, gains, goal, points)
    first, *others = (f"{row.label} {{verb}} {_gain(row, goal, points)}" for row in helping)
    return "; ".join([first.format(verb="helps:"), *(other.format(verb="gives") for other in others)]) + "."


def _gain(row: Row, goal: Goal, points: bool) -> str:
    gain = row.gain(goal.sign)
    change = _number(goal.sign * gain.mean, gain.error, points, signed=True)
    unit = "points" if points else f"in {goal.monitor}"
    cost = "" if math.isnan(row.cost) else f" at {row.cost:.1f} times the cost"
    return f"{change} {unit}{cost}"


def _no_help(ordered: Sequence[Row], gains: Mapping[str, Gain], goal: Goal, points: bool) -> str:
    if not ordered:
        return "no method finished."
    best = gains[ordered[0].label]
    if best.count < 2:
        return (
            f"{ordered[0].label} is ahead with {_gain(ordered[0], goal, points)}, but with one seed the spread of seeds"
            " is unknown: start again with --seeds 3."
        )
    if best.mean > best.error > 0:
        return (
            f"no method helps here beyond the spread of seeds; {ordered[0].label} comes closest with"
            f" {_gain(ordered[0], goal, points)}: start again with more --seeds to decide."
        )
    return "no method helps here beyond the spread of seeds."


def make_tables(result: TuneResult) -> list[Table]:
    """Build the table, with one row for plain training and for each method, and that of the test set, if evaluated."""
    rows, goal = result.rows, result.goal
    caption = (
        f"{goal.monitor} after the last validation; it also chose the constants."
        " ± is the standard deviation over seeds, for differences the standard error over paired seeds."
    )
    points, seeds = in_points(goal, rows), max((len(row.values) for row in rows), default=0)
    title = f"final trainings, {seeds} seed{'' if seeds == 1 else 's'} each"
    table = _new_table(title, caption, f"{goal.monitor}{' %' if points else ''}", "− plain", "step cost")
    for row in rows:
        cost = "–" if math.isnan(row.cost) else f"{row.cost:.2f}×"
        table.add_row(*map(printable, [*_names(row), *_cells(row, row.values, row.plain, points), cost]))
    for method, error in result.errors.items():
        table.add_row(method, printable(error), "–", "–", "–")
    tables = [table]
    if any(row.test for row in rows):
        tested = _new_table("on the test set, which chose nothing", "", f"test{' %' if points else ''}", "− plain")
        for row in rows:
            tested.add_row(*map(printable, [*_names(row), *_cells(row, row.test, row.plain_test, points)]))
        tables.append(tested)
    return tables


def _new_table(title: str, caption: str, *columns: str) -> Table:
    table = Table(title=printable(title), caption=printable(caption))
    table.add_column("method", overflow="fold")
    table.add_column("constants", overflow="fold")
    for name in columns:
        table.add_column(printable(name), justify="right", overflow="fold")
    return table


def _names(row: Row) -> list[str]:
    return [row.method, " ".join(f"{name}={value:g}" for name, value in sorted(row.constants.items(), reverse=True))]


def _cells(row: Row, values: Mapping[int, float], plain: Mapping[int, float], points: bool) -> list[str]:
    mean = statistics.mean(values.values()) if values else math.nan
    difference = Gain.of(values, plain, 1.0)
    gained = "" if row.method == PLAIN else _number(difference.mean, difference.error, points, signed=True)
    return [_number(mean, _spread(values), points), gained]
