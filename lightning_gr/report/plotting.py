"""Plots loss, gradient norm, sharpness and accuracy of runs from the files that Lightning's loggers wrote."""

import csv
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "STYLES", "PlotError", "Run", "draw_runs", "new_figure", "read_run", "run_plot", "save"]

# Okabe and Ito's color-blind-safe palette, without its yellow, which is too pale on white
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)))

NEEDS_MATPLOTLIB = "plots need matplotlib: pip install 'lightning_gr[plot]'"

Curve = tuple[list[float], list[float]]


class PlotError(Exception):
    """A request that cannot be drawn. Its message is one line that says what to do."""


@dataclass(frozen=True)
class Run:
    """The logged values of one run.

    Args:
        name: Its name in the legend.
        curves: The steps and values for each key.
    """

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)


# --- reading


def read_run(path: Path | str) -> Run:
    """Read the output of a CSVLogger or TensorBoardLogger.

    Args:
        path: A ``metrics.csv`` file, a version folder that contains one or TensorBoard event files, or a parent folder,
            of which the newest version is read.

    Raises:
        PlotError: If no such file is found, or TensorBoard is required but not installed.
    """
    path = Path(path)
    if not path.exists():
        raise PlotError(
            f"{path} does not exist: give a CSVLogger or TensorBoard folder such as lightning_logs/version_0"
        )
    if path.is_file():
        return Run(str(path), _read_events(path) if "tfevents" in path.name else _read_csv(path))
    files = [*path.rglob("metrics.csv"), *path.rglob("*tfevents*")]
    if not files:
        raise PlotError(f"{path} contains neither a metrics.csv nor TensorBoard event files: train with a logger")
    folder = max(files, key=lambda file: file.stat().st_mtime).parent
    table = folder / "metrics.csv"
    return Run(str(path), _read_csv(table) if table.exists() else _read_events(folder))


def _read_csv(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            step = _number(row.get("step")) if row.get("step") else float(number)
            for key, text in row.items():
                value = _number(text)
                if value is not None and step is not None and key not in ("step", "epoch"):
                    steps, values = curves.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(value)
    return curves


def _number(text: object) -> float | None:
    try:
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _read_events(path: Path) -> dict[str, Curve]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise PlotError("reading TensorBoard files needs tensorboard: pip install 'lightning_gr[plot]'") from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for key in events.Tags()["scalars"]:
        if key not in ("epoch", "hp_metric"):
            scalars = events.Scalars(key)
            curves[key] = ([float(scalar.step) for scalar in scalars], [scalar.value for scalar in scalars])
    return curves


def _label(runs: Sequence[Run]) -> list[Run]:
    """Shorten the names of the runs to the part of their paths that differs."""
    parts = [Path(run.name).parts for run in runs]
    if len(runs) == 1 or len(set(parts)) < len(runs):
        return list(runs)
    most = min(map(len, parts)) - 1
    start = next((i for i in range(most) if len({part[i] for part in parts}) > 1), most)
    end = next((i for i in range(most - start) if len({part[-1 - i] for part in parts}) > 1), most - start)
    return [Run("/".join(p[start : len(p) - end]), run.curves) for run, p in zip(runs, parts, strict=True)]


# --- assigning keys to panels


@dataclass(frozen=True)
class Panel:
    """One panel of a figure.

    Args:
        title: Its title.
        unit: The label of its y axis.
        accepts: Whether a key is drawn in it.
        logarithmic: Whether to use a logarithmic y axis if all values are positive.
    """

    title: str
    unit: str
    accepts: Callable[[str], bool]
    logarithmic: bool = False


def _last(key: str) -> str:
    return key.rpartition("/")[2].lower()


PANELS = (
    Panel("Loss", "loss", lambda key: "loss" in _last(key)),
    Panel("Gradient norm", "‖∇L‖ (loss per unit of θ)", lambda key: _last(key).startswith("grad_norm"), True),
    Panel("Sharpness", "L(θ + s d) − L(θ) (loss)", lambda key: _last(key) == "sharpness"),
    Panel("Curvature along ∇L", "∇Lᵀ H ∇L / ‖∇L‖² (loss per unit of θ²)", lambda key: _last(key) == "curvature"),
    Panel("Largest eigenvalue", "eigenvalue of H (loss per unit of θ²)", lambda key: _last(key) == "eigenvalue"),
    Panel("Trace of the Hessian", "tr H (loss per unit of θ²)", lambda key: _last(key) == "trace"),
    Panel("Accuracy", "accuracy (fraction)", lambda key: "acc" in _last(key)),
)


def _panels(runs: Sequence[Run], keys: Sequence[str]) -> list[tuple[Panel, list[str]]]:
    present = list(dict.fromkeys(key for run in runs for key in run.curves))
    if keys:
        missing = [key for key in keys if key not in present]
        if missing:
            raise PlotError(f"no run has {', '.join(missing)}: choose from {', '.join(sorted(present)) or 'no keys'}")
        return [(Panel(key, key, key.__eq__), [key]) for key in keys]
    panels = [(panel, [key for key in present if panel.accepts(key)]) for panel in PANELS]
    panels = [(panel, matches) for panel, matches in panels if matches]
    if not panels:
        others = ", ".join(sorted(present)) or "nothing"
        raise PlotError(f"found no loss, gradient norm, sharpness or accuracy, only {others}: choose with --keys")
    return panels


# --- drawing


def new_figure(count: int) -> tuple[Any, list[Any]]:
    """Create a figure with ``count`` panels, at most three per row. No display is needed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(NEEDS_MATPLOTLIB) from error
    columns = min(count, 3) if count != 4 else 2
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def draw_runs(runs: Sequence[Run], keys: Sequence[str] = (), smooth: int = 1) -> Any:
    """Draw several runs for comparison, with one color per run and one line style per key; return the figure.

    Args:
        runs: Runs from :func:`read_run`.
        keys: Draw one panel for each of these keys instead of the default panels.
        smooth: Draw a centered moving average over this many logged values, with the raw values faintly behind it.

    Raises:
        PlotError: If there is nothing to draw.
    """
    panels = _panels(runs, keys)
    figure, all_axes = new_figure(len(panels))
    for (panel, panel_keys), axes in zip(panels, all_axes, strict=True):
        for i, run in enumerate(runs):
            for j, key in enumerate(key for key in panel_keys if key in run.curves):
                name = f"{run.name} {key}" if len(panel_keys) > 1 else run.name
                style = COLORS[(i if len(runs) > 1 else j) % len(COLORS)], STYLES[j % len(STYLES)]
                _draw_curve(axes, run.curves[key], smooth, key if len(runs) == 1 else name, *style)
        axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
        values = [value for run in runs for key in panel_keys for value in run.curves.get(key, ([], []))[1]]
        if panel.logarithmic and min(values) > 0 and max(values) > 10 * min(values):
            _set_logarithmic(axes, max(values) / min(values))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _set_logarithmic(axes: Any, ratio: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    # plain numbers, and more ticks if the axis spans only a few decades
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1e3 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_curve(axes: Any, curve: Curve, smooth: int, label: str, color: str, style: Any) -> None:
    steps, values = curve
    if smooth > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        left, right = (smooth - 1) // 2, smooth // 2 + 1  # centered, so that the curve does not lag
        values = [statistics.mean(values[max(0, i - left) : i + right]) for i in range(len(values))]
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, values, label=label, color=color, linestyle=style, marker=marker, markersize=4)


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format given by the file's suffix.

    Raises:
        PlotError: If the format is unknown or the file cannot be written.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise PlotError(f"cannot write {path.name}: use one of the suffixes {', '.join(sorted(known))}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error.strerror}") from error


def run_plot(
    paths: Sequence[Path], output: Path, keys: Sequence[str] = (), names: Sequence[str] = (), smooth: int = 1
) -> None:
    """Read runs and draw them to a file.

    Args:
        paths: See :func:`read_run`.
        output: The image file; its suffix sets the format (PNG, SVG or any other that matplotlib supports).
        keys: See :func:`draw_runs`.
        names: The names of the runs in the legend.
        smooth: See :func:`draw_runs`.

    Raises:
        PlotError: If a run cannot be read, drawn or written.
    """
    if names and len(names) != len(paths):
        raise PlotError(f"expected as many names as runs ({len(paths)}) but got {len(names)}")
    runs = _label([read_run(path) for path in paths])
    if names:
        runs = [Run(name, run.curves) for name, run in zip(names, runs, strict=True)]
    save(draw_runs(runs, keys, smooth), output)
