"""Callbacks for automatic optimization: gradient regularization and SAM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gr._compat import CallbackBase, skips_backward
from lightning_gr.callbacks import checks
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.recorder import Recorder, gradient_scale, loss_scale
from lightning_gr.callbacks.step_counter import OptimizerSteps
from lightning_gr.callbacks.windows import HeldGradients, is_window_end
from lightning_gr.core.perturb import WeightCopy
from lightning_gr.core.rules import (
    ACCUMULATIONS,
    Accumulation,
    GRRule,
    Rule,
    SAMRule,
    Schedule,
    Scheme,
    Update,
    check_bool,
    check_choice,
)
from lightning_gr.core.two_pass import add_second_pass_, check_exclude, match_names
from lightning_gr.report.display import show_end, show_start
from lightning_gr.report.measurement import (
    BY_LAYER,
    DEFAULT_METRICS,
    METRICS,
    OF_SECOND_GRADIENT,
    check_metrics,
    undefined_metrics,
)
from lightning_gr.report.step_report import StepWatch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["SAM", "Flooding", "GradientRegularization", "TwoPassCallback"]


class TwoPassCallback(CallbackBase):
    """What the methods with a second pass share. Not to be used by itself: give it a rule.

    Args:
        rule: The method, see :mod:`lightning_gr.core.rules`.
        start_step: The first optimizer step (counted from 0) that is regularized.
        interval: Every how many optimizer steps from there.
        warmup_steps: Over how many optimizer steps from there the penalty (the radius) grows linearly from 0.
        lazy: Whether the penalty (the radius) is ``interval`` times as much.
        exclude: Shell-style patterns over parameter names. Such parameters are neither perturbed nor regularized.
        ascent_sync: Whether the first gradient is averaged over devices before it gives the direction.
        accumulation: Whether an accumulation window is regularized as a whole or micro-batch by micro-batch.
        metrics: What to log on the steps that Lightning logs, see :mod:`lightning_gr.report.measurement`.
        prefix: What the keys of the metrics begin with.
        prog_bar: Whether the gradient norm is shown in the progress bar.
        verbose: Whether to show a panel before training and a table after it.

    Raises:
        ValueError: If an argument is out of its range, or at the start of ``fit`` if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module cannot be regularized.
    """

    _recorder: Recorder | None
    _copy: WeightCopy
    _excluded: set[int]
    _update: Update | None
    _held: HeldGradients
    _begun: bool
    _passed: bool

    def __init__(
        self,
        rule: Rule,
        start_step: int = 0,
        interval: int = 1,
        warmup_steps: int = 0,
        lazy: bool = False,
        exclude: Sequence[str] = (),
        ascent_sync: bool = True,
        accumulation: Accumulation = "window",
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        prog_bar: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("ascent_sync", ascent_sync), ("prog_bar", prog_bar), ("verbose", verbose)):
            check_bool(name, value)
        check_choice("accumulation", accumulation, ACCUMULATIONS)
        self.rule = rule
        self.schedule = Schedule(start_step, interval, warmup_steps, lazy)
        self.exclude = check_exclude(exclude)
        self.ascent_sync = ascent_sync
        self.accumulation = accumulation
        self.verbose = verbose
        names = check_metrics(metrics, (*METRICS, BY_LAYER), DEFAULT_METRICS, undefined_metrics(rule))
        self.watch = StepWatch(names, prefix, prog_bar)
        self._asked_for = OF_SECOND_GRADIENT.intersection([metrics] if isinstance(metrics, str) else metrics)
        self._steps = OptimizerSteps()
        vars(self).update(self._fresh())

    @staticmethod
    def _fresh() -> dict[str, Any]:
        """What belongs to one run, before the run."""
        return {
            "_recorder": None,
            "_copy": WeightCopy(check_resolution=True),
            "_excluded": set(),
            "_update": None,
            "_held": HeldGradients(),
            "_begun": False,
            "_passed": False,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one run: a copy of this callback starts anew."""
        return {**vars(self), **self._fresh()}

    def should_regularize(self, step: int) -> bool:
        """Whether to regularize optimizer step ``step`` (counted from 0, in manual optimization for each optimizer).

        Override it for a schedule of your own; it is asked once per optimizer step and must give the same answer on
        all devices.
        """
        return self.schedule.due(step)

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Check the context."""
        if stage == "fit":
            checks.check_two_pass(trainer, pl_module, TwoPassCallback)
            checks.check_accumulation(trainer, self.accumulation, self.ascent_sync)
            checks.check_sharded(trainer, self.rule, self.ascent_sync)
            checks.check_separable(trainer, self._asked_for, self.accumulation, self.ascent_sync)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Find the excluded parameters, which ``configure_model`` may have made only now; show what will be done."""
        self._excluded = match_names(self.exclude, pl_module)
        checks.check_sparse(pl_module, self._excluded)
        show_start(self, trainer, pl_module)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to record, or to count the steps of each optimizer where the module optimizes manually."""
        self.watch.reset()
        if not pl_module.automatic_optimization:
            self._steps.begin(trainer.optimizers, anew=trainer.global_step == 0)
            return
        self._begun = False
        if self._recorder is not None:
            self._recorder.remove()
        floods = [callback.flood_gradient_ for callback in trainer.callbacks if isinstance(callback, Flooding)]  # type: ignore[attr-defined]
        self._recorder = Recorder(trainer, pl_module, floods[0] if floods else None)

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Look for new modules, as those of a finetuning callback."""
        if self._recorder is not None:
            self._recorder.look_through()

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """At the first micro-batch of a window (which may be resumed in its middle), decide about the whole window."""
        recorder = self._recorder
        if recorder is None:
            self.watch.open(trainer, pl_module)
            return
        if batch_idx % trainer.accumulate_grad_batches == 0 or not self._begun:
            self._begun = True
            recorder.forget()
            self._update = None if skips_backward(trainer) else self._update_at(trainer.global_step)
            self.watch.open(trainer, pl_module)
        elif self._by_micro_batch(trainer):
            recorder.forget()
        self._passed = False
        if self._update is not None:
            recorder.expect(batch_idx, local=self.is_local(trainer) and is_window_end(trainer, batch_idx))
        self.watch.start(pl_module.device)

    def on_before_backward(self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor) -> None:
        """Put earlier gradients aside: of other micro-batches if each has its own direction, of steps not zeroed."""
        recorder = self._recorder
        if recorder is None:
            return
        self.watch.note_loss(recorder.batch_idx, loss)
        if self._update is not None and (self._by_micro_batch(trainer) or recorder.is_at_start):
            self._held.put_aside(_parameters(trainer))

    def on_after_backward(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """After the last micro-batch of a window (after each one, if so asked), run the second pass."""
        recorder = self._recorder
        if recorder is None:
            return
        self.watch.first_done(pl_module.device)
        if self._by_micro_batch(trainer) or is_window_end(trainer, recorder.batch_idx):
            self._second_pass(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Make up for a window whose last ``training_step`` returned None, after which there was no backward pass.

        A gradient scaler makes no step then.
        """
        if self._recorder is None:
            return
        if not self._passed and loss_scale(trainer, pl_module.device) is None and not self._by_micro_batch(trainer):
            with torch.enable_grad():
                self._second_pass(trainer, pl_module)

    def _second_pass(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._passed = True
        recorder, by_micro_batch = self._recorder, self._by_micro_batch(trainer)
        if recorder is None or (self._update is None and (by_micro_batch or not self.watch.due)):
            return
        params = [param for param in _parameters(trainer) if id(param) not in self._excluded]
        scale = gradient_scale(trainer, pl_module.device, alone=by_micro_batch)
        if self._update is None:
            self.watch.first_only(params, scale)
            return
        looks_on = self.watch.of_window(
            recorder.batch_idx if by_micro_batch else None, scale, self.is_local(trainer), bool(self._held)
        )
        replay, chosen = self._held.before(recorder.replay), {id(param) for param in params}
        add_second_pass_(
            self._update,
            params,
            replay if looks_on is None else looks_on.watch(replay),
            self._copy,
            # also those that no optimizer has
            excluded=[param for param in recorder.params if id(param) not in chosen],
            loss_scale=scale,
            check_finite=not self.is_local(trainer),
            observer=looks_on,
        )
        self._held.give_back()
        self.watch.second_done(pl_module.device)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step, and let go of its batches."""
        if is_window_end(trainer, batch_idx):
            self.watch.close(trainer, pl_module)
            if self._recorder is not None:
                self.watch.count(self._update is not None)
                self._recorder.forget()
                self._held.give_back()  # if there was no second pass

    # --- what the mixin asks for

    @property
    def excluded(self) -> set[int]:
        """The ids of the parameters that are left out."""
        return self._excluded

    def update_of(self, optimizer: torch.optim.Optimizer) -> Update | None:
        """What to do in the current step of one of several optimizers; None stands for a plain one."""
        return self._update_at(self._steps.of(optimizer))

    def _update_at(self, step: int) -> Update | None:
        update = self.rule.update(self.schedule.strength(step))
        return update if self.should_regularize(step) and not update.is_plain else None

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Say what the run was trained with, which is not needed to go on: the schedule follows the global step.

        In manual optimization it follows the steps of each optimizer, which are needed.
        """
        ours = {"format_version": 1, "rule": repr(self.rule), "schedule": repr(self.schedule)}
        checkpoint["lightning_gr"] = {**ours, "steps": list(self._steps.made)} if self._steps.made else ours

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Go on counting the steps of each optimizer."""
        self._steps.made = list(checkpoint.get("lightning_gr", {}).get("steps", ()))

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Leave no trace."""
        self._stop()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Leave no trace."""
        self._stop()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Show what happened."""
        if stage == "fit":
            show_end(self, trainer)

    def _stop(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
        self._steps.end()
        vars(self).update(self._fresh())

    def _by_micro_batch(self, trainer: "Trainer") -> bool:
        return self.accumulation == "micro_batch" and trainer.accumulate_grad_batches > 1

    def is_local(self, trainer: "Trainer") -> bool:
        """Whether each device ascends along its own gradient."""
        return not self.ascent_sync and trainer.world_size > 1


def _parameters(trainer: "Trainer") -> list[Tensor]:
    return [param for group in trainer.optimizers[0].param_groups for param in group["params"]]


class GradientRegularization(TwoPassCallback):
    """Gradient regularization by finite differences: penalize (γ/2)‖∇L(θ)‖² at the cost of a second pass.

    F-GR (``scheme="forward"``) takes one ascent step and gives the optimizer

        g = (1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε ∇L(θ)).

    With γ = ε this is SAM without normalization. ``"backward"`` (B-GR) descends instead, ``"central"`` does both in
    three passes, ``"exact"`` is double backward. ``normalize=True`` is the gradient-norm penalty γ‖∇L(θ)‖.

    Args:
        gamma: The strength γ ≥ 0 of the penalty. The paper's grid for WRN-28-10 spans 1e-4 to 1e-1; 0 is plain
            training.
        epsilon: The step ε > 0 of the finite difference. "A relatively large ε ≈ 0.05" works best (Ackermann et al.,
            arXiv 2602.18037, appendix C, on the paper's grid 0.01 to 0.5).
        scheme: ``"forward"`` (F-GR), ``"backward"`` (B-GR), ``"central"`` (three passes) or ``"exact"`` (double
            backward).
        normalize: Step ε∇L/‖∇L‖ instead of ε∇L, which penalizes γ‖∇L‖ instead of (γ/2)‖∇L‖².
        start_step: The first optimizer step (counted from 0) that is regularized.
        interval: Every how many optimizer steps from there.
        warmup_steps: Over how many optimizer steps from there the penalty grows linearly from 0. Recommended with
            Adam and a learning-rate warm-up.
        lazy: Multiply γ by ``interval``, so that the steps that are regularized stand for those between. ε is not
            multiplied; where γ · interval is well above it, take a larger one.
        exclude: Shell-style patterns over parameter names, as in ``["*.bias", "*norm*"]``. Such parameters are
            neither perturbed nor regularized and end with exactly the clean gradient.
        ascent_sync: On several devices, whether the first gradient is averaged over them before it gives the
            direction. False saves that communication: each device ascends along its own gradient.
        accumulation: With ``accumulate_grad_batches``: ``"window"`` regularizes the gradient of the whole window, as of
            one large batch, and keeps its batches until then; ``"micro_batch"`` regularizes each micro-batch by
            itself (m-sharpness) and keeps none.
        metrics: What to log on the steps that Lightning logs: ``"default"`` (gradient norm, sharpness, penalty),
            ``"all"``, names as listed in docs/metrics.md, or ``()`` for nothing.
        prefix: What the keys of the metrics begin with.
        prog_bar: Whether the gradient norm is shown in the progress bar, too.
        verbose: Whether to show a panel before training and a table after it, where Lightning shows something, too.

    Raises:
        ValueError: If an argument is out of its range, or at the start of ``fit`` if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module cannot be regularized.

    Source: Karakida, Takase, Hayase & Osawa (ICML 2023, arXiv 2210.02720); Zhao, Zhang & Hu (ICML 2022, arXiv
    2202.03599) for ``normalize=True``.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[GradientRegularization(gamma=0.1)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        gamma: float = 0.05,
        epsilon: float = 0.05,
        scheme: Scheme = "forward",
        normalize: bool = False,
        start_step: int = 0,
        interval: int = 1,
        warmup_steps: int = 0,
        lazy: bool = False,
        exclude: Sequence[str] = (),
        ascent_sync: bool = True,
        accumulation: Accumulation = "window",
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        prog_bar: bool = False,
        verbose: bool = True,
    ) -> None:
        rule, when = GRRule(gamma, epsilon, scheme, normalize), (start_step, interval, warmup_steps, lazy)
        super().__init__(rule, *when, exclude, ascent_sync, accumulation, metrics, prefix, prog_bar, verbose)


class SAM(TwoPassCallback):
    """Sharpness-aware minimization: the gradient at the worst point of a ball around the weights.

        g = ∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖)

    ``adaptive=True`` is ASAM, whose ball is scaled by T = |θ| + η: g = ∇L(θ + ρ T²∇L/‖T∇L‖).

    Args:
        rho: The radius ρ ≥ 0. 0.05 is Foret et al.'s; ASAM takes about ten times as much (Kwon et al.).
        adaptive: Use ASAM's ball, scaled by the size of each weight.
        eta: η ≥ 0 of ASAM; 0 as in the common implementations (Kwon et al. write 0.01).
        start_step: The first optimizer step (counted from 0) that is regularized.
        interval: Every how many optimizer steps from there.
        warmup_steps: Over how many optimizer steps from there the radius grows linearly from 0.
        lazy: Multiply ρ by ``interval``.
        exclude: Shell-style patterns over parameter names, as in ``["*.bias", "*norm*"]``. Such parameters are not
            perturbed and end with exactly the clean gradient.
        ascent_sync: On several devices, whether the first gradient is averaged over them before it gives the
            direction. False (m-sharpness) saves that communication, and Foret et al. found it to generalize better.
        accumulation: With ``accumulate_grad_batches``: ``"window"`` regularizes the gradient of the whole window, as of
            one large batch, and keeps its batches until then; ``"micro_batch"`` regularizes each micro-batch by
            itself (m-sharpness) and keeps none.
        metrics: What to log on the steps that Lightning logs: ``"default"`` (gradient norm, sharpness, penalty),
            ``"all"``, names as listed in docs/metrics.md, or ``()`` for nothing.
        prefix: What the keys of the metrics begin with.
        prog_bar: Whether the gradient norm is shown in the progress bar, too.
        verbose: Whether to show a panel before training and a table after it, where Lightning shows something, too.

    Raises:
        ValueError: If an argument is out of its range, or at the start of ``fit`` if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module cannot be regularized.

    Source: Foret, Kleiner, Mobahi & Neyshabur (ICLR 2021, arXiv 2010.01412), equation 2 and algorithm 1; Kwon, Kim,
    Park & Choi (ICML 2021, arXiv 2102.11600).

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SAM(rho=0.05)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        start_step: int = 0,
        interval: int = 1,
        warmup_steps: int = 0,
        lazy: bool = False,
        exclude: Sequence[str] = (),
        ascent_sync: bool = True,
        accumulation: Accumulation = "window",
        metrics: str | Sequence[str] = "default",
        prefix: str = "gr/",
        prog_bar: bool = False,
        verbose: bool = True,
    ) -> None:
        rule, when = SAMRule(rho, adaptive, eta), (start_step, interval, warmup_steps, lazy)
        super().__init__(rule, *when, exclude, ascent_sync, accumulation, metrics, prefix, prog_bar, verbose)
