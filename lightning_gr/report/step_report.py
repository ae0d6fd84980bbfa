"""What a callback with a second pass tells of its steps, on the steps that Lightning logs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gr._compat import will_log
from lightning_gr.core.tensors import global_norm
from lightning_gr.report.measurement import BY_LAYER, Measurement, layer_norms, layers_of
from lightning_gr.report.step_log import StepLog

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["StepReport"]


class StepReport:
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

        self.regularized = self.steps = 0
        self.due = False
        self._layers: dict[str, list[Tensor]] = {}
        self._forget()

    def _forget(self) -> None:
        self._losses: dict[int, Tensor] = {}
        self._measured: dict[str, dict[int, Measurement]] = {}
        self._plain: dict[str, dict[str, Tensor]] = {}

    def open(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """A window of micro-batches begins."""
        self.due = will_log(trainer)
        if self.due:
            self._forget()
            self._layers = layers_of(pl_module) if BY_LAYER in self.names else {}

    def note_loss(self, batch_idx: int, loss: Tensor) -> None:
        """The loss of a micro-batch, divided and scaled as it is back-propagated."""
        if self.due:
            self._losses[batch_idx] = loss.detach()

    def of_window(self, batch_idx: int | None, scale: Tensor | None, local: bool, stashed: bool) -> Measurement | None:
        """An observer for the second pass of a window (``batch_idx`` is None) or of one of its micro-batches.

        ``stashed``: whether gradients of earlier steps will be added to its gradient.
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
