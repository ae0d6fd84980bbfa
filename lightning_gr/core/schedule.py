"""Which optimizer steps are regularized, and how strongly."""

from dataclasses import dataclass

from lightning_gr._validate import check_bool, check_int

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Which optimizer steps are regularized, and how strongly.

    Args:
        start_step: The first optimizer step (counted from 0) to regularize.
        interval: Regularize every ``interval``-th optimizer step from then on.
        warmup_steps: The number of optimizer steps over which the strength grows linearly from 0 to 1.
        lazy: Multiply the strength by ``interval`` to make up for the skipped steps (lazy regularization; Karras et
            al., CVPR 2020, arXiv 1912.04958, section 3.1).

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> schedule = Schedule(start_step=10, interval=5, warmup_steps=20)
        >>> schedule.due(9), schedule.due(10), schedule.due(12), schedule.strength(15)
        (False, True, False, 0.25)
    """

    start_step: int = 0
    interval: int = 1
    warmup_steps: int = 0
    lazy: bool = False

    def __post_init__(self) -> None:
        check_int("start_step", self.start_step, minimum=0)
        check_int("interval", self.interval, minimum=1)
        check_bool("lazy", self.lazy)
        check_int("warmup_steps", self.warmup_steps, minimum=0)

    def due(self, step: int) -> bool:
        """Whether to regularize optimizer step ``step``."""
        return step >= self.start_step and (step - self.start_step) % self.interval == 0

    def strength(self, step: int) -> float:
        """The factor on the penalty at optimizer step ``step``: between 0 and 1, or 0 and ``interval`` if ``lazy``."""
        elapsed = max(0, step - self.start_step)
        ramp = min(1.0, elapsed / self.warmup_steps) if self.warmup_steps else 1.0
        return ramp * self.interval if self.lazy else ramp

    def __str__(self) -> str:
        every = "every step" if self.interval == 1 else f"every {self.interval} steps"
        since = f" from step {self.start_step:,}" if self.start_step else ""
        lazy = f", times {self.interval}" if self.lazy and self.interval > 1 else ""
        warmup = f", growing over {self.warmup_steps:,} steps" if self.warmup_steps else ""
        return every + since + lazy + warmup
