"""The flooding callback."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_gr._compat import CallbackBase, has_base_named, stop_progress_bars, will_log
from lightning_gr._validate import check_bool, check_level
from lightning_gr.callbacks import checks
from lightning_gr.callbacks.ranks import check_same_arguments
from lightning_gr.callbacks.recorder import loss_scale
from lightning_gr.callbacks.windows import is_window_end
from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.sharding import SideGroup
from lightning_gr.replay.isolation import in_second_pass
from lightning_gr.report.console import show
from lightning_gr.report.display import Summary, show_start, shows
from lightning_gr.report.measurement import check_metrics
from lightning_gr.report.step_log import StepLog

if TYPE_CHECKING:
    from lightning_gr._compat import AnyModule as LightningModule
    from lightning_gr._compat import AnyTrainer as Trainer

__all__ = ["FloodCounter", "Flooding"]


class Flooding(CallbackBase):  # type: ignore[misc]
    """Flooding keeps the training loss at a level by training on |L − b| + b (Ishida et al. 2020).

    Only the sign of the gradient changes, and only if L < b, so flooding costs nothing. The logged loss is still L.
    Combined with :class:`GradientRegularization` or :class:`SAM`, it floods that method's loss: the sign of each
    gradient is flipped if the loss it was computed from is below the level. The decision is made separately for each
    micro-batch, without synchronizing with the device.

    Args:
        level: The flood level b ≥ 0, in the units of the training loss.
        sync: Whether to compare the mean loss over devices with the level, as for one large batch. This adds a blocking
            all-reduce of two numbers to each backward pass. A device that has no batch or no loss takes part in it
            without counting. By default, each device decides from its own loss.
        metrics: The metrics to log, on the steps that Lightning logs: ``"default"`` or ``"all"`` log ``flooded``, the
            fraction of losses below the level since the last logged value; ``()`` logs nothing.
        prefix: The prefix of the metric's key.
        verbose: Whether to print a panel before training and the number of flooded losses after it. They are only
            printed if Lightning shows a progress bar or a model summary.

    Raises:
        ValueError: If ``level`` is not a non-negative float, ``sync`` is not a bool, or a metric is unknown.

    Source: Ishida et al. (ICML 2020, arXiv 2002.08709), equation 2; Karakida et al. (ICML 2023, arXiv 2210.02720),
    section 5, on the finite-difference GR that it performs implicitly.

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
        checks.check_overrides(type(self), Flooding)
        check_level(level)
        check_bool("sync", sync)
        check_bool("verbose", verbose)
        self.level = float(level)
        self.sync, self.verbose, self.metrics = sync, verbose, metrics
        self._took_part = False  # whether this micro-batch had a loss
        self._group: SideGroup | None = None
        self._outer: list[FloodCounter] = []
        self.counter = FloodCounter(check_metrics(metrics, ("flooded",), ("flooded",)), prefix)

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Raise if this Trainer or module is not supported."""
        if stage == "fit":
            checks.check_flooding(trainer, pl_module, Flooding)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Print the panel, unless a two-pass callback prints one."""
        callbacks: list[Any] = trainer.callbacks
        # the panel of a two-pass callback includes a line for flooding
        if not any(has_base_named(callback, "TwoPass") for callback in callbacks):
            show_start(self.summary(), trainer)

    @property
    def description(self) -> str:
        """The flooded loss and its level, on one line."""
        return f"|L − b| + b, b = {self.level:g}"

    def summary(self) -> Summary:
        """The contents of the panel at the start of training."""
        lines = {"loss": "|L − b| + b", "constants": f"b = {self.level:g}", "passes": "1 per step"}
        return Summary("flooding", lines, self.verbose)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Start counting flooded losses."""
        self._took_part = False
        check_same_arguments(trainer, "Flooding", level=self.level, sync=self.sync)
        if self.sync and trainer.world_size > 1:
            self._group = SideGroup(trainer.strategy.root_device, "flooding")
        self._outer.append(self.counter)  # of an outer Trainer that is training at the same time, if any
        self.counter = FloodCounter(self.counter.names, self.counter.prefix)

    def on_before_backward(self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor) -> None:
        """Flip the sign of the gradient if the loss, which is already divided and scaled, is below the level."""
        if pl_module.automatic_optimization:  # in manual optimization, the mixin does this
            self._took_part = True
            self.flood_gradient_(trainer, loss, loss_scale(trainer, loss.device))

    def flood_gradient_(self, trainer: "Trainer", loss: Tensor | None, scale: Tensor | None = None) -> None:
        """Flood the gradient of ``loss``, which is already divided by the number of micro-batches and scaled.

        None, if there is no loss here, only takes part in what the other devices do.
        """
        if loss is None:
            if self._group is not None:
                self._group.be_absent()
            return
        value = loss if self._group is None else self._group.mean_over_present(loss).to(loss.device)
        level = self.level / trainer.accumulate_grad_batches
        below = flood_gradient_(loss, level if scale is None else level * scale, value)
        if not in_second_pass():
            self.counter.note(below)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take part in the decision of the other devices if there was no loss here, and log the fraction below."""
        if pl_module.automatic_optimization and not self._took_part:
            self.flood_gradient_(trainer, None)
        self._took_part = False
        if is_window_end(trainer, batch_idx):
            self.counter.log(trainer, pl_module)

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Print the number of flooded losses."""
        if stage == "fit":
            self._show_end(trainer)
            self._leave()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Return to an outer run; after Ctrl-C, print the number of flooded losses."""
        if isinstance(exception, KeyboardInterrupt):
            self._show_end(trainer)
        self._leave()

    def _show_end(self, trainer: "Trainer") -> None:
        total = self.counter.total
        if self.verbose and shows(trainer) and total is not None:
            stop_progress_bars(trainer)
            show(f"flooded: {int(total):,} of {self.counter.count:,} losses below the level")

    def _leave(self) -> None:
        self._group = None
        if len(self._outer) > 1:
            self.counter = self._outer[-1]
        self._outer = self._outer[:-1]


class FloodCounter:
    """Counts the losses below the level on the device, without synchronizing.

    Args:
        names: The metrics to log: ``flooded`` or none.
        prefix: The prefix of the metric's key.
    """

    def __init__(self, names: Sequence[str], prefix: str) -> None:
        self.names, self.prefix = tuple(names), prefix
        self.reset()

    def reset(self) -> None:
        """Set the counts to zero and forget what was logged."""
        self.step_log = StepLog(self.prefix)
        self.total: Tensor | None = None
        self.count = 0
        self._logged: tuple[Tensor | int, int] = 0, 0

    def __getstate__(self) -> dict[str, Any]:
        """Omit the state of the current run."""
        return {"names": self.names, "prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings and start with zero counts."""
        self.names, self.prefix = state["names"], state["prefix"]
        self.reset()

    def note(self, below: Tensor) -> None:
        """Count one loss."""
        self.total = below.long() if self.total is None else self.total + below
        self.count += 1

    def log(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Log the fraction since the last logged value, on the steps that Lightning logs."""
        total, count = self._logged
        if not self.names or self.total is None or self.count == count or not will_log(trainer):
            return
        fraction = (self.total - total) / (self.count - count)
        self._logged = self.total, self.count
        self.step_log.log(trainer, pl_module, {"flooded": fraction}, per_rank=("flooded",))
