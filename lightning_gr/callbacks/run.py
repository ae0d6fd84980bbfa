"""One run of one Trainer: its state, and the panel that announces it."""

from typing import TYPE_CHECKING, Any

import torch

from lightning_gr.callbacks.checks import check_momentum_by_now
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.ranks import Decisions, sharding
from lightning_gr.core.ahead import Ahead
from lightning_gr.core.comm_states import CommStates
from lightning_gr.core.gradients import StashedGradients
from lightning_gr.core.rules import Rule, Update
from lightning_gr.core.sharding import sum_of_shards
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import is_lazy
from lightning_gr.core.two_pass import Transform
from lightning_gr.report.display import Summary

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_gr.callbacks.recorder import Recorder
    from lightning_gr.callbacks.step_counter import StepCounter
    from lightning_gr.report.step_report import StepReport

__all__ = ["Run"]


class Run:
    """The state of one run of one Trainer, created when training starts and dropped when it ends.

    Args:
        excluded: The ids of the excluded parameters.
    """

    def __init__(self, excluded: set[int]) -> None:
        self.excluded = excluded
        self.recorder: Recorder | None = None
        self.storage = WeightStorage(check_resolution=True)
        self.stashed = StashedGradients()
        self.update: Update | None = None
        self.ahead: Ahead | None = None
        self.window: tuple[int, int] | None = None  # the one whose update has been decided: its epoch and position
        self.shard_group: Any = None  # the ranks over which FSDP1 spreads parameters
        self.decisions: Decisions | None = None  # if code of the user's decides on updates
        self.comm_states: CommStates | None = None  # as before the first gradient was reduced
        self.passed = False  # whether the window had its second pass, or needs none
        self.regularized = False
        self.param_count = 0
        # those of the outer run, if another Trainer uses the same callback during that run
        self.outer: tuple[StepReport, StepCounter] | None = None

    def begins_window(self, trainer: "Trainer", batch_idx: int) -> bool:
        """Whether this micro-batch is the first of its window, or the first after resuming within it."""
        window = trainer.current_epoch, batch_idx // trainer.accumulate_grad_batches
        if window == self.window:
            return False
        self.window, self.regularized = window, False
        return True

    def replay(self, transform: Transform, last: bool = True) -> None:
        """Make the window's calls again, with communication hooks in the state in which the first pass found them."""
        if self.comm_states is not None:
            self.comm_states.restore()
        if self.recorder is not None:
            self.recorder.replay(transform, last)

    def announce(self) -> None:
        """Start to compare the update with those of other ranks, if code of the user's decides on it."""
        if self.decisions is not None:
            self.decisions.announce(self.update)

    def check_decision(self) -> None:
        """Raise on all ranks if they will not make the same passes."""
        if self.decisions is not None:
            self.decisions.check()

    def look_ahead(self, trainer: "Trainer") -> None:
        """Set ``ahead``, the point at which a single pass of the window takes place; None if at the weights."""
        self.ahead = None
        if self.update is not None and self.update.ahead:
            optimizer = trainer.optimizers[0]
            check_momentum_by_now(optimizer)
            params = [param for group in optimizer.param_groups for param in group["params"]]
            chosen = [param for param in params if id(param) not in self.excluded]
            with sharding(trainer, self.shard_group):
                self.ahead = Ahead(optimizer, chosen, self.update.ahead, self.storage)

    def summary(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        rule: Rule,
        update: Update,
        *,
        schedule: str,
        local: bool,
        separate: bool,
        verbose: bool,
    ) -> Summary:
        """The contents of the panel at the start of training.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            rule: The method.
            update: Its update at full strength.
            schedule: When it is applied.
            local: Whether each device ascends along its own gradient.
            separate: Whether each micro-batch is regularized separately.
            verbose: Whether to print the panel.
        """
        trainable = [p for p in pl_module.parameters() if p.requires_grad and not is_lazy(p)]
        regularized = sum(p.numel() for p in trainable if id(p) not in self.excluded)
        total = sum(p.numel() for p in trainable)
        if self.shard_group is not None:
            with sharding(trainer, self.shard_group):
                regularized, total = (
                    round(each) for each in sum_of_shards(torch.tensor([regularized, total])).tolist()
                )
        lines = {
            "gradient": f"g = {rule.equation}",
            "constants": ", ".join(f"{name} = {value:g}" for name, value in rule.constants.items()),
            "parameters": f"{regularized:,} regularized of {total:,} trainable",
            "passes": _passes(update) + (", each micro-batch separately" if separate else ""),
        }
        if update.clip is not None:
            lines["clipping"] = f"first gradient at {update.clip[0]:g}, further ones at {update.clip[1]:g}"
        if trainer.world_size > 1 and not update.ahead:
            whose = "each device's own gradient" if local else "the mean gradient of all devices"
            lines["ascent"] = f"along {whose} ({trainer.world_size})"
        lines["schedule"] = schedule
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Flooding):
                lines["flooding"] = callback.description
        return Summary(rule.name, lines, verbose)


def _passes(update: Update) -> str:
    if update.ahead:
        return "1 per step"
    return f"{1 + len(update.probes) + bool(update.curvature)} per regularized step"
