"""The callback that floods the training loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_gr._compat import CallbackBase, has_base_named, stop_progress_bars, will_log
from lightning_gr._validate import check_bool, check_level
from lightning_gr.callbacks import checks
from lightning_gr.callbacks.recorder import loss_scale
from lightning_gr.callbacks.windows import is_window_end
from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.sharding import mean_over_ranks
from lightning_gr.replay.isolation import in_second_pass
from lightning_gr.report.display import Summary, show, show_start, shows
from lightning_gr.report.measurement import check_metrics
from lightning_gr.report.step_log import StepLog

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["FloodCounter", "Flooding"]


class Flooding(CallbackBase):
    """Keep the training loss at a level: train on |L − b| + b (Ishida et al. 2020).

    Only the direction of the gradient changes, by the sign of L − b, so this costs nothing; the loss that is logged is
    L itself. Beside :class:`GradientRegularization` or :class:`SAM` in the callbacks list it floods that method's
    loss: the sign of each of its gradients is flipped where the loss it comes from is below the level. The decision is
    made for each micro-batch, and without the host waiting for the device.

    Args:
        level: The flood level b ≥ 0, in the unit of the training loss.
        sync: On several devices, whether the loss that is compared with the level is the mean over them, as for one
            large batch. That costs one all-reduce of one number per backward pass, for which that pass waits. False
            lets each device decide by its own loss, at no cost.
        metrics: What to log on the steps that Lightning logs: ``"default"`` or ``"all"`` is ``flooded``, the share of
            losses below the level since it was last logged; ``()`` is nothing.
        prefix: What its key begins with.
        verbose: Whether to show a panel before training and the number of flooded losses after it, where Lightning
            shows something as well.

    Raises:
        ValueError: If ``level`` is not a non-negative float, ``sync`` not a bool, or a metric unknown.

    Source: Ishida et al. (ICML 2020, arXiv 2002.08709), equation 2. That its ups and downs perform finite-difference
    GR implicitly: Karakida et al. (ICML 2023, arXiv 2210.02720), section 5.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[Flooding(level=0.1)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        level: float,
        *,
        sync: bool = False,
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_level(level)
        check_bool("sync", sync)
        check_bool("verbose", verbose)
        self.level = float(level)
        self.sync, self.verbose = sync, verbose
        self.counter = FloodCounter(check_metrics(metrics, ("flooded",), ("flooded",)), prefix)

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Check the context."""
        if stage == "fit":
            checks.check_flooding(trainer, pl_module, Flooding)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Show what will be done."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # the panel of a method with a second pass has a line for flooding
        if not any(has_base_named(callback, "TwoPassCallback") for callback in callbacks):
            show_start(self.summary(), trainer)

    @property
    def description(self) -> str:
        """The loss that is trained on, in one line."""
        return f"|L − b| + b, b = {self.level:g}"

    def summary(self) -> Summary:
        """What the panel at the start of training says."""
        lines = {"loss": "|L − b| + b", "constants": f"b = {self.level:g}", "passes": "1 per step"}
        return Summary("flooding", lines, self.verbose)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to count."""
        self.counter.reset()

    def on_before_backward(self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor) -> None:
        """Flip the sign of the gradient where the loss, which comes divided and scaled, is below the level."""
        if pl_module.automatic_optimization:  # the mixin does it by itself
            self.flood_gradient_(trainer, loss, loss_scale(trainer, loss.device))

    def flood_gradient_(self, trainer: "Trainer", loss: Tensor, scale: Tensor | None = None) -> None:
        """Flood the gradient of ``loss``, which comes divided by the number of micro-batches and times ``scale``."""
        level = self.level / trainer.accumulate_grad_batches
        value = mean_over_ranks(loss) if self.sync and trainer.world_size > 1 else loss
        below = flood_gradient_(loss, level if scale is None else level * scale, value)
        if not in_second_pass():
            self.counter.note(below)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the share of losses below the level."""
        if is_window_end(trainer, batch_idx):
            self.counter.log(trainer, pl_module)

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Show what happened."""
        if stage == "fit":
            total = self.counter.total
            if self.verbose and shows(trainer) and total is not None:
                stop_progress_bars(trainer)
                show(f"flooded: {int(total):,} of {self.counter.of:,} losses below the level")


class FloodCounter:
    """How many losses were below the level: a sum on the device, in which nothing is read.

    Args:
        names: ``flooded`` or nothing.
        prefix: What the key begins with.
    """

    def __init__(self, names: Sequence[str], prefix: str) -> None:
        self.names, self.prefix = tuple(names), prefix
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.step_log = StepLog(self.prefix)
        self.total: Tensor | None = None
        self.of = 0
        self._last: tuple[Tensor | int, int] = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one run."""
        return {"names": self.names, "prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start afresh."""
        vars(self).update(state)
        self.reset()

    def note(self, below: Tensor) -> None:
        """Count one loss."""
        self.total = below.long() if self.total is None else self.total + below
        self.of += 1

    def log(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Log the share since the last time, on a step that Lightning logs."""
        before, count = self._last
        if not self.names or self.total is None or self.of == count or not will_log(trainer):
            return
        share = (self.total - before) / (self.of - count)
        self._last = self.total, self.of
        self.step_log.log(trainer, pl_module, {"flooded": share}, own=("flooded",))
