"""Measures and logs the steps of one callback, on the steps that Lightning logs."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gr._compat import forget_logged, will_log
from lightning_gr.core.perturb import global_norm
from lightning_gr.core.sharding import mean_over_ranks
from lightning_gr.report.measurement import BY_LAYER, Measurement, layer_norms, layers_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Extremes", "StepLog", "StepWatch", "Stopwatch"]


class Extremes:
    """The first, last, smallest and largest value of each key, kept on the device."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Take in the values of one step."""
        for key, value in values.items():
            first, _, low, high = self.of.get(key, (value,) * 4)
            self.of[key] = (first, value, torch.fmin(low, value), torch.fmax(high, value))


class StepLog:
    """Logs values through ``self.log`` and keeps their extremes.

    Args:
        prefix: What all keys begin with.
        in_bar: Names that go to the progress bar, too.
    """

    def __init__(self, prefix: str, in_bar: Sequence[str] = ()) -> None:
        if not isinstance(prefix, str):
            raise ValueError(f"Expected argument `prefix` to be a string but got {prefix!r}")
        self.prefix, self.in_bar = prefix, tuple(in_bar)
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.extremes = Extremes()
        self._logged: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one run."""
        return {**vars(self), "extremes": Extremes(), "_logged": set()}

    @torch.no_grad()
    def log(
        self, trainer: "Trainer", pl_module: "LightningModule", values: Mapping[str, Tensor], own: Iterable[str] = ()
    ) -> None:
        """Log 0-dimensional tensors; those named in ``own`` are first averaged over the ranks, all in one all-reduce.

        Each rank must have the same names.
        """
        values = dict(values)
        together = [name for name in own if name in values]
        if together and trainer.world_size > 1:
            mean = mean_over_ranks(torch.stack([values[name] for name in together]))
            values |= dict(zip(together, mean, strict=True))
        self.extremes.note(values)
        forget_logged(trainer, self._logged - {self.prefix + name for name in values})
        for name, value in values.items():
            shown = name.rpartition("/")[2] in self.in_bar
            pl_module.log(self.prefix + name, value, on_step=True, on_epoch=False, prog_bar=shown, batch_size=1)
            self._logged.add(self.prefix + name)


class Stopwatch:
    """Adds up the time between marks without waiting for the device: by events on CUDA, by the clock on the CPU."""

    def __init__(self) -> None:
        self.pairs: list[list[tuple[Any, Any]]] = [[], []]
        self.samples: list[tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]] = []

    @staticmethod
    def mark(device: torch.device) -> Any:
        """Now; None where it cannot be told."""
        if device.type == "cpu":
            return time.perf_counter()
        if device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, which: int, start: Any, end: Any) -> None:
        """Add the time between two marks to the first (0) or second pass (1) of this step."""
        if start is not None and end is not None:
            self.pairs[which].append((start, end))

    def close(self) -> None:
        """The step is over. A few of them are kept."""
        if all(self.pairs) and len(self.samples) < 64:
            self.samples.append((self.pairs[0], self.pairs[1]))
        self.pairs = [[], []]

    def ratios(self) -> list[float]:
        """The time of the second pass against the first, for each step; the first step, which warms up, is left out."""
        return [_seconds(second) / _seconds(first) for first, second in self.samples[1:]]


def _seconds(pairs: Iterable[tuple[Any, Any]]) -> float:
    seconds = [end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3 for start, end in pairs]
    return float(sum(seconds))


class StepWatch:
    """What a callback with a second pass measures in its steps.

    Args:
        names: The metrics.
        prefix: What their keys begin with.
        prog_bar: Whether the gradient norm goes to the progress bar.
    """

    def __init__(self, names: Sequence[str], prefix: str, prog_bar: bool) -> None:
        if prog_bar and "grad_norm" not in names:
            raise ValueError("Expected argument `metrics` to hold 'grad_norm' with `prog_bar=True`, which shows it")
        self.names = tuple(names)
        self.log = StepLog(prefix, ("grad_norm",) if prog_bar else ())
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.log.reset()
        self.clock = Stopwatch()
        self.regularized = self.steps = 0
        self.due = False
        self._layers: dict[str, list[Tensor]] = {}
        self._forget()

    def _forget(self) -> None:
        self._losses: dict[int, Tensor] = {}
        self._measured: dict[str, dict[int, Measurement]] = {}
        self._plain: dict[str, dict[str, Tensor]] = {}
        self._start: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one run."""
        return {"names": self.names, "log": self.log}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start anew."""
        vars(self).update(state)
        self.reset()

    def open(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """A window of micro-batches begins."""
        self.due = will_log(trainer)
        if self.due:
            self._forget()
            self._layers = layers_of(pl_module) if BY_LAYER in self.names else {}

    def start(self, device: torch.device) -> None:
        """A first pass begins."""
        if self.due:
            self._start = self.clock.mark(device)

    def note_loss(self, batch_idx: int, loss: Tensor) -> None:
        """The loss of a micro-batch, divided and scaled as it is back-propagated."""
        if self.due:
            self._losses[batch_idx] = loss.detach()

    def first_done(self, device: torch.device) -> None:
        """A first pass has ended."""
        if self.due:
            self._start, start = self.clock.mark(device), self._start
            self.clock.add(0, start, self._start)

    def second_done(self, device: torch.device) -> None:
        """A second pass has ended, which began with the end of the first one."""
        if self.due:
            self._start, start = self.clock.mark(device), self._start
            self.clock.add(1, start, self._start)

    def of_window(self, batch_idx: int | None, scale: Tensor | None, local: bool, held: bool) -> Measurement | None:
        """An observer for the second pass of a window (``batch_idx`` is None) or of one of its micro-batches.

        ``held``: to whose gradient those of earlier steps will be added.
        """
        if not self.due or not self.names:
            return None
        losses = list(self._losses.values()) if batch_idx is None else [self._losses[batch_idx]]
        unit = 1.0 if scale is None else scale
        return self.measurement(
            batch_idx or 0, torch.stack(losses).sum() / unit, unit, local, batch_idx is None and not held
        )

    def measurement(
        self, position: int, loss: Tensor, unit: Tensor | float, local: bool, separable: bool, group: str = ""
    ) -> Measurement | None:
        """An observer for one second pass, if this step is measured. Over ``position`` the mean is taken."""
        if not self.due or not self.names:
            return None
        found = Measurement(self.names, loss, unit, separable and not local, self._layers, local)
        self._measured.setdefault(group, {})[position] = found
        return found

    @torch.no_grad()
    def first_only(self, params: Sequence[Tensor], scale: Tensor | None, group: str = "") -> None:
        """Measure a gradient that gets no second pass."""
        grads = [p.grad for p in params if p.grad is not None]
        if self.due and self.names and grads:
            norm = global_norm(grads)
            values = {"grad_norm": norm if scale is None else norm / scale} if "grad_norm" in self.names else {}
            self._plain[group] = values | {f"grad_norm/{n}": v for n, v in layer_norms(self._layers, scale).items()}

    def count(self, regularized: bool) -> None:
        """An optimizer step has been made."""
        self.steps += 1
        self.regularized += regularized

    def close(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """The step is over: log it."""
        if not self.due:
            return
        self.clock.close()
        values: dict[str, Tensor] = {}
        own: list[str] = []
        for group, found in self._measured.items():
            mean = _mean([each.results() for each in found.values()])
            values |= {group + name: value for name, value in mean.items()}
            own += [group + name for name in next(iter(found.values())).own]
        for group, plain in self._plain.items():
            values |= {group + name: value for name, value in plain.items()}
        if self.names:
            self.log.log(trainer, pl_module, values, own)
        self._forget()


def _mean(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over micro-batches of what all of them have."""
    names = [name for name in results[0] if all(name in result for result in results)]
    return {name: torch.stack([result[name] for result in results]).mean() for name in names}
