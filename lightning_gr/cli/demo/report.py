"""Reports the results of the demo in a table and a figure."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.cli.demo.task import DEMO_METHODS, EpochRecord
from lightning_gr.report.console import printable

__all__ = ["draw", "make_table", "verdicts"]

# Okabe and Ito's color-blind-safe palette
_COLORS = {
    "plain": "#000000",
    "F-GR": "#0072B2",
    "B-GR": "#E69F00",
    "SAM": "#CC79A7",
    "MSAM": "#D55E00",
    "flooding": "#009E73",
}
_STYLES = {"plain": "-", "F-GR": "-", "B-GR": "--", "SAM": "-.", "MSAM": (0, (5, 1, 1, 1)), "flooding": ":"}


def constants(method: str) -> str:
    """Format the constants of a method, such as ``"γ=1 ε=0.5"``; empty for plain training."""
    values: dict[str, float] = {}
    for callback in DEMO_METHODS[method]():
        values |= {"b": callback.level} if isinstance(callback, Flooding) else callback.rule.constants
    return " ".join(f"{symbol}={value:g}" for symbol, value in values.items())


def _spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds, or 0 for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _last(records: Sequence[EpochRecord], method: str) -> list[EpochRecord]:
    """The records of the last epoch of each of a method's runs."""
    last_by_seed = {record.seed: record for record in records if record.method == method}
    return list(last_by_seed.values())


def make_table(records: Sequence[EpochRecord], costs: Mapping[str, float], title: str) -> Table:
    """Build a table with one row per method: means over seeds at the end of training."""
    several = len({record.seed for record in records}) > 1
    caption = "± is the standard deviation over seeds" if several else "one seed, so there is no spread"
    table = Table(title=printable(title), caption=printable(caption))
    table.add_column("method", overflow="fold")
    table.add_column("constants", overflow="fold")
    for name in ("test accuracy", "train loss", "grad. norm", "step cost"):
        table.add_column(name, justify="right", overflow="fold")
    for method in dict.fromkeys(record.method for record in records):
        last = _last(records, method)
        cells = (
            method,
            constants(method),
            _accuracy([100 * record.accuracy for record in last]),
            f"{statistics.mean(record.train_loss for record in last):.3f}",
            f"{statistics.mean(record.gradient_norm for record in last):.3f}",
            f"{costs[method]:.2f}×" if method in costs else "–",
        )
        table.add_row(*map(printable, cells))
    return table


def _accuracy(percent: Sequence[float]) -> str:
    spread = f" ± {_spread(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread}%"


def verdicts(records: Sequence[EpochRecord]) -> list[str]:
    """Write one line for each method that did not help, that is, was not clearly better than plain training."""
    plain = [record.accuracy for record in _last(records, "plain")]
    lines = []
    for method in dict.fromkeys(record.method for record in records if plain and record.method != "plain"):
        accuracy = [record.accuracy for record in _last(records, method)]
        gain = statistics.mean(accuracy) - statistics.mean(plain)
        several = min(len(accuracy), len(plain)) > 1
        spread = max(_spread(accuracy), _spread(plain)) if several else None
        if gain <= (spread or 0.0):
            lines.append(_verdict(method, gain, spread))
    return lines


def _verdict(method: str, gain: float, spread: float | None) -> str:
    """Describe a method whose gain is at most the spread over seeds; ``spread`` is None for a single seed."""
    points = round(100 * gain, 1)
    verdict = "is worse than plain training" if points < 0 else "does not help"
    if spread is None:
        caveat = "one seed, so there is no spread over seeds"
    else:
        compared = "within" if abs(gain) <= spread else "beyond"
        caveat = f"{compared} the spread over seeds (±{100 * spread:.1f})"
    return f"{method} {verdict} here: {points + 0.0:+.1f} points, {caveat}."


def draw(records: Sequence[EpochRecord], path: Path) -> None:
    """Plot gradient norm and test accuracy over training: the mean and a band of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for method in dict.fromkeys(record.method for record in records):
        _curve(left, records, method, "gradient_norm", 1)
        _curve(right, records, method, "accuracy", 100)
    left.set(xlabel="epoch", ylabel="‖∇L‖ on the training set", yscale="log", title="Gradient norm")
    right.set(xlabel="epoch", ylabel="test accuracy (%)", title="Accuracy on clean test images")
    accuracies = [100 * record.accuracy for record in records]
    right.set_ylim(max(75, min(accuracies)) - 1, max(accuracies) + 1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def _curve(axes: Any, records: Sequence[EpochRecord], method: str, name: str, factor: float) -> None:
    epochs: dict[int, list[float]] = {}
    for record in records:
        if record.method == method:
            epochs.setdefault(record.epoch, []).append(factor * getattr(record, name))
    x = list(epochs)
    mean = [statistics.mean(values) for values in epochs.values()]
    low = [m - _spread(values) for m, values in zip(mean, epochs.values(), strict=True)]
    high = [m + _spread(values) for m, values in zip(mean, epochs.values(), strict=True)]
    if name == "gradient_norm":  # keep the band positive for the logarithmic axis
        low = [max(bound, m / 10) for bound, m in zip(low, mean, strict=True)]
    color = _COLORS.get(method)
    label = f"{method} {constants(method)}".strip()
    axes.plot(x, mean, color=color, linestyle=_STYLES.get(method, "-"), label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
