"""What is to be searched, with checks of all arguments before anything is trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gr.tune.space import DEFAULT_METHODS, Constants, Method, TuneError, check_methods
from lightning_gr.tune.trial import Goal

__all__ = ["Plan", "Task", "goal_of", "seconds_of"]

_MORE_IS_BETTER = r"acc|auc|auroc|f1|fbeta|precision|recall|iou|dice|r2|bleu|rouge|map$|ndcg|psnr|ssim|kappa|matthews"
_LESS_IS_BETTER = r"loss|err|mse|mae|rmse|mape|smape|perplexity|ppl|nll|crps|brier|wer|cer|fid"


def goal_of(monitor: object, mode: object = None) -> Goal:
    """The monitored metric; ``mode`` may be left out for common names.

    Raises:
        TuneError: If ``mode`` is needed or wrong.
    """
    if not isinstance(monitor, str) or not monitor:
        raise TuneError(f"expected --monitor to be the key of a validation metric, such as val_loss: got {monitor!r}")
    if mode in ("max", "min"):
        return Goal(monitor, str(mode))
    if mode is not None:
        raise TuneError(f"expected --mode to be max or min but got {mode!r}")
    words = monitor.lower()
    less, more = (re.search(f"(?:^|[^a-z])(?:{names})", words) for names in (_LESS_IS_BETTER, _MORE_IS_BETTER))
    if bool(less) == bool(more):
        raise TuneError(f"whether more or less of {monitor!r} is better is not known: add --mode max or --mode min")
    return Goal(monitor, "max" if more else "min")


def seconds_of(text: str | float | None) -> float | None:
    """The seconds of a duration: a number of seconds, or HH:MM:SS with days in front if need be.

    Raises:
        TuneError: If it is neither.
    """
    if text is None:
        return None
    parts = str(text).split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 4 or len(numbers) == 2 or min(numbers) < 0 or sum(numbers) == 0:
        raise TuneError(f"expected --max_time to be HH:MM:SS, DD:HH:MM:SS or seconds but got {text!r}")
    factors = (86400.0, 3600.0, 60.0, 1.0)[-len(numbers) :]
    return sum(number * factor for number, factor in zip(numbers, factors, strict=True))


@dataclass(frozen=True)
class Plan:
    """What is to be searched.

    Args:
        goal: The monitored metric.
        methods: The methods, besides plain training.
        trials: The number of trials for each method.
        seeds: The number of final trainings of each method and of plain training.
        max_time: After how many seconds the final trainings are to be over; None for no limit.
        storage: See :func:`~lightning_gr.tune.study.open_storage`.
        study: The name of the study in the storage.
        output: The folder for all files.
        settings: Further arguments of the methods' callbacks, by key.
        seed: The seed of the search. The final trainings use the following ones.
        test: Whether to evaluate the test set at the end of the final trainings.
        range_steps: The number of optimizer steps of each training of the range test.
        config: The configuration to which ``best.yaml`` adds the best method.
        progress: Whether to show a progress bar, if standard output is a terminal.
    """

    goal: Goal
    methods: tuple[Method, ...]
    trials: int = 10
    seeds: int = 3
    max_time: float | None = None
    storage: str | None = None
    study: str = "tune"
    output: Path = Path("outputs", "tune")
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    test: bool = False
    range_steps: int = 100
    config: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True

    @classmethod
    def checked(cls, *, monitor: Any, mode: Any = None, methods: Any = DEFAULT_METHODS, **fields: Any) -> "Plan":
        """Check all arguments.

        Raises:
            TuneError: If one is wrong.
        """
        for name, least in (("trials", 1), ("seeds", 1), ("range_steps", 1), ("seed", 0)):
            value = fields.get(name, least)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TuneError(f"expected --{name} to be a whole number of at least {least} but got {value!r}")
        fields["max_time"] = seconds_of(fields.get("max_time"))
        fields["output"] = Path(fields.get("output", cls.output))
        chosen = tuple(check_methods(methods))
        unused = set(fields.get("settings") or {}) - {method.key for method in chosen}
        if unused:
            key = sorted(unused)[0]
            raise TuneError(f"--{key} is set, but none of --methods uses it: add the method or remove the flag")
        return cls(goal_of(monitor, mode), chosen, **fields)

    def settings_of(self, method: Method) -> Mapping[str, Any]:
        """The user's arguments of a method's callback."""
        return self.settings.get(method.key, {})

    def identity(self) -> dict[str, Any]:
        """What a study must have in common with this plan to go on with it."""
        used = {f"--{key}": dict(value) for key, value in self.settings.items()}
        goal = {"--monitor": self.goal.monitor, "--mode": self.goal.mode}
        return {**goal, "seed": self.seed, "--range_steps": self.range_steps, **used}


@dataclass(frozen=True)
class Task:
    """What all ranks are to do next.

    Args:
        stage: ``"range"``, ``"search"``, ``"final"`` or ``"wait"``, for another process.
        method: The method's name.
        constants: Its constants.
        seed: The seed.
        index: The number of the job in its queue.
    """

    stage: str
    method: str = ""
    constants: Constants = field(default_factory=dict)
    seed: int = 0
    index: int = 0

    @property
    def folder(self) -> str:
        """The name of the folder for the files of this training."""
        return f"{self.method}-{self.stage}-{self.index:03d}"

    def __str__(self) -> str:
        inner = " ".join(f"{name}={value:g}" for name, value in self.constants.items())
        return " ".join(filter(None, (self.method, inner)))
