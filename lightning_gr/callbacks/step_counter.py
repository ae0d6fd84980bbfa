"""Counts the steps of several optimizers, each by itself, for schedules in manual optimization."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["OptimizerSteps"]


class OptimizerSteps:
    """How many steps each optimizer has made.

    Lightning's ``global_step`` counts those of all of them together, so that every second one would always belong to
    the same of two. A step that a gradient scaler skips is not counted.
    """

    def __init__(self) -> None:
        self.made: list[int] = []
        self._handles: list[Any] = []
        self._positions: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the running optimizers out: a copy counts on for others."""
        return {"made": list(self.made), "_handles": [], "_positions": {}}

    def begin(self, optimizers: Sequence[Optimizer], anew: bool) -> None:
        """Count for these from now on, ``anew`` or from where it was."""
        self.end()
        if anew or len(self.made) != len(optimizers):
            self.made = [0] * len(optimizers)
        self._positions = {id(optimizer): position for position, optimizer in enumerate(optimizers)}
        self._handles = [optimizer.register_step_post_hook(self._count) for optimizer in optimizers]

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.made[self._positions[id(optimizer)]] += 1

    def of(self, optimizer: Optimizer) -> int:
        """The steps of one."""
        return self.made[self._positions[id(optimizer)]]

    def end(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
