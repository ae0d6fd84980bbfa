"""The range test: the loss at displaced weights, for constants that grow until it breaks."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_gr._compat import REFUSED_STRATEGIES, CallbackBase, MisconfigurationException, has_base_named
from lightning_gr._validate import check_int
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.callbacks.recorder import surroundings_of
from lightning_gr.core.ahead import momenta_of
from lightning_gr.core.rules import GRRule, Update
from lightning_gr.core.sharding import mean_over_ranks
from lightning_gr.core.two_pass import extract_loss
from lightning_gr.sharpness.hessian import LossAround
from lightning_gr.tune.space import Constants, rounded

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["DisplacedLosses", "RangeFinder", "Sweep"]

# four values per decade
GRID = tuple(10.0 ** (k / 4) for k in range(-12, 25))
BATCHES = 4


@dataclass(frozen=True)
class Sweep:
    """How much the loss rises at displaced weights, for each value of a method's first constant.

    Args:
        constant: The name of the constant.
        values: Its values, on a logarithmic grid that ends soon after the loss breaks.
        rises: The perturbed minus the clean loss at each value, as a mean over the last batches.
        first: The loss at the first step of training.
        clean: The clean loss over the last batches.
    """

    constant: str
    values: tuple[float, ...]
    rises: tuple[float, ...]
    first: float
    clean: float

    @property
    def scale(self) -> float:
        """The loss of an untrained model: a rise by this much undoes all of the training."""
        return max(abs(self.first), abs(self.first - self.clean), 1e-12)

    @property
    def edge(self) -> float:
        """The value at which the loss rises by as much as :attr:`scale`, interpolated on the grid."""
        before: tuple[float, float] | None = None
        for value, rise in zip(self.values, self.rises, strict=True):
            if not math.isfinite(rise):
                return before[0] if before else value
            if rise >= self.scale:
                return _crossing(before, (value, rise), self.scale)
            before = value, rise
        return self.values[-1]

    @property
    def bound(self) -> float:
        """The upper bound of a search: twice the edge, and for a flood level at most the loss of the first step."""
        return min(2 * self.edge, self.first) if self.constant == "level" else 2 * self.edge

    @property
    def suggestion(self) -> float:
        """Half of the edge, which is within a factor of two of the best constants of our own examples."""
        return rounded(self.edge / 2)


def _crossing(before: tuple[float, float] | None, after: tuple[float, float], scale: float) -> float:
    """Where a line between two points of the grid, with a logarithmic axis of values, crosses ``scale``."""
    if before is None:
        return after[0]
    share = (scale - before[1]) / (after[1] - before[1])
    return float(before[0] * (after[0] / before[0]) ** share)


class RangeFinder(CallbackBase):  # type: ignore[misc]
    """Finds a usable constant for a method in the first steps of training, and writes it into the method.

    The first ``warmup_steps`` optimizer steps are plain. The loss of the last four batches is then evaluated at weights
    displaced as the method would displace them, by more and more, until it has risen by the loss of the first step.
    Half of the constant at which this happens goes into the method's callback (γ = ε for gradient regularization),
    and training goes on with it. The test itself leaves no trace.

    Args:
        warmup_steps: The number of plain optimizer steps before the test.
        method: The method's callback. Default: the only one among the Trainer's callbacks.
        apply: Whether to write the suggestion into the method. If not, the method stays as it is, and is active from
            the first step.

    Raises:
        ValueError: If ``warmup_steps`` is not a positive integer.
        MisconfigurationException: At the start of ``fit``, if there is not exactly one method, if parameters are
            sharded, or in manual optimization.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> from lightning_gr import SAM
        >>> trainer = Trainer(callbacks=[RangeFinder(), SAM()], logger=False, accelerator="cpu")
    """

    def __init__(self, warmup_steps: int = 100, *, method: Any = None, apply: bool = True) -> None:
        super().__init__()
        check_int("warmup_steps", warmup_steps, minimum=1)
        self.warmup_steps, self.method, self.apply = warmup_steps, method, apply
        self.result: Sweep | None = None
        self.losses: list[Tensor] = []
        self._batches: list[tuple[Any, int]] = []
        self._active: Any = None

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Raise if this Trainer or module is not supported."""
        if stage != "fit":
            return
        if has_base_named(trainer.strategy, "ModelParallelStrategy", "FSDPStrategy", *REFUSED_STRATEGIES):
            raise MisconfigurationException(
                f"RangeFinder needs all parameters on each device, but {type(trainer.strategy).__name__} shards them:"
                " use `Trainer(strategy='ddp')` to find the constant"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"RangeFinder needs automatic optimization, but {type(pl_module).__name__} uses manual optimization"
            )

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Find the method and, unless training resumes, switch it off until the test."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, (TwoPass, Flooding))]
        if self.method is None and len(found) != 1:
            raise MisconfigurationException(
                f"RangeFinder needs exactly one method among the Trainer's callbacks but got {len(found)}: pass"
                " `RangeFinder(method=...)`"
            )
        self._active = self.method if self.method is not None else found[0]
        self.result, self.losses, self._batches = None, [], []
        if self.apply and trainer.global_step == 0:
            self._switch_off()

    def _switch_off(self) -> None:
        method = self._active
        if isinstance(method, Flooding):
            self._level, method.level = method.level, 0.0
        else:
            self._schedule = method.schedule
            method.schedule = replace(method.schedule, start_step=max(self.warmup_steps, method.schedule.start_step))

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keep copies of the last batches before the test."""
        if self.result is None and trainer.global_step < self.warmup_steps:
            self._batches = [*self._batches, (copy.deepcopy(batch), batch_idx)][-BATCHES:]

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of the first step, and test after the last plain one."""
        if self.result is not None or trainer.global_step > self.warmup_steps:
            return
        loss = extract_loss(outputs)
        if isinstance(loss, Tensor) and not self.losses:
            # Lightning divides it by the number of micro-batches
            self.losses.append(_over_ranks(trainer, loss.detach() * trainer.accumulate_grad_batches))
        if trainer.global_step == self.warmup_steps and self.losses:
            self.result = self._sweep(trainer, pl_module)
            self._batches = []
            if self.apply:
                self._write(trainer, self.result)

    def _sweep(self, trainer: "Trainer", pl_module: "LightningModule") -> Sweep:
        first, method = float(self.losses[0]), self._active
        losses = DisplacedLosses(trainer, pl_module, self._batches)
        rise: Callable[[float], float]
        if isinstance(method, Flooding):
            constant, rise = "level", losses.flooded
        else:
            update = method.rule.update()
            constant = "epsilon" if isinstance(method.rule, GRRule) else "rho"
            rise = losses.along(update, trainer.optimizers[0])
        values, rises = [], []
        clean = losses.clean()
        scale = max(abs(first), abs(first - clean), 1e-12)
        for value in GRID:
            values.append(value)
            rises.append(rise(value))
            if not rises[-1] <= 30 * scale:  # also if it is not a number
                break
        return Sweep(constant, tuple(values), tuple(rises), first, clean)

    def _write(self, trainer: "Trainer", result: Sweep) -> None:
        method = self._active
        constants: Constants = {result.constant: result.suggestion}
        if isinstance(method, Flooding):
            method.level = result.suggestion
        else:
            if isinstance(method.rule, GRRule):
                constants["gamma"] = result.suggestion
            method.rule = replace(method.rule, **constants)
            method.schedule = self._schedule
        chosen = ", ".join(f"{name}={value:g}" for name, value in constants.items())
        rank_zero_info(f"RangeFinder: {type(method).__name__} continues with {chosen}")

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Warn if training ended before the test, in which case it was plain."""
        self._batches = []
        if self.result is None and self.apply and trainer.global_step <= self.warmup_steps:
            rank_zero_warn(
                f"RangeFinder: training ended after {trainer.global_step} steps, before the test after"
                f" {self.warmup_steps}, so it was plain: use a smaller `warmup_steps`"
            )
            if isinstance(self._active, Flooding):
                self._active.level = self._level


class DisplacedLosses:
    """The mean loss over a few batches, and over ranks, at displaced weights."""

    def __init__(self, trainer: "Trainer", module: "LightningModule", batches: Sequence[tuple[Any, int]]) -> None:
        self.trainer, self.module = trainer, module
        self.around = [self._around(batch, index) for batch, index in batches]

    def _around(self, batch: Any, index: int) -> LossAround:
        from inspect import signature

        step = self.module.training_step
        # copied each time, since the step may change its batch in place
        arguments = (index,) if len(signature(step).parameters) > 1 else ()
        return LossAround(
            lambda: step(copy.deepcopy(batch), *arguments),
            self.module,
            surroundings=surroundings_of(self.trainer, self.module),
        )

    def _mean(self, values: Sequence[Tensor]) -> float:
        mean = torch.stack([value.detach().float() for value in values]).mean()
        return float(_over_ranks(self.trainer, mean))

    def clean(self) -> float:
        """The loss at the weights themselves."""
        self.losses = []
        for around in self.around:
            with around, self._context():
                zero = [torch.zeros_like(param) for param in around.params]
                self.losses.append(around.loss_at(zero, 0.0))
        return self._mean(self.losses)

    def flooded(self, level: float) -> float:
        """The flooded minus the clean loss: |L − b| + b − L."""
        return self._mean([2 * (level - loss).clamp_min(0.0) for loss in self.losses])

    def along(self, update: Update, optimizer: torch.optim.Optimizer) -> Callable[[float], float]:
        """The perturbed minus the clean loss as a function of the distance along the direction of ``update``."""
        with_directions = []
        for around in self.around:
            with around, self._context():
                with_directions.append((around, _direction(update, optimizer, around)))
        sign = -1.0 if any(probe.distance < 0 for probe in update.probes) and len(update.probes) == 1 else 1.0

        def rise(distance: float) -> float:
            rises = []
            for (around, direction), clean in zip(with_directions, self.losses, strict=True):
                with around, self._context():
                    rises.append(around.loss_at(direction, sign * distance) - clean)
            # descent lowers the loss at first; what counts is how far it is from the clean one
            return self._mean(rises)

        return rise

    def _context(self) -> Any:
        return self.trainer.precision_plugin.train_step_context()


def _over_ranks(trainer: "Trainer", value: Tensor) -> Tensor:
    return mean_over_ranks(value) if trainer.world_size > 1 else value


def _direction(update: Update, optimizer: torch.optim.Optimizer, around: LossAround) -> list[Tensor]:
    """The direction d of the update on one batch, along which a constant of 1 displaces the weights."""
    if update.ahead:
        momenta = {id(param): momentum for param, momentum in momenta_of(optimizer, around.params)}
        if not momenta:
            raise MisconfigurationException(f"{type(optimizer).__name__} keeps no momentum to look ahead along")
        ahead = [-momenta[id(p)] if id(p) in momenta else torch.zeros_like(p) for p in around.params]
        return _unit(ahead)
    gradient = list(around.gradient_at([torch.zeros_like(p) for p in around.params], 0.0))
    if update.direction == "normalized":
        return _unit(gradient)
    if update.direction == "adaptive":
        scales = [param.detach().abs() + update.eta for param in around.params]
        scaled = _unit([t * g for t, g in zip(scales, gradient, strict=True)])
        return [t * s for t, s in zip(scales, scaled, strict=True)]
    return gradient


def _unit(vector: Sequence[Tensor]) -> list[Tensor]:
    norm = torch.stack([part.float().norm() for part in vector]).norm().clamp_min(1e-30)
    return [part / norm for part in vector]
