"""Counts the steps of each optimizer separately, for schedules in manual optimization."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["StepCounter"]


class StepCounter:
    """Counts the steps of each optimizer.

    Lightning's ``global_step`` counts the steps of all optimizers together, so with two optimizers every second step
    would always be the same optimizer's. Steps that a gradient scaler skips are not counted.
    """

    def __init__(self) -> None:
        self.made: list[int] = []
        self._handles: list[Any] = []
        self._positions: dict[int, int] = {}
        self._noted: dict[int, tuple[bool, bool]] = {}
        self._on_step: Callable[[bool, bool], object] = _ignore

    def __getstate__(self) -> dict[str, Any]:
        """Omit the attached optimizers; a copy continues the count for others."""
        return {**vars(StepCounter()), "made": list(self.made)}

    def attach(
        self, optimizers: Sequence[Optimizer], *, restart: bool, on_step: Callable[[bool, bool], object]
    ) -> None:
        """Count the steps of these optimizers, from 0 or from the current counts.

        Args:
            optimizers: The Trainer's optimizers.
            restart: Whether to start from 0.
            on_step: Called after each optimizer step with whether its gradient was, and was to be, regularized.
        """
        self.detach()
        self._on_step = on_step
        if restart or len(self.made) != len(optimizers):
            self.made = [0] * len(optimizers)
        self._positions = {id(optimizer): position for position, optimizer in enumerate(optimizers)}
        self._handles = [optimizer.register_step_post_hook(self._count) for optimizer in optimizers]

    def note(self, optimizer: Optimizer, regularized: bool, due: bool) -> None:
        """Record whether the next step of ``optimizer`` includes, and was to, a regularized part; one suffices."""
        before = self._noted.get(id(optimizer), (False, False))
        self._noted[id(optimizer)] = regularized or before[0], due or before[1]

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.made[self._positions[id(optimizer)]] += 1
        if id(optimizer) in self._noted:
            self._on_step(*self._noted.pop(id(optimizer)))

    def count_of(self, optimizer: Optimizer) -> int:
        """The number of steps that ``optimizer`` has taken."""
        return self.made[self._positions[id(optimizer)]]

    def detach(self) -> None:
        """Stop counting and remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._noted = [], {}


def _ignore(regularized: bool, due: bool) -> None:
    """Nobody is to be told."""
