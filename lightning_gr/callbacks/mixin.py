"""Manual optimization: GANs, several optimizers, loops of one's own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gr._compat import is_a, lightning_attributes
from lightning_gr.callbacks.base import TwoPassCallback
from lightning_gr.callbacks.checks import check_level
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.recorder import loss_scale
from lightning_gr.callbacks.windows import HeldGradients
from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.perturb import WeightCopy, scale_
from lightning_gr.core.rules import Rule, Update
from lightning_gr.core.two_pass import add_second_pass_
from lightning_gr.replay.closure import ClosurePasses
from lightning_gr.replay.isolation import StatefulModules
from lightning_gr.report.measurement import Measurement

if TYPE_CHECKING:
    # what the mixin is mixed into; at run time it inherits from nothing, so that it works in both namespaces
    from pytorch_lightning import LightningModule as _Base
    from pytorch_lightning import Trainer
else:
    _Base = object

__all__ = ["GradientRegularizationMixin"]

_RuleChoice = Rule | Literal["trainer"] | None
_LevelChoice = float | Literal["trainer"] | None
_LossFn = Callable[[], Any] | Sequence[Callable[[], Any]]
_ATTRIBUTE = "_lightning_gr"


class GradientRegularizationMixin(_Base):
    """Gradient regularization, SAM and flooding in manual optimization.

    Put it before LightningModule in the bases. What is done is set by the callbacks in the Trainer
    (:class:`~lightning_gr.GradientRegularization`, :class:`~lightning_gr.SAM`, :class:`~lightning_gr.Flooding`);
    without one the module trains plainly. Their schedules count the steps of each optimizer by itself.

    The passes leave no trace, as in automatic optimization: the closure sees the same random numbers and buffers each
    time, logs once, and the weights are restored bit for bit.

    Source: Karakida, Takase, Hayase & Osawa (ICML 2023, arXiv 2210.02720).

    Example: a GAN whose discriminator is regularized and whose generator is not::

        >>> from pytorch_lightning import LightningModule
        >>> class GAN(GradientRegularizationMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.automatic_optimization = False
        ...
        ...     def training_step(self, real):
        ...         generator, discriminator = self.optimizers()
        ...         noise = torch.randn(len(real), 64)
        ...         fake = self.generator(noise).detach()
        ...         self.regularized_step(discriminator, lambda: self.discriminator_loss(real, fake))
        ...         with generator.toggle_model():
        ...             self.regularized_step(generator, lambda: self.generator_loss(noise), rule=None)
    """

    def regularized_step(
        self,
        optimizer: Any,
        loss_fn: _LossFn,
        *,
        rule: _RuleChoice = "trainer",
        level: _LevelChoice = "trainer",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
    ) -> Tensor:
        """Make one step: zero the gradients, run both passes, clip, step.

        Args:
            optimizer: One of ``self.optimizers()``. Only its parameters are perturbed.
            loss_fn: Computes the loss (or a mapping with ``"loss"``) from the current weights; called two times or
                more. Several of them are micro-batches: the loss is their mean, and the step that of one large batch.
            rule: Another method than the Trainer's, or None for a step without second pass.
            level: Another flood level than the Trainer's, or None for no flooding.
            gradient_clip_val: Clip the final gradient at this value; None does not. (Trainer refuses its own argument
                in manual optimization.) Under 16-mixed it is clipped in the unit of the loss, not in the scaler's.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Returns:
            The loss of the first pass, detached, without flooding.

        Raises:
            MisconfigurationException: In automatic optimization, outside ``training_step``, or if ``optimizer`` is not
                one of this module.
            ValueError: If ``loss_fn`` returns no loss with a graph.
        """
        run = _Run.of(self, "regularized_step")
        optimizer = run.find(optimizer)
        optimizer.zero_grad()
        loss = self.regularized_backward(loss_fn, optimizer, rule=rule, level=level)
        if gradient_clip_val is not None:
            with run.unscaled(optimizer):
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        optimizer.step()
        return loss

    def regularized_backward(
        self,
        loss_fn: _LossFn,
        optimizer: Any,
        *,
        rule: _RuleChoice = "trainer",
        level: _LevelChoice = "trainer",
    ) -> Tensor:
        """Add the final gradient to ``.grad`` and make no step, for clipping or accumulation of your own.

        What is in ``.grad`` before is kept and added to: the direction comes from this loss only. Parameters of other
        optimizers get the clean gradient.

        Args:
            loss_fn: As in :meth:`regularized_step`.
            optimizer: One of ``self.optimizers()``, whose parameters are regularized; or some of the parameters of one
                of them, as in ``self.backbone.parameters()``. The others get the clean gradient.
            rule: As there.
            level: As there.

        Returns:
            The loss of the first pass, detached, without flooding.

        Raises:
            MisconfigurationException: As in :meth:`regularized_step`.
            ValueError: If ``loss_fn`` returns no loss with a graph.
        """
        run = _Run.of(self, "regularized_backward")
        if isinstance(optimizer, Iterable):
            params = list(optimizer)
            return run.backward(loss_fn, run.find_owner(params), rule, level, params)
        return run.backward(loss_fn, run.find(optimizer), rule, level)


class _Run:
    """What the mixin needs between calls. It is not copied with its module, nor pickled."""

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self._copies: dict[int, WeightCopy] = {}

    def __reduce__(self) -> Any:
        return type(self), ()

    @classmethod
    def of(cls, module: Any, method: str) -> "_Run":
        """That of ``module``, ready to be used in the current step."""
        if module.automatic_optimization:
            raise MisconfigurationException(
                f"`{method}` needs manual optimization: set `self.automatic_optimization = False` in `__init__`, or"
                " return the loss from `training_step` and let the callback do all of it"
            )
        try:
            trainer = module.trainer
        except RuntimeError:
            trainer = None
        if trainer is None or not trainer.training:
            raise MisconfigurationException(
                f"`{method}` works in `training_step` during `Trainer.fit`; elsewhere use"
                " `lightning_gr.regularized_backward`"
            )
        run: _Run = vars(module).setdefault(_ATTRIBUTE, cls())
        run._prepare(module, trainer)
        return run

    def _prepare(self, module: Any, trainer: "Trainer") -> None:
        if vars(self).get("trainer") is not trainer:
            # DDP learns a static graph in its first backward pass, and does so only if it reduces there
            self._knows_graph = not getattr(trainer.strategy.model, "static_graph", False)
        self.module, self.trainer = module, trainer
        key = id(trainer), trainer.current_epoch
        if key != self._key:
            self._key = key
            known = vars(self).get("_modules")
            self._modules = StatefulModules(module, lightning_attributes() | {_ATTRIBUTE}, known)
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            self._two_pass = next((c for c in callbacks if isinstance(c, TwoPassCallback)), None)
            self._flooding = next((c for c in callbacks if isinstance(c, Flooding)), None)

    def _optimizers(self) -> list[Any]:
        known = self.module.optimizers()
        return known if isinstance(known, list) else [known]

    def find(self, optimizer: Any) -> Any:
        """The one of the module's optimizers that is meant, as Lightning wraps it."""
        for wrapped in self._optimizers():
            if optimizer is wrapped or optimizer is wrapped.optimizer:
                return wrapped
        raise MisconfigurationException(
            f"Expected `optimizer` to be one of `self.optimizers()` but got {type(optimizer).__name__}: let"
            " `configure_optimizers` return it"
        )

    def find_owner(self, params: Sequence[Tensor]) -> Any:
        """The optimizer that has all of ``params``."""
        ids = {id(param) for param in params}
        for wrapped in self._optimizers():
            if ids and ids <= {id(param) for param in _parameters(wrapped)}:
                return wrapped
        raise MisconfigurationException(
            f"Expected the {len(params)} parameters given as `optimizer` to belong to one of `self.optimizers()`, all"
            " of them: call `regularized_backward` for each optimizer by itself"
        )

    @contextmanager
    def unscaled(self, optimizer: Any) -> Iterator[None]:
        """Take a gradient scaler's factor out of the gradients; the precision plugin wants it back for its own."""
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
        loss_fn: _LossFn,
        optimizer: Any,
        rule: _RuleChoice,
        level: _LevelChoice,
        params: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Both passes, for ``params``, by default all that the optimizer has."""
        own = _parameters(optimizer) if params is None else params
        update = self._update(optimizer, rule)
        callback, chosen = self._two_pass, {id(param) for param in own}
        left_out = callback.excluded if callback is not None and rule == "trainer" else set()
        targets = [param for param in own if id(param) not in left_out]
        scale = loss_scale(self.trainer, self.module.device)
        held = HeldGradients()
        held.put_aside(own)
        passes = self._passes(loss_fn, level, local=update is not None and self._is_local())
        loss = passes.first(only=update is None)
        self._knows_graph = True
        if update is None:
            if callback is not None:
                callback.watch.first_only(targets, scale, self._group(optimizer))
        else:
            looks_on = self._observer(optimizer, loss, len(passes.passes), bool(held))
            replay = held.before(passes.replay)
            add_second_pass_(
                update,
                targets,
                replay if looks_on is None else looks_on.watch(replay),
                self._copies.setdefault(id(optimizer.optimizer), WeightCopy(check_resolution=True)),
                excluded=[p for p in self.module.parameters() if id(p) not in chosen or id(p) in left_out],
                loss_scale=scale,
                check_finite=not self._is_local(),
                observer=looks_on,
            )
        if callback is not None:
            callback.watch.count(update is not None)
        held.give_back()
        return loss

    def _observer(self, optimizer: Any, loss: Tensor, unit: int, held: bool) -> Measurement | None:
        if self._two_pass is None:
            return None
        return self._two_pass.watch.measurement(
            0, loss, float(unit), self._is_local(), separable=not held, group=self._group(optimizer)
        )

    def _group(self, optimizer: Any) -> str:
        """What the keys of an optimizer's metrics begin with, if there are several."""
        known = self.trainer.optimizers
        return "" if len(known) == 1 else f"optimizer_{known.index(optimizer.optimizer)}/"

    def _update(self, optimizer: Any, rule: _RuleChoice) -> Update | None:
        if rule == "trainer":
            return None if self._two_pass is None else self._two_pass.update_of(optimizer.optimizer)
        if rule is None:
            return None
        if isinstance(rule, str) or not hasattr(rule, "update"):
            raise ValueError(f"Expected argument `rule` to be a GRRule, a SAMRule, None or 'trainer' but got {rule!r}")
        update = rule.update()
        return None if update.is_plain else update

    def _is_local(self) -> bool:
        return self._two_pass is not None and self._two_pass.is_local(self.trainer)

    def _passes(self, loss_fn: _LossFn, level: _LevelChoice, local: bool) -> "_Micro":
        functions = list(loss_fn) if isinstance(loss_fn, Sequence) else [loss_fn]
        if not functions:
            raise ValueError("Expected `loss_fn` to be a function or some of them but got an empty list")
        root = self.trainer.strategy.root_device
        share = 1.0 / len(functions)
        passes = [
            ClosurePasses(
                function,
                self._modules,
                [] if root.type == "cpu" else [root],
                backward=lambda loss: self.module.manual_backward(loss if share == 1.0 else loss * share),
                backward_again=lambda loss: self._backward_again(loss if share == 1.0 else loss * share),
                flood=self._flood(level),
                muted=self.module,
                without_sync=self._without_sync,
                # only the last micro-batch reduces the gradients
                local=(local or position < len(functions) - 1) and self._knows_graph,
            )
            for position, function in enumerate(functions)
        ]
        return _Micro(passes)

    def _flood(self, level: _LevelChoice) -> Callable[[Tensor], object] | None:
        if level == "trainer":
            flooding, trainer = self._flooding, self.trainer
            return None if flooding is None else lambda loss: flooding.flood_gradient_(trainer, loss)
        if level is None:
            return None
        check_level(level)
        return lambda loss: flood_gradient_(loss, float(level))

    def _without_sync(self) -> AbstractContextManager[Any]:
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if is_a(strategy, "ParallelStrategy") else nullcontext()

    def _backward_again(self, loss: Tensor) -> None:
        """``manual_backward`` without the hooks, which belong to the first pass."""
        strategy = self.trainer.strategy
        strategy.pre_backward(loss)
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        loss = loss if scaler is None else scaler.scale(loss)
        strategy.precision_plugin.backward(loss, self.module, None)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


class _Micro:
    """Closures one after the other, as the micro-batches of one large batch."""

    def __init__(self, passes: Sequence[ClosurePasses]) -> None:
        self.passes = passes

    def first(self, only: bool) -> Tensor:
        losses = [each.first(only) for each in self.passes]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def replay(self, transform: Callable[[Tensor], Tensor], last: bool = True) -> None:
        for position, each in enumerate(self.passes, start=1):
            each.replay(transform, last and position == len(self.passes))
