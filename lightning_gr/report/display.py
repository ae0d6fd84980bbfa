"""What is shown around training: a panel at its start and a table at its end, in a terminal of 80 columns or a file."""

import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_gr._compat import is_a
from lightning_gr.core.rules import GRRule, Rule, SAMRule
from lightning_gr.report.measurement import METRICS

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_gr.callbacks.base import TwoPassCallback
    from lightning_gr.callbacks.flooding import Flooding

__all__ = [
    "describe",
    "make_panel",
    "make_table",
    "method_name",
    "show_end",
    "show_flooding_end",
    "show_flooding_start",
    "show_start",
    "shows",
]


def _callbacks(trainer: "Trainer") -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def shows(trainer: "Trainer") -> bool:
    """Whether Lightning shows something itself, on this rank: a progress bar or a summary of the model."""
    loud = any(is_a(callback, "ProgressBar", "ModelSummary") for callback in _callbacks(trainer))
    return loud and trainer.is_global_zero and not trainer.barebones


def method_name(rule: Rule) -> str:
    """What the field calls it."""
    if isinstance(rule, SAMRule):
        return "ASAM" if rule.adaptive else "SAM"
    if not isinstance(rule, GRRule):
        return type(rule).__name__
    short = {"forward": "F-GR", "backward": "B-GR", "central": "central GR", "exact": "exact GR (double backward)"}
    return short[rule.scheme] + (", gradient-norm penalty" if rule.normalize else "")


def constants(rule: Rule) -> str:
    """The constants of a rule, by the field's letters."""
    if isinstance(rule, GRRule):
        return f"γ = {rule.gamma:g}" + ("" if rule.scheme == "exact" else f", ε = {rule.epsilon:g}")
    if isinstance(rule, SAMRule):
        return f"ρ = {rule.rho:g}" + (f", η = {rule.eta:g}" if rule.adaptive else "")
    return repr(rule)


def describe(callback: "TwoPassCallback", trainer: "Trainer", pl_module: "LightningModule") -> dict[str, str]:
    """What the panel says, line by line."""
    update = callback.rule.update()
    trainable = [p for p in pl_module.parameters() if p.requires_grad]
    regularized = sum(p.numel() for p in trainable if id(p) not in callback.excluded)
    passes = 1 + len(update.probes) + bool(update.curvature)
    micro = callback.accumulation == "micro_batch" and trainer.accumulate_grad_batches > 1
    lines = {
        "gradient": f"g = {callback.rule.equation}",
        "constants": constants(callback.rule),
        "parameters": f"{regularized:,} regularized of {sum(p.numel() for p in trainable):,} trainable",
        "passes": f"{passes} per regularized step" + (", each micro-batch by itself" if micro else ""),
    }
    if trainer.world_size > 1:
        whose = "each device's own gradient" if callback.is_local(trainer) else "the mean gradient of all devices"
        lines["ascent"] = f"along {whose} ({trainer.world_size})"
    lines["schedule"] = _schedule(callback)
    flooding = _flooding(trainer)
    if flooding is not None:
        lines["flooding"] = f"|L − b| + b, b = {flooding.level:g}"
    return lines


def _flooding(trainer: "Trainer") -> Any:
    return next((callback for callback in _callbacks(trainer) if hasattr(callback, "flips")), None)


def _schedule(callback: "TwoPassCallback") -> str:
    schedule = callback.schedule
    if type(callback).should_regularize.__qualname__ != "TwoPassCallback.should_regularize":
        return "by should_regularize(step)"
    every = "every step" if schedule.interval == 1 else f"every {schedule.interval} steps"
    since = f" from step {schedule.start_step:,}" if schedule.start_step else ""
    warmup = f", growing over {schedule.warmup_steps:,} steps" if schedule.warmup_steps else ""
    lazy = f", times {schedule.interval}" if schedule.lazy and schedule.interval > 1 else ""
    return every + since + lazy + warmup


def make_panel(name: str, lines: dict[str, str]) -> Panel:
    """The panel at the start."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for key, value in lines.items():
        grid.add_row(key, Text(value))
    return Panel(grid, title=name, title_align="left", expand=False)


def make_table(callback: "TwoPassCallback") -> Group:
    """The table at the end. It reads from the device, when training is over."""
    watch = callback.watch
    table = Table(title=f"{method_name(callback.rule)}, logged steps", title_justify="left")
    table.add_column("metric")
    for name in ("first", "last", "min", "max"):
        table.add_column(name, justify="right")
    for key, values in watch.log.extremes.of.items():
        if key.rpartition("/")[2] in METRICS:
            table.add_row(watch.log.prefix + key, *(_number(value) for value in values))
    lines = [f"regularized: {watch.regularized:,} of {watch.steps:,} steps"]
    ratios = watch.clock.ratios()
    if ratios:
        cost = statistics.median(ratios)
        lines.append(f"second pass: {cost:.2f} × the first one's time (median of {len(ratios)} steps)")
    return Group(*([table] if table.row_count else []), *(Text(line) for line in lines))


def _number(value: Tensor) -> str:
    return f"{value.item():.4g}"


def show_start(callback: "TwoPassCallback", trainer: "Trainer", pl_module: "LightningModule") -> None:
    """Print the panel, before any progress bar is there."""
    if callback.verbose and shows(trainer):
        _console().print(make_panel(method_name(callback.rule), describe(callback, trainer, pl_module)))


def show_flooding_start(flooding: "Flooding", trainer: "Trainer") -> None:
    """Print the panel of flooding by itself; that of a method with a second pass has a line for it."""
    alone = not any(hasattr(callback, "watch") for callback in _callbacks(trainer))
    if alone and flooding.verbose and shows(trainer):
        lines = {"loss": "|L − b| + b", "constants": f"b = {flooding.level:g}", "passes": "1 per step"}
        _console().print(make_panel("flooding", lines))


def show_end(callback: "TwoPassCallback", trainer: "Trainer") -> None:
    """Print the table."""
    if callback.verbose and shows(trainer) and callback.watch.steps:
        _stop_bars(trainer)
        _console().print(make_table(callback))


def show_flooding_end(flooding: "Flooding", trainer: "Trainer") -> None:
    """Print how many losses were flooded."""
    flips = flooding.flips
    if flooding.verbose and shows(trainer) and flips.total is not None:
        _stop_bars(trainer)
        _console().print(f"flooded: {int(flips.total):,} of {flips.of:,} losses below the level")


def _stop_bars(trainer: "Trainer") -> None:
    """Let nothing be printed inside a live bar.

    Rich's lives until its own teardown, which comes after ours; stopping it twice is harmless.
    """
    for callback in _callbacks(trainer):
        if isinstance(getattr(callback, "progress", None), Progress):
            callback.progress.stop()


def _console() -> Console:
    # made when it is used: standard output may have been redirected meanwhile
    return Console(highlight=False)
