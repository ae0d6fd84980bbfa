"""Methods cheaper than two passes: those in the package, and prototypes of those that are not.

The prototypes only support one device, float32, SGD with momentum and no accumulation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr.core.tensors import global_norm

__all__ = ["CHOSEN", "GRID", "STEPS"]

STEPS, EVERY = 480, 5  # 60 epochs of 8 steps; a second pass in every fifth step averages 1.2 passes
LATE = STEPS - STEPS // EVERY


def _params(module: pl.LightningModule) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _grads(module: pl.LightningModule) -> list[Tensor]:
    return [p.grad for p in _params(module) if p.grad is not None]


class Ascending(pl.Callback):
    """Runs Lightning's own pass, the only one on the full batch, at θ + ρ d/‖d‖."""

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self._before: list[Tensor] = []

    def direction(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> list[Tensor]:
        raise NotImplementedError

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        along = self.direction(trainer, module, batch)
        if along:
            with torch.no_grad():
                self._before = [p.clone() for p in _params(module)]
                step = self.rho / (float(global_norm(along)) + 1e-12)
                torch._foreach_add_(_params(module), along, alpha=step)

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._before:
            with torch.no_grad():
                torch._foreach_copy_(_params(module), self._before)


class Momentum(Ascending):
    """A single pass at θ + ρ v/‖v‖, where v is the momentum: toward the previous weights, or ahead if ρ < 0."""

    def direction(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> list[Tensor]:
        state = trainer.optimizers[0].state
        return [state[p]["momentum_buffer"] for p in _params(module)] if state else []


class PartAscends(Ascending):
    """Ascends along the gradient of the first fifth of the batch."""

    def direction(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> list[Tensor]:
        loss = module.training_step([part[: -(-len(part) // EVERY)] for part in batch])
        return list(torch.autograd.grad(loss, _params(module)))


class PartDescends(SAM):
    """Runs the second pass on the first fifth of the batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        original = module.training_step

        def on_part(batch: Any) -> Tensor:
            return original(batch if self._first else [part[: -(-len(part) // EVERY)] for part in batch])

        self._first = True
        module.training_step = on_part

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._first = False
        super().on_after_backward(trainer, module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, module, optimizer)
        del module.training_step


@contextmanager
def _difference(module: pl.LightningModule) -> Iterator[list[Tensor]]:
    """Record what the body adds to the gradients."""
    first = [g.clone() for g in _grads(module)]
    added: list[Tensor] = []
    yield added
    added += torch._foreach_sub(_grads(module), first)


class Reuses(GradientRegularization):
    """Reuses the last penalty gradient γ(∇L(θ + εg) − g)/ε on the steps in between."""

    _added: list[Tensor]

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.schedule.due(trainer.global_step):
            with _difference(module) as self._added:
                super().on_after_backward(trainer, module)
        else:
            torch._foreach_add_(_grads(module), self._added)


class LookSAM(SAM):
    """LookSAM (Liu et al. 2022): adds the part of SAM's last gradient orthogonal to the plain one, with norm α‖g‖."""

    alpha = 0.7

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.schedule.due(trainer.global_step):
            plain = [g.clone() for g in _grads(module)]
            super().on_after_backward(trainer, module)
            square = sum((g * g).sum() for g in plain)
            along = float(sum((a * b).sum() for a, b in zip(_grads(module), plain, strict=True)) / square)
            self._orthogonal = [a - along * b for a, b in zip(_grads(module), plain, strict=True)]
        else:
            length = self.alpha * float(global_norm(_grads(module)) / (global_norm(self._orthogonal) + 1e-12))
            torch._foreach_add_(_grads(module), self._orthogonal, alpha=length)


Callbacks = Callable[[], list[pl.Callback]]
# the first four use the demo's constants, which were selected in the same way from a larger grid
PAIRS = [(1.0, 0.5), (1.0, 1.0)]
RADII = (0.5, 1.0)


def _gr(pairs: list[tuple[float, float]], kind: Any = GradientRegularization, **options: Any) -> dict[str, Callbacks]:
    return {f"γ={g:g} ε={e:g}": lambda g=g, e=e: [kind(g, e, verbose=False, **options)] for g, e in pairs}


def _sam(radii: tuple[float, ...] = RADII, kind: Any = SAM, **options: Any) -> dict[str, Callbacks]:
    quiet = {"verbose": False} if issubclass(kind, SAM) else {}
    return {f"ρ={rho:g}": lambda rho=rho: [kind(rho, **quiet, **options)] for rho in radii}


STRONG = [(2.0, 1.0), (5.0, 1.0), (5.0, 2.0), (5.0, 5.0)]
# name: constants: callbacks
GRID: dict[str, dict[str, Callbacks]] = {
    "plain": {"": list},
    "flooding": {f"b={level:g}": lambda level=level: [Flooding(level)] for level in (0.8,)},
    "F-GR": _gr(PAIRS[:1]),
    "SAM": _sam((0.5,)),
    "F-GR, 1 step in 5": _gr(PAIRS, interval=EVERY),
    "F-GR, 1 in 5, stronger": _gr(STRONG, interval=EVERY),
    "SAM, 1 step in 5": _sam((1.0, 2.0, 4.0), interval=EVERY),
    "F-GR, last fifth": _gr([*PAIRS, (2.0, 1.0), (5.0, 2.0)], start_step=LATE),
    "F-GR, reused": _gr(PAIRS, Reuses, interval=EVERY),
    "LookSAM": _sam(kind=LookSAM, interval=EVERY),
    "point back along momentum": _sam((0.1, 0.3), Momentum),
    "point ahead along momentum": _sam((-0.5, -1.0, -2.0), Momentum),
    "SAM, 1/5 of batch ascends": _sam(kind=PartAscends),
    "SAM, 1/5 of batch descends": _sam(kind=PartDescends),
}
# selected from the grid by validation accuracy (``cheaper.py --choose``)
CHOSEN = {
    "plain": "",
    "flooding": "b=0.8",
    "F-GR": "γ=1 ε=0.5",
    "SAM": "ρ=0.5",
    "F-GR, 1 step in 5": "γ=1 ε=0.5",
    "F-GR, 1 in 5, stronger": "γ=5 ε=2",
    "SAM, 1 step in 5": "ρ=2",
    "F-GR, last fifth": "γ=2 ε=1",
    "F-GR, reused": "γ=1 ε=1",
    "LookSAM": "ρ=0.5",
    "point ahead along momentum": "ρ=-2",
    "point back along momentum": "ρ=0.3",
    "SAM, 1/5 of batch ascends": "ρ=0.5",
    "SAM, 1/5 of batch descends": "ρ=0.5",
}
