"""The files: best.yaml, trials.csv and the pictures."""

import csv
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gr.report.plotting import COLORS, new_figure
from lightning_gr.tune.answer import Row, TuneResult, in_points
from lightning_gr.tune.space import METHODS, PLAIN

__all__ = ["draw_final", "draw_ranges", "draw_search", "write_best", "write_files", "write_trials"]

_FACTS = ("state", "value", "seconds", "step_seconds", "test", "error")
_COLUMNS = ("stage", "method", "index", "seed", "constants", *_FACTS)


def write_files(result: TuneResult, folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Path]:
    """Write all files and return their paths.

    Args:
        result: What was found.
        folder: The output folder.
        config: The configuration of ``lightning-gr fit``, to which the best method is added.
        settings: The user's arguments of each method, by key.
    """
    writers: dict[str, Callable[[Path], None]] = {
        "best.yaml": lambda path: write_best(result, path, config, settings),
        "trials.csv": lambda path: write_trials(result, path),
        "range.png": lambda path: _save(draw_ranges(result), path),
        "search.png": lambda path: _save(draw_search(result), path),
        "final.png": lambda path: _save(draw_final(result), path),
    }
    paths = []
    for name, write in writers.items():
        path = folder / name
        # another process on the same folder may read or write it at the same time
        temporary = path.with_name(f".{os.getpid()}-{name}")
        write(temporary)
        temporary.replace(path)
        paths.append(path)
    return paths


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)


def write_best(result: TuneResult, path: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the configuration with the best method, for ``lightning-gr fit --config``."""
    import yaml

    best = result.best
    keys = {method.key: None for method in METHODS.values()} if config else {}
    content: dict[str, Any] = {**config, **keys}
    if best.method != PLAIN:
        method = METHODS[best.method]
        arguments = method.arguments(best.constants, settings.get(method.key))
        content[method.key] = arguments
    head = f"# {best.label}: {result.sentence}\n"
    path.write_text(head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_trials(result: TuneResult, path: Path) -> None:
    """Write one row per training of the search and of the end."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for trial in result.trials:
            constants = " ".join(f"{name}={value:g}" for name, value in trial.get("constants", {}).items())
            test = " ".join(f"{name}={value:g}" for name, value in trial.get("test", {}).items())
            writer.writerow({**trial, "constants": constants, "test": test})


def draw_ranges(result: TuneResult) -> Any:
    """The perturbed minus the clean loss against each method's constant, with the bound."""
    figure, panels = new_figure(max(1, len(result.ranges)))
    for axes, (name, found) in zip(panels, result.ranges.items(), strict=False):
        sweep = found.sweep
        points = [(v, r) for v, r in zip(sweep.values, sweep.rises, strict=True) if math.isfinite(r)]
        axes.plot(*zip(*points, strict=True), color=COLORS[0], marker="o", markersize=3)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=sweep.scale / 100)
        axes.axhline(sweep.scale, color="0.6", linewidth=0.8, linestyle="--", label="loss of the first step")
        high = found.bounds[sweep.constant][1]
        axes.axvline(high, color=COLORS[4], label=f"upper bound {high:.2g}")
        guess = found.suggestion[sweep.constant]
        axes.axvline(guess, color=COLORS[2], linestyle=":", label=f"suggestion {guess:.2g}")
        axes.set(title=name, xlabel=sweep.constant, ylabel="perturbed − clean loss")
        _finish(axes)
    return figure


def draw_search(result: TuneResult) -> Any:
    """The metric against each method's first constant, with pruned trials apart."""
    from matplotlib.ticker import LogLocator

    searched = [t for t in result.trials if t["stage"] == "search"]
    names = list(dict.fromkeys(t["method"] for t in searched))
    figure, panels = new_figure(max(1, len(names)))
    plain = result.rows[0].values.values()
    for axes, name in zip(panels, names, strict=False):
        mine = [t for t in searched if t["method"] == name and t.get("value") is not None and math.isfinite(t["value"])]
        values = [t["value"] for t in mine]
        best = max(values, default=0.0) if result.goal.sign > 0 else min(values, default=0.0)
        # failed trainings would leave no room for the differences that count
        low, high = _margins([best, *plain], 0.5) if plain else _margins(values, 0.15)
        _scatter(figure, axes, [{**t, "value": min(max(t["value"], low), high)} for t in mine], METHODS[name].constants)
        axes.set_ylim(low, high)
        if plain:
            axes.axhline(statistics.mean(plain), color="0.4", linewidth=0.8, linestyle="--", label="plain")
        axes.set(title=name, xlabel=METHODS[name].constants[0], ylabel=result.goal.monitor, xscale="log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1.0, 3.0)), major_formatter="{x:g}", minor_formatter="")
        _finish(axes)
    return figure


def _margins(values: Sequence[float], share: float) -> tuple[float, float]:
    """The ends of an axis with ``values``, and room on both sides, a share of their range."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    margin = share * (most - least) or abs(most) / 10 or 1.0
    return least - margin, most + margin


def _scatter(figure: Any, axes: Any, trials: Sequence[Mapping[str, Any]], constants: Sequence[str]) -> None:
    """The trials of one method; a second constant is shown by color."""
    drawn = None
    for state, marker, label in (("COMPLETE", "o", "to the end"), ("PRUNED", "x", "pruned")):
        group = [t for t in trials if t["state"] == state]
        style: dict[str, Any] = {"color": COLORS[0]}
        if len(constants) > 1 and group:
            style = {"c": [math.log10(t["constants"][constants[1]]) for t in group], **_limits(trials, constants[1])}
        x = [t["constants"][constants[0]] for t in group]
        if group:
            drawn = axes.scatter(x, [t["value"] for t in group], marker=marker, label=label, clip_on=False, **style)
    if len(constants) > 1 and drawn is not None:
        figure.colorbar(drawn, ax=axes, label=f"log10 {constants[1]}")


def _limits(trials: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    values = [math.log10(t["constants"][name]) for t in trials]
    return {"vmin": min(values), "vmax": max(values)}


def draw_final(result: TuneResult) -> Any:
    """The metric of the final trainings: a bar for each method, and a point for each seed."""
    figure, (axes,) = new_figure(1)
    rows = [row for row in result.rows if row.values]
    figure.set_size_inches(max(4.4, 1.3 * len(rows)), 3.8)
    percent = 100.0 if in_points(result.goal, rows) else 1.0
    for i, row in enumerate(rows):
        values = [percent * value for value in row.values.values()]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.bar(i, statistics.mean(values), yerr=spread, color=COLORS[i % len(COLORS)], alpha=0.6, capsize=4)
        axes.plot([i] * len(values), values, "k.", markersize=5)
    every = [percent * value for row in rows for value in row.values.values()]
    axes.set_ylim(*_margins(every, 0.25))
    axes.set_xticks(range(len(rows)), [_tick(row) for row in rows], fontsize="small")
    axes.set(ylabel=f"{result.goal.monitor}{' (%)' if percent > 1 else ''}", title="Final trainings")
    axes.grid(axis="y", alpha=0.3)
    return figure


def _tick(row: Row) -> str:
    lines = [f"{name}={value:g}" for name, value in sorted(row.constants.items(), reverse=True)]
    return "\n".join([row.method, *lines])


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", framealpha=0.6)
