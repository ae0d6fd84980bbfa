"""Counts the steps of several optimizers, each by itself, for schedules in manual optimization."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["StepCounter"]


class StepCounter:
    """How many steps each optimizer has made.

    Lightning's ``global_step`` counts those of all of them together, so that every second one would always belong to
    the same of two. A step that a gradient scaler skips is not counted.
    """

    def __init__(self) -> None:
        self.made: list[int] = []
        self._handles: list[Any] = []
        self._positions: dict[int, int] = {}
        self._regularized: dict[int, bool] = {}
        self._on_step: Callable[[bool], object] = bool

    def __getstate__(self) -> dict[str, Any]:
        """Leave the running optimizers out: a copy counts on for others."""
        return {**vars(StepCounter()), "made": list(self.made)}

    def attach(self, optimizers: Sequence[Optimizer], *, restart: bool, on_step: Callable[[bool], object]) -> None:
        """Count the steps of these optimizers, from 0 or from where the count was.

        Args:
            optimizers: Those of the Trainer.
            restart: Whether to begin at 0.
            on_step: Is told, after each step of one of them, whether its gradient was regularized.
        """
        self.detach()
        self._on_step = on_step
        if restart or len(self.made) != len(optimizers):
            self.made = [0] * len(optimizers)
        self._positions = {id(optimizer): position for position, optimizer in enumerate(optimizers)}
        self._handles = [optimizer.register_step_post_hook(self._count) for optimizer in optimizers]

    def note(self, optimizer: Optimizer, regularized: bool) -> None:
        """Say what the next step of ``optimizer`` is made of; one regularized part of it is enough."""
        self._regularized[id(optimizer)] = regularized or self._regularized.get(id(optimizer), False)

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.made[self._positions[id(optimizer)]] += 1
        if id(optimizer) in self._regularized:
            self._on_step(self._regularized.pop(id(optimizer)))

    def count_of(self, optimizer: Optimizer) -> int:
        """The steps that ``optimizer`` has made."""
        return self.made[self._positions[id(optimizer)]]

    def detach(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._regularized = [], {}
