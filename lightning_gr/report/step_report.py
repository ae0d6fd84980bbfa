"""Collects and logs the metrics of a two-pass callback, on the steps that Lightning logs."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gr._compat import will_log
from lightning_gr.core.sharding import plain_are_shards
from lightning_gr.core.tensors import global_norm
from lightning_gr.report.measurement import BY_LAYER, Measurement, layer_norms, layers_of
from lightning_gr.report.step_log import StepLog

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["StepReport"]


class StepReport:
    """Collects what a two-pass callback measures during a step and logs it at the end.

    Args:
        names: The metrics to log.
        prefix: The prefix of their keys.
        prog_bar: Whether to show the gradient norm in the progress bar.
    """

    def __init__(self, names: Sequence[str], prefix: str, prog_bar: bool) -> None:
        if prog_bar and "grad_norm" not in names:
            raise ValueError("Expected argument `metrics` to contain 'grad_norm', which `prog_bar=True` shows")
        self.names = tuple(names)
        self.log = StepLog(prefix, ("grad_norm",) if prog_bar else ())

        self.regularized = self.missed = self.steps = 0
        self.due = False
        self._layers: dict[str, list[Tensor]] = {}
        self._forget()

    def _forget(self) -> None:
        self._losses: dict[int, Tensor] = {}
        self._measured: dict[str, dict[int, Measurement]] = {}
        self._plain: dict[str, dict[str, Tensor]] = {}
        self._per_rank: list[str] = []

    def open(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Start a window of micro-batches, and decide whether to measure it."""
        self.due = will_log(trainer)
        if self.due:
            self._forget()
            self._layers = layers_of(pl_module) if BY_LAYER in self.names else {}

    def note_loss(self, batch_idx: int, loss: Tensor) -> None:
        """Record the loss of a micro-batch, divided and scaled as it is back-propagated."""
        if self.due:
            self._losses[batch_idx] = loss.detach()

    def loss_of_window(self, scale: Tensor | None) -> Tensor:
        """The mean loss over the micro-batches that had one, without the gradient scaler's factor."""
        total = torch.stack(list(self._losses.values())).sum()
        return total if scale is None else total / scale

    def of_window(self, batch_idx: int | None, scale: Tensor | None, local: bool, stashed: bool) -> Measurement | None:
        """Create an observer for the second pass of a window (``batch_idx`` is None) or of one of its micro-batches.

        ``stashed`` says whether gradients from earlier steps will be added to its gradient.
        """
        if not self.due or not self.names:
            return None
        losses = list(self._losses.values()) if batch_idx is None else [self._losses[batch_idx]]
        if not losses:
            return None
        unit = 1.0 if scale is None else scale
        return self.measurement(
            batch_idx or 0, torch.stack(losses).sum() / unit, unit, local, batch_idx is None and not stashed
        )

    def measurement(
        self, position: int, loss: Tensor, unit: Tensor | float, local: bool, separable: bool, group: str = ""
    ) -> Measurement | None:
        """Create an observer for one second pass, if this step is measured. Logged values are means over positions."""
        if not self.due or not self.names:
            return None
        observer = Measurement(self.names, loss, unit, separable and not local, self._layers, local)
        self._measured.setdefault(group, {})[position] = observer
        return observer

    @property
    def measures_clean_loss(self) -> bool:
        """Whether this step, if its gradient is taken at a point ahead, needs its loss at the weights too."""
        return self.due and "sharpness" in self.names

    @torch.no_grad()
    def first_only(
        self,
        params: Sequence[Tensor],
        scale: Tensor | None,
        group: str = "",
        sharpness: Tensor | None = None,
    ) -> None:
        """Measure a gradient that does not get a second pass.

        Args:
            params: The parameters with that gradient.
            scale: The gradient scaler's factor in it.
            group: Prefix of the keys.
            sharpness: The loss where the gradient was taken minus the loss at the weights.
        """
        grads = [p.grad for p in params if p.grad is not None]
        if self.due and self.names and (grads or plain_are_shards()):
            norm = global_norm(grads, like=params)
            values = {"grad_norm": norm if scale is None else norm / scale} if "grad_norm" in self.names else {}
            values |= {f"grad_norm/{n}": v for n, v in layer_norms(self._layers, scale).items()}
            if sharpness is not None:
                values["sharpness"] = sharpness
                self._per_rank.append(group + "sharpness")
            self._plain[group] = values

    def count(self, regularized: bool, due: bool) -> None:
        """Count an optimizer step."""
        self.steps += 1
        self.regularized += regularized
        self.missed += due and not regularized

    def warn_if_all_missed(self, name: str, warned: Collection[str] = ()) -> None:
        """Warn if steps were due and none was regularized, unless the class called ``name`` has ``warned`` already."""
        if self.missed and not self.regularized and not warned:
            rank_zero_warn(
                f"{name} regularized no optimizer step, although {self.missed} were due: each of them had no gradient,"
                " a gradient that is not finite, or no loss at the displaced weights"
            )

    def close(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Log the values of the step at its end."""
        if not self.due:
            return
        values: dict[str, Tensor] = {}
        per_rank = list(self._per_rank)
        for group, observers in self._measured.items():
            mean = _mean([observer.results() for observer in observers.values()])
            values |= {group + name: value for name, value in mean.items()}
            per_rank += [group + name for name in next(iter(observers.values())).per_rank]
        for group, plain in self._plain.items():
            values |= {group + name: value for name, value in plain.items()}
        if self.names:
            self.log.log(trainer, pl_module, values, per_rank)
        self._forget()


def _mean(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over micro-batches of the values that all of them have."""
    names = [name for name in results[0] if all(name in result for result in results)]
    return {name: torch.stack([result[name] for result in results]).mean() for name in names}
