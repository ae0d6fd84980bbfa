"""The base class of the two-pass callbacks, for automatic optimization."""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gr._compat import CallbackBase, skips_backward
from lightning_gr._validate import GradientClip, check_bool, check_choice, check_exclude, check_gradient_clip
from lightning_gr.callbacks import checks
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.ranks import (
    Decisions,
    check_comm_hooks,
    check_same_settings,
    kept_comm_states,
    may_differ,
    passes_of,
    reduction,
    sharding,
)
from lightning_gr.callbacks.recorder import Recorder, gradient_scale, loss_scale
from lightning_gr.callbacks.rule_state import RuleState
from lightning_gr.callbacks.run import Run
from lightning_gr.callbacks.step_counter import StepCounter
from lightning_gr.callbacks.windows import is_window_end
from lightning_gr.core.rules import ACCUMULATIONS, FULL_STRENGTH, Accumulation, Context, Rule, Update
from lightning_gr.core.schedule import Schedule
from lightning_gr.core.selection import match_params
from lightning_gr.core.state import State
from lightning_gr.core.two_pass import add_second_pass_
from lightning_gr.report.display import Summary, show_end, show_start
from lightning_gr.report.measurement import (
    BY_LAYER,
    METRICS,
    OF_SECOND_GRADIENT,
    check_metrics,
    default_metrics,
    undefined_metrics,
)
from lightning_gr.report.step_report import StepReport

if TYPE_CHECKING:
    from lightning_gr._compat import AnyModule as LightningModule
    from lightning_gr._compat import AnyTrainer as Trainer

__all__ = ["TwoPass"]


class TwoPass(CallbackBase):  # type: ignore[misc]
    """Train with any rule: the callback behind the built-in methods, for rules of :mod:`lightning_gr.rules` or yours.

    Args:
        rule: The method. It has a ``name``, an ``equation``, its ``constants`` and an ``update``, see
            :class:`~lightning_gr.rules.Rule`.
        start_step: The first optimizer step (counted from 0) to regularize.
        interval: Regularize every ``interval``-th optimizer step from then on.
        warmup_steps: The number of optimizer steps over which the penalty (or the radius) grows linearly from 0.
        lazy: Multiply the penalty (or the radius) by ``interval`` to make up for the skipped steps.
        exclude: Shell-style patterns for names of parameters that are neither perturbed nor regularized.
        ascent_sync: Whether to average the first gradient over devices before it sets the direction.
        accumulation: Whether to regularize an accumulation window as a whole or each micro-batch separately.
        metrics: The metrics to log, on the steps that Lightning logs; see :mod:`lightning_gr.report.measurement`.
        prefix: The prefix of the metrics' keys.
        prog_bar: Whether to show the gradient norm in the progress bar.
        verbose: Whether to print a panel before training and a table after it.
        gradient_clip: Scale the clean gradient, and each further one, down to this norm before they are combined. Two
            numbers are the norms of the clean gradient and of the further ones.

    Raises:
        ValueError: If an argument is out of range, or, at the start of ``fit``, if a pattern matches nothing.
        MisconfigurationException: At the start of ``fit``, if this Trainer or module is not supported, or immediately,
            if a subclass overrides a hook without calling ``super()``.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lightning_gr.rules import GSAMRule
        >>> trainer = Trainer(callbacks=[TwoPass(GSAMRule(rho=0.05, alpha=0.1))], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rule: Rule,
        *,
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
        gradient_clip: GradientClip | None = None,
    ) -> None:
        super().__init__()
        checks.check_overrides(type(self), TwoPass)
        for name, value in (("ascent_sync", ascent_sync), ("prog_bar", prog_bar), ("verbose", verbose)):
            check_bool(name, value)
        check_choice("accumulation", accumulation, ACCUMULATIONS)
        self.rule = rule
        self.schedule = Schedule(start_step, interval, warmup_steps, lazy)
        self.exclude = check_exclude(exclude)
        self.ascent_sync = ascent_sync
        self.accumulation = accumulation
        self.gradient_clip = check_gradient_clip(gradient_clip)
        self._state = RuleState()
        self.verbose = verbose
        self._metrics = check_metrics(
            metrics, (*METRICS, BY_LAYER), default_metrics(self._row()), undefined_metrics(self._row())
        )
        self.metrics, self._prefix, self._prog_bar = metrics, prefix, prog_bar
        self._asked_for = OF_SECOND_GRADIENT.intersection([metrics] if isinstance(metrics, str) else metrics)
        self._steps = StepCounter()
        self.report = self._new_report()
        self._runs: weakref.WeakKeyDictionary[Trainer, Run] = weakref.WeakKeyDictionary()
        self._warned: set[str] = set()

    def _row(self, at: Context = FULL_STRENGTH) -> Update:
        return self.rule.update(at).clipped(self.gradient_clip)

    def _new_report(self) -> StepReport:
        return StepReport(self._metrics, self._prefix, self._prog_bar)

    def __getstate__(self) -> dict[str, Any]:
        """Omit the state of the current run, so that a copy of this callback starts without it."""
        omitted = ("_runs", "report", "_warned")
        return {name: value for name, value in vars(self).items() if name not in omitted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings, with a new report and no runs."""
        self.__dict__.update(state)
        self.report, self._runs, self._warned = self._new_report(), weakref.WeakKeyDictionary(), set()

    def should_regularize(self, step: int) -> bool:
        """Whether to regularize optimizer step ``step``, counted from 0 (per optimizer in manual optimization).

        Override this for a custom schedule. It is called once per optimizer step and must return the same value on all
        devices, or training ends with an error on each. Each step reduces two numbers to compare them, and waits.
        """
        return self.schedule.due(step)

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Raise if this Trainer or module is not supported."""
        if stage == "fit":
            checks.check_two_pass(trainer, pl_module, TwoPass)
            checks.check_accumulation(trainer, self.accumulation, self.ascent_sync)
            checks.check_sharded(trainer, self._row(), self.ascent_sync)
            checks.check_apart(trainer, self._row(), self.rule.name, self.accumulation, self.ascent_sync)
            checks.check_separable(trainer, self._asked_for, self.accumulation, self.ascent_sync)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Find the excluded parameters, which ``configure_model`` may have just created, and print the panel."""
        run = self._runs[trainer] = Run(match_params(self.exclude, pl_module))
        run.shard_group = checks.check_fsdp1(trainer)
        checks.check_sparse(pl_module, run.excluded)
        if self._row().ahead:
            checks.check_momentum(trainer)
        show_start(self.summary(trainer, pl_module), trainer)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Start recording or, in manual optimization, start counting the steps of each optimizer."""
        run = self._runs.get(trainer)
        if run is None:
            raise checks.overridden(self, "on_fit_start")
        if len(self._runs) > 1 and run.outer is None:
            run.outer = self.report, self._steps
            self._steps = StepCounter()
        self.report = self._new_report()
        self._state.begin(trainer, pl_module)
        check_same_settings(trainer, self.rule, self._row(), self)
        check_comm_hooks(trainer, self._row(), self.is_local(trainer))
        if trainer.world_size > 1 and may_differ(self, TwoPass):
            run.decisions = Decisions(trainer, type(self).__name__)
        if not pl_module.automatic_optimization:
            self._steps.attach(trainer.optimizers, restart=trainer.global_step == 0, on_step=self.report.count)
            return
        checks.check_hooks(_parameters(trainer), self.is_local(trainer))
        if run.recorder is not None:
            run.recorder.remove()
        floods = [callback.flood_gradient_ for callback in trainer.callbacks if isinstance(callback, Flooding)]
        then = partial(self._after_backward, trainer, pl_module)
        run.recorder = Recorder(trainer, pl_module, run.storage, floods[0] if floods else None, then)
        run.window = None

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Decide on the update of a window at its first micro-batch, or at the first one after resuming within it."""
        if not pl_module.automatic_optimization:
            self.report.open(trainer, pl_module)
            return
        run, recorder = self._recording(trainer)
        self._begin_window(trainer, pl_module, batch_idx)
        if is_window_end(trainer, batch_idx):
            run.announce()
        if run.update is not None:
            recorder.expect(
                batch_idx,
                local=self.is_local(trainer) and is_window_end(trainer, batch_idx),
                alone=self._by_micro_batch(trainer),
                ahead=run.ahead,
                records=run.update.has_second_pass or self.report.measures_clean_loss,
            )

    def _begin_window(self, trainer: "Trainer", pl_module: "LightningModule", batch_idx: int) -> None:
        run, recorder = self._recording(trainer)
        if run.begins_window(trainer, batch_idx):
            recorder.forget()
            own = None if skips_backward(trainer) else self._update_at(trainer.global_step, trainer.optimizers[0])
            run.update, run.comm_states = own, None
            self._look_for_new_layers(run, pl_module)
            run.look_ahead(trainer)
            self.report.open(trainer, pl_module)
        elif self._by_micro_batch(trainer):
            recorder.forget()
        run.passed = False

    def _look_for_new_layers(self, run: Run, pl_module: "LightningModule") -> None:
        if self.exclude and run.shard_group is None:  # FSDP1 replaces parameters, but always by the same ones
            count = sum(1 for _ in pl_module.parameters())
            if count != run.param_count:
                run.param_count, run.excluded = count, match_params(self.exclude, pl_module)

    def _recording(self, trainer: "Trainer") -> tuple[Run, Recorder]:
        run = self._runs.get(trainer)
        if run is None or run.recorder is None:
            raise checks.overridden(self, "on_train_start")
        return run, run.recorder

    def on_before_backward(self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor) -> None:
        """Stash gradients of steps that were not zeroed or, with separate directions, of earlier micro-batches."""
        if not pl_module.automatic_optimization:
            return
        run, recorder = self._recording(trainer)
        if run.window is None:
            raise checks.overridden(self, "on_train_batch_start")
        run.check_decision()
        self.report.note_loss(recorder.batch_idx, loss)
        if run.update is not None:
            recorder.check_not_bypassed()
            if run.ahead is None and (self._by_micro_batch(trainer) or recorder.is_at_start):
                run.stashed.stash(_parameters(trainer))
            if is_window_end(trainer, recorder.batch_idx) and passes_of(run.update) and not self.is_local(trainer):
                run.comm_states = kept_comm_states(trainer, run.update)
            recorder.watch_backward(_parameters(trainer))

    def _after_backward(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """After the last micro-batch of a window (after each one, if so asked), run the second pass."""
        _, recorder = self._recording(trainer)
        if self._by_micro_batch(trainer) or is_window_end(trainer, recorder.batch_idx):
            self._second_pass(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Run the second pass now if the last ``training_step`` of the window returned None, without a backward pass.

        With a gradient scaler, there is no optimizer step in this case.
        """
        if not pl_module.automatic_optimization:
            return
        run, _ = self._recording(trainer)
        if not run.passed and loss_scale(trainer, pl_module.device) is None and not self._by_micro_batch(trainer):
            with torch.enable_grad():
                self._second_pass(trainer, pl_module)

    def _second_pass(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        run, recorder = self._recording(trainer)
        with sharding(trainer, run.shard_group):
            self._run_passes(trainer, pl_module, run, recorder)

    def _run_passes(self, trainer: "Trainer", pl_module: "LightningModule", run: Run, recorder: Recorder) -> None:
        by_micro_batch = self._by_micro_batch(trainer)
        run.passed = True
        run.check_decision()  # if the last training step returned no loss
        if run.update is None and (by_micro_batch or not self.report.due):
            return
        params = [param for param in _parameters(trainer) if id(param) not in run.excluded]
        scale = gradient_scale(trainer, pl_module.device, alone=by_micro_batch)
        if run.update is None or run.ahead is not None:
            run.regularized = bool(run.ahead)
            losses = recorder.clean_losses() if run.ahead is not None and self.report.measures_clean_loss else []
            sharpness = self.report.loss_of_window(scale) - torch.stack(losses).sum() if losses else None
            self.report.first_only(params, scale, sharpness=sharpness)
            return
        if recorder.is_empty:  # all steps of the window returned None
            run.stashed.restore()
            return
        checks.check_hooks(params, self.is_local(trainer))
        checks.check_written(recorder.writes_gradients, self.is_local(trainer))
        local, position = self.is_local(trainer), recorder.batch_idx if by_micro_batch else None
        observer = self.report.of_window(position, scale, local, bool(run.stashed))
        chosen = {id(param) for param in params}
        with trainer.profiler.profile("[lightning_gr] second pass"):
            run.regularized |= add_second_pass_(
                run.update,
                params,
                run.replay if observer is None else observer.watch(run.replay),
                run.storage,
                stashed=run.stashed,
                excluded=[param for param in recorder.params if id(param) not in chosen],
                loss_scale=scale,
                observer=observer,
                state=self._state.vectors,
                **reduction(trainer, local, recorder.writes_gradients),
            )
        run.stashed.restore()
        if recorder.gave_up:
            self.warn_once(checks.NO_LOSS)

    def warn_once(self, message: str) -> None:
        """Issue a warning, but only the first time for each message."""
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step and drop its batches."""
        if pl_module.automatic_optimization:
            self._end_micro_batch(trainer, pl_module, batch, batch_idx)
        elif is_window_end(trainer, batch_idx):
            self.report.close(trainer, pl_module)

    def _end_micro_batch(self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int) -> None:
        run, recorder = self._recording(trainer)
        if batch is None:  # for which Lightning calls no other hook
            self._begin_window(trainer, pl_module, batch_idx)
        if self._by_micro_batch(trainer) and not recorder.has(batch_idx):
            for _ in range(passes_of(run.update)):
                recorder.take_part()
        if not is_window_end(trainer, batch_idx):
            return
        self.report.close(trainer, pl_module)
        if batch is not None:  # or there was no optimizer step
            due = run.update is not None and not recorder.is_empty
            unseen = due and not run.passed and not self._by_micro_batch(trainer)
            if unseen and loss_scale(trainer, pl_module.device) is None:
                raise checks.bypassed(trainer.precision_plugin)
            self.report.count(run.regularized, due)
        recorder.forget()
        run.stashed.restore()  # if there was no second pass
        run.stashed.clear()

    def summary(self, trainer: "Trainer", pl_module: "LightningModule") -> Summary:
        """The contents of the panel at the start of training."""
        own = type(self).should_regularize is not TwoPass.should_regularize
        schedule = "by should_regularize(step)" if own else str(self.schedule)
        how = {"local": self.is_local(trainer), "separate": self._by_micro_batch(trainer), "verbose": self.verbose}
        return self._runs[trainer].summary(trainer, pl_module, self.rule, self._row(), schedule=schedule, **how)

    @property
    def state(self) -> State:
        """The vectors that the rule keeps from step to step."""
        return self._state.vectors

    def note_manual(self, optimizer: torch.optim.Optimizer, regularized: bool, due: bool) -> None:
        """Record whether the gradient for an optimizer's next step is regularized, and whether it was due."""
        self._steps.note(optimizer, regularized, due)

    def excluded(self, trainer: "Trainer", pl_module: "LightningModule") -> set[int]:
        """The ids of the excluded parameters."""
        run = self._runs[trainer]
        self._look_for_new_layers(run, pl_module)
        return run.excluded

    def update_of(self, trainer: "Trainer", optimizer: torch.optim.Optimizer) -> Update | None:
        """The update for the current step of an optimizer; None for a plain step."""
        run = self._runs[trainer]
        run.update = self._update_at(self._steps.count_of(optimizer), optimizer)
        run.announce()
        run.check_decision()
        return run.update

    def _update_at(self, step: int, optimizer: torch.optim.Optimizer) -> Update | None:
        group = next(iter(optimizer.param_groups), {})  # a module without optimizers has an empty one
        update = self._row(Context(self.schedule.strength(step), step, group))
        return update if self.should_regularize(step) and not update.is_plain else None

    def state_dict(self) -> dict[str, Any]:
        """The step counts of the optimizers in manual optimization, and the rule's state by parameter name.

        In automatic optimization, the schedule follows the global step.
        """
        entries: dict[str, Any] = {"steps": list(self._steps.made), "state": self._state.state_dict()}
        entries = {name: value for name, value in entries.items() if value}
        return {"format_version": 1, **entries} if entries else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step counts of the optimizers and, when training starts, the rule's state."""
        self._steps.made = list(state_dict.get("steps", ()))
        self._state.load_state_dict(state_dict.get("state"))

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Read the state that earlier versions wrote."""
        if "lightning_gr" in checkpoint:
            self.load_state_dict(checkpoint["lightning_gr"])

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Stop recording and counting."""
        self._stop(trainer)

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Stop recording and counting, and drop the run; after Ctrl-C, print the table of what was done."""
        self._stop(trainer)
        if isinstance(exception, KeyboardInterrupt):
            show_end(self.report, self.rule.name, trainer, verbose=self.verbose)
        self._leave(trainer)

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Print the table, or warn if nothing was regularized, and drop the run."""
        if stage == "fit":
            self._stop(trainer)
            self.report.warn_if_all_missed(type(self).__name__, self._warned)
            show_end(self.report, self.rule.name, trainer, verbose=self.verbose)
            self._leave(trainer)

    def _leave(self, trainer: "Trainer") -> None:
        """Drop the run of ``trainer``, and return to the outer run, if any."""
        run = self._runs.pop(trainer, None)
        if run is not None and run.outer is not None:
            self.report, self._steps = run.outer

    def _stop(self, trainer: "Trainer") -> None:
        run = self._runs.get(trainer)
        if run is not None and run.recorder is not None:
            run.recorder.remove()
            run.recorder = None
        self._steps.detach()

    def _by_micro_batch(self, trainer: "Trainer") -> bool:
        return self.accumulation == "micro_batch" and trainer.accumulate_grad_batches > 1

    def is_local(self, trainer: "Trainer") -> bool:
        """Whether each device ascends along its own gradient."""
        return not self.ascent_sync and trainer.world_size > 1


def _parameters(trainer: "Trainer") -> list[Tensor]:
    return [param for group in trainer.optimizers[0].param_groups for param in group["params"]]
