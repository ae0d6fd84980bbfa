"""Runs the passes of the mixin in manual optimization: closures, for the parameters of one optimizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gr._compat import (
    MisconfigurationException,
    gradient_scaler,
    pre_backward,
    static_graph,
    unsynced,
    wrap_after_backward,
    wrap_backward,
)
from lightning_gr._validate import check_level
from lightning_gr.callbacks.after_backward import AfterBackward
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.callbacks.checks import check_momentum_by_now, check_written
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.recorder import displaced, loss_scale, surroundings_of
from lightning_gr.core.ahead import Ahead
from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.gradients import StashedGradients
from lightning_gr.core.rules import Context, Rule, Update
from lightning_gr.core.state import State
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import scale_
from lightning_gr.core.two_pass import Transform, add_second_pass_
from lightning_gr.replay.closure import ClosurePasses
from lightning_gr.report.measurement import Measurement

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["LevelChoice", "LossFn", "ManualRun", "RuleChoice"]

RuleChoice = Rule | Literal["trainer"] | None
LevelChoice = float | Literal["trainer"] | None
LossFn = Callable[[], Any] | Sequence[Callable[[], Any]]
_ATTRIBUTE = "_lightning_gr"


class ManualRun:
    """The mixin's state between calls. Copying or pickling the module does not copy it."""

    def __init__(self) -> None:
        self._storages: dict[int, WeightStorage] = {}

    def __reduce__(self) -> Any:
        return type(self), ()

    @classmethod
    def of(cls, module: Any, method: str) -> "ManualRun":
        """Return the run of ``module``, prepared for the current step."""
        if module.automatic_optimization:
            raise MisconfigurationException(
                f"`{method}` needs manual optimization: set `self.automatic_optimization = False` in `__init__`, or"
                " return the loss from `training_step` and let the callback do the rest"
            )
        try:
            trainer = module.trainer
        except RuntimeError:
            trainer = None
        if trainer is None or not trainer.training:
            raise MisconfigurationException(
                f"`{method}` only works in `training_step` during `Trainer.fit`: use"
                " `lightning_gr.regularized_backward` elsewhere"
            )
        run: ManualRun = vars(module).setdefault(_ATTRIBUTE, cls())
        run._prepare(module, trainer)
        return run

    def _prepare(self, module: Any, trainer: "Trainer") -> None:
        if vars(self).get("trainer") is trainer:
            return
        self.module, self.trainer = module, trainer
        self._surroundings = surroundings_of(trainer, module)
        self._after_backward = AfterBackward(trainer, module, self._surroundings.trained)
        # DDP records a static graph in its first backward pass, but only if gradients are reduced in it
        self._knows_graph = not static_graph(trainer.strategy.model)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._own_state = State()  # of rules that are given in a call
        self._two_pass = next((c for c in callbacks if isinstance(c, TwoPass)), None)
        self._flooding = next((c for c in callbacks if isinstance(c, Flooding)), None)

    def _optimizers(self) -> list[Any]:
        optimizers = self.module.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def find(self, optimizer: Any) -> Any:
        """Return Lightning's wrapper of one of the module's optimizers."""
        for wrapped in self._optimizers():
            if optimizer is wrapped or optimizer is wrapped.optimizer:
                return wrapped
        raise MisconfigurationException(
            f"Expected `optimizer` to be one of `self.optimizers()` but got {type(optimizer).__name__}: let"
            " `configure_optimizers` return it"
        )

    def find_owner(self, params: Sequence[Tensor]) -> Any:
        """Return the optimizer that contains all of ``params``."""
        ids = {id(param) for param in params}
        for wrapped in self._optimizers():
            if ids and ids <= {id(param) for param in _parameters(wrapped)}:
                return wrapped
        raise MisconfigurationException(
            f"Expected all {len(params)} parameters given as `optimizer` to belong to a single one of"
            " `self.optimizers()`: call `regularized_backward` separately for each optimizer"
        )

    @contextmanager
    def unscaled(self, optimizer: Any) -> Iterator[None]:
        """Unscale the gradients temporarily; afterwards the scale is restored for the precision plugin."""
        scale = loss_scale(self.trainer, self.module.device)
        grads = [param.grad for param in _parameters(optimizer) if param.grad is not None]
        if scale is None or not grads:
            yield
            return
        scale_(grads, scale.reciprocal())
        yield
        scale_(grads, scale)

    def backward(
        self,
        loss_fn: LossFn,
        optimizer: Any,
        rule: RuleChoice,
        level: LevelChoice,
        params: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run both passes for ``params``, or for all of the optimizer's parameters."""
        params = _parameters(optimizer) if params is None else params
        update = self._update(optimizer, rule)
        callback, chosen = self._two_pass, {id(param) for param in params}
        excluded: set[int] = set() if callback is None else callback.excluded(self.trainer, self.module)
        targets = [param for param in params if id(param) not in excluded]
        scale = loss_scale(self.trainer, self.module.device)
        stashed = StashedGradients()
        stashed.stash(params)
        storage = self._storages.setdefault(id(optimizer.optimizer), WeightStorage(check_resolution=True))
        ahead = None if update is None else self._ahead(optimizer, targets, update, storage)
        passes = self._passes(loss_fn, level, storage, update is not None and self._is_local(), ahead)
        measures = ahead is not None and callback is not None and callback.report.measures_clean_loss
        loss = passes.first(only=(update is None or not update.has_second_pass) and not measures)
        self._knows_graph = True
        regularized = bool(ahead)
        if update is None or not update.has_second_pass:
            if callback is not None:
                clean = passes.clean_loss() if measures else None
                sharpness = None if clean is None else loss - clean
                callback.report.first_only(targets, scale, self._group(optimizer), sharpness)
        else:
            observer = self._observer(optimizer, loss, len(passes.passes), bool(stashed))
            regularized = add_second_pass_(
                update,
                targets,
                passes.replay if observer is None else observer.watch(passes.replay),
                storage,
                stashed=stashed,
                excluded=[p for p in self.module.parameters() if id(p) not in chosen or id(p) in excluded],
                apart=self._writes_gradients(passes),
                loss_scale=scale,
                check_finite=not self._is_local(),
                observer=observer,
                state=self._state,
            )
        if callback is not None:
            callback.note_manual(optimizer.optimizer, regularized, due=update is not None)
        stashed.restore()
        return loss

    def _writes_gradients(self, passes: "_MicroBatches") -> bool:
        writes = passes.writes_gradients or self._after_backward.change_gradients
        check_written(writes, self._is_local())
        return writes

    def _observer(self, optimizer: Any, loss: Tensor, unit: int, stashed: bool) -> Measurement | None:
        if self._two_pass is None:
            return None
        return self._two_pass.report.measurement(
            0, loss, float(unit), self._is_local(), separable=not stashed, group=self._group(optimizer)
        )

    def _group(self, optimizer: Any) -> str:
        """The prefix of an optimizer's metrics if there are several optimizers."""
        optimizers = self.trainer.optimizers
        return "" if len(optimizers) == 1 else f"optimizer_{optimizers.index(optimizer.optimizer)}/"

    def _update(self, optimizer: Any, rule: RuleChoice) -> Update | None:
        if rule == "trainer":
            return None if self._two_pass is None else self._two_pass.update_of(optimizer.optimizer)
        if rule is None:
            return None
        if isinstance(rule, str) or not hasattr(rule, "update"):
            raise ValueError(f"Expected argument `rule` to be a GRRule, a SAMRule, None or 'trainer' but got {rule!r}")
        update = rule.update(Context(group=optimizer.param_groups[0]))
        return None if update.is_plain else update

    @property
    def _state(self) -> State:
        return self._own_state if self._two_pass is None else self._two_pass.state

    def _ahead(self, optimizer: Any, targets: Sequence[Tensor], update: Update, storage: WeightStorage) -> Ahead | None:
        if not update.ahead:
            return None
        check_momentum_by_now(optimizer.optimizer)
        return Ahead(optimizer.optimizer, targets, update.ahead, storage)

    def _is_local(self) -> bool:
        return self._two_pass is not None and self._two_pass.is_local(self.trainer)

    def _passes(
        self, loss_fn: LossFn, level: LevelChoice, storage: WeightStorage, local: bool, ahead: Ahead | None
    ) -> "_MicroBatches":
        functions = list(loss_fn) if isinstance(loss_fn, Sequence) else [loss_fn]
        if not functions:
            raise ValueError("Expected `loss_fn` to be a function or a list of functions but got an empty list")
        weight = 1.0 / len(functions)
        passes = [
            ClosurePasses(
                function,
                self._surroundings,
                storage,
                backward=lambda loss: self._backward(loss if weight == 1.0 else loss * weight, ahead),
                backward_again=lambda loss: self._backward_again(loss if weight == 1.0 else loss * weight),
                flood=self._flood(level),
                without_sync=lambda: unsynced(self.trainer),
                # gradients are only reduced in the last micro-batch
                local=(local or position < len(functions) - 1) and self._knows_graph,
                ahead=ahead,
                displaced=None if ahead is None else lambda: displaced(self.trainer, ahead),
                on_no_loss=self._note_no_loss,
            )
            for position, function in enumerate(functions)
        ]
        return _MicroBatches(passes)

    def _note_no_loss(self, message: str) -> None:
        if self.trainer.world_size > 1:
            raise RuntimeError(
                "The loss function returned a loss in the first pass and None in the second, at displaced weights, and"
                " the other devices wait for its gradient: return the loss as it is, or take a smaller radius"
            )
        if self._two_pass is not None:
            self._two_pass.warn_once(message)
        else:
            rank_zero_warn(message)

    def _flood(self, level: LevelChoice) -> Callable[[Tensor], object] | None:
        if level == "trainer":
            flooding, trainer = self._flooding, self.trainer
            return None if flooding is None else lambda loss: flooding.flood_gradient_(trainer, loss)
        if level is None:
            return None
        check_level(level)
        return lambda loss: flood_gradient_(loss, float(level))

    def _backward(self, loss: Tensor, ahead: Ahead | None) -> None:
        def in_place(*args: Any, **kwargs: Any) -> Any:
            # the hooks around the backward pass find the weights where they belong
            with nullcontext() if ahead is None else ahead.displaced(again=True):
                return backward(*args, **kwargs)

        def watched(*args: Any, **kwargs: Any) -> Any:
            return self._after_backward.first(run_hooks, *args, thorough=self._surroundings.learning, **kwargs)

        backward, unwrap = wrap_backward(self.trainer, in_place)
        run_hooks, unwrap_hooks = wrap_after_backward(self.trainer, watched)
        try:
            self.module.manual_backward(loss)
        finally:
            unwrap_hooks()
            unwrap()

    def _backward_again(self, loss: Tensor) -> None:
        """Do what ``manual_backward`` does, without the hooks, which only run in the first pass."""
        pre_backward(self.trainer, loss)
        scaler = gradient_scaler(self.trainer)
        loss = loss if scaler is None else scaler.scale(loss)
        self.trainer.precision_plugin.backward(loss, self.module, None)
        self._after_backward.again()


def _parameters(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


class _MicroBatches:
    """Runs several closures in sequence, as the micro-batches of one large batch."""

    def __init__(self, passes: Sequence[ClosurePasses]) -> None:
        self.passes = passes

    def first(self, only: bool) -> Tensor:
        losses = [passes.first(only, later=position > 0) for position, passes in enumerate(self.passes)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def clean_loss(self) -> Tensor | None:
        losses = [each.clean_loss() for each in self.passes]
        known = [loss for loss in losses if loss is not None]
        return torch.stack(known).mean() if len(known) == len(losses) else None

    @property
    def writes_gradients(self) -> bool:
        return any(passes.writes_gradients for passes in self.passes)

    def replay(self, transform: Transform, last: bool = True) -> None:
        writes = self.writes_gradients
        for position, passes in enumerate(self.passes, start=1):
            passes.replay(transform, last and position == len(self.passes), sees=writes and position > 1)
