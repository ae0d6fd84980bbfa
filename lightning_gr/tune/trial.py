"""One training: its metric after each validation, its cost, and why it ended."""

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import seed_everything

from lightning_gr._compat import CallbackBase, spawns_ranks
from lightning_gr.tune.program import Program
from lightning_gr.tune.space import TuneError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Goal", "Interrupted", "Outcome", "Pruned", "check", "one_line", "quiet", "train"]

# the number of the validation, the metric, and the share of the training that is done
Prune = Callable[[int, float, float], bool]

# steps that are timed, after some in which caches are filled
_TIMED, _UNTIMED = 200, 3
_SHOWN: set[tuple[type[Warning], str]] = set()
# about the logger and the short trainings of a study, and about Lightning's own use of torch
_NOISE = ("The number of training batches", "`isinstance.treespec, LeafSpec.` is deprecated")


class Interrupted(Exception):  # noqa: N818, not an error
    """Raised when Ctrl-C or a signal ends a training; Lightning turns these into a SystemExit."""


class Pruned(Exception):  # noqa: N818, not an error
    """Ends a training whose metric is poor, on all ranks."""


@dataclass(frozen=True)
class Goal:
    """The monitored metric.

    Args:
        monitor: Its key.
        mode: ``"max"`` or ``"min"``.
    """

    monitor: str
    mode: str

    @property
    def sign(self) -> float:
        """1 if more is better, else −1."""
        return 1.0 if self.mode == "max" else -1.0


@dataclass
class Outcome:
    """What came of one training.

    Args:
        values: The monitored metric after each validation.
        step_seconds: The median duration of a training step, on a CPU in processor time; NaN if there were too few.
        seconds: The duration of the whole training.
        steps: The number of optimizer steps.
        pruned: Whether it was ended early because its metric was poor.
        error: Why it failed, on one line.
        test: The metrics of the test set.
    """

    values: list[float] = field(default_factory=list)
    step_seconds: float = math.nan
    seconds: float = 0.0
    steps: int = 0
    pruned: bool = False
    error: str | None = None
    test: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The metric after the last validation."""
        return self.values[-1] if self.values else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for a storage."""
        return asdict(self)


class _Watch(CallbackBase):  # type: ignore[misc]
    """Follows a training: validates the monitor, measures steps, and prunes. Comes first among the callbacks."""

    def __init__(self, goal: Goal, prune: Prune, tick: Callable[[float], None]) -> None:
        super().__init__()
        self.goal, self.prune, self.tick = goal, prune, tick
        self.values: list[float] = []
        self.step_times: list[float] = []
        self.interrupted = False
        self.validated = False
        self._seen = 0

    def on_train_batch_start(self, trainer: "Trainer", *args: Any) -> None:
        """Start the clock before the other callbacks' hooks."""
        if self._seen < _TIMED:
            self._start = _clock(trainer)

    def on_train_batch_end(self, trainer: "Trainer", *args: Any) -> None:
        """Note the duration of the step."""
        if _UNTIMED <= self._seen < _TIMED:
            self.step_times.append(_clock(trainer) - self._start)
        self._seen += 1
        self.tick(progress_of(trainer))

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Note the metric, and end the training if it is poor."""
        if trainer.sanity_checking:
            return
        self.validated = True
        value = trainer.callback_metrics.get(self.goal.monitor)
        if value is None:
            logged = ", ".join(sorted(map(str, trainer.callback_metrics))) or "nothing"
            raise TuneError(f"--monitor {self.goal.monitor!r} was not logged by a validation: choose from {logged}")
        self.values.append(float(value))
        share = progress_of(trainer)
        poor = self.prune(len(self.values) - 1, self.values[-1], share) and share < 1.0
        if trainer.strategy.broadcast(poor):
            raise Pruned

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Note whether this is Ctrl-C, since Lightning then raises a SystemExit, as for other signals."""
        self.interrupted = isinstance(exception, KeyboardInterrupt)


def progress_of(trainer: "Trainer") -> float:
    """The share of the training that is done, between 0 and 1; 0 if its length is not known."""
    shares = [0.0]
    if trainer.max_epochs and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        within = 0.0
        if isinstance(batches, int) and batches > 0:
            within = min(1.0, trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches)
        shares.append(min(1.0, (trainer.current_epoch + within) / trainer.max_epochs))
    if trainer.max_steps and trainer.max_steps > 0:
        shares.append(min(1.0, trainer.global_step / trainer.max_steps))
    return max(shares)


def _clock(trainer: "Trainer") -> float:
    """The time in seconds: on a CPU that of the processor, which other programs do not lengthen."""
    device = trainer.strategy.root_device.type
    if device == "cpu":
        return time.process_time()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages about each Trainer, and show each warning once."""
    names = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in names]
    loggers += [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    show = warnings.showwarning

    def once(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if (category, str(message)) not in _SHOWN:
            _SHOWN.add((category, str(message)))
            show(message, category, *place, **more)

    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message)
            warnings.showwarning = once
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _never(step: int, value: float, share: float) -> bool:
    return False


def _nothing(share: float) -> None:
    return None


def train(
    program: Program,
    callbacks: Sequence[Any],
    seed: int,
    folder: Path,
    goal: Goal,
    *,
    prune: Prune = _never,
    tick: Callable[[float], None] = _nothing,
    test: bool = False,
    **flags: Any,
) -> Outcome:
    """Train once, from a seed, and return what came of it; errors of the training are kept, not raised.

    Args:
        program: Makes the module, its data and the Trainer.
        callbacks: The method.
        seed: The seed of everything.
        folder: For the files of this training.
        goal: The monitored metric.
        prune: Whether to end the training, asked on rank 0 with the number of the validation, the metric and the
            share that is done.
        tick: Called after each step with the share that is done.
        test: Whether to evaluate the test set at the end.
        flags: Trainer flags that take precedence over the user's.

    Raises:
        Interrupted: On Ctrl-C, and on signals that end the process.
        TuneError: If the monitor was not logged, or there is no validation.
    """
    watch = _Watch(goal, prune, tick)
    outcome, start = Outcome(), time.perf_counter()
    with quiet():
        seed_everything(seed, workers=True, verbose=False)
        try:
            built = program.build([watch, *callbacks], folder, **flags)
            _check_strategy(built.trainer)
            built.trainer.fit(built.module, **built.fit)
            if test:
                metrics = built.trainer.test(built.module, **built.test, verbose=False)
                outcome.test = {key: float(value) for each in metrics for key, value in each.items()}
            outcome.steps = built.trainer.global_step
        except Pruned:
            outcome.pruned = True
        except (KeyboardInterrupt, SystemExit) as stop:
            raise Interrupted(type(stop).__name__) from None
        except TuneError:
            raise
        except Exception as error:
            outcome.error = one_line(error)
    outcome.values, outcome.seconds = watch.values, time.perf_counter() - start
    outcome.step_seconds = statistics.median(watch.step_times) if watch.step_times else math.nan
    if outcome.error is None and not watch.validated and flags.get("limit_val_batches") != 0:
        raise TuneError(
            "no validation ran, so there is nothing to choose by: the module needs a `validation_step`, its data a"
            " validation set, and the Trainer must not set limit_val_batches=0"
        )
    return outcome


def _check_strategy(trainer: "Trainer") -> None:
    if spawns_ranks(trainer):
        raise TuneError(
            f"{type(trainer.strategy).__name__} spawns its ranks for each training, so they cannot hear what rank 0"
            " asks: use strategy='ddp'"
        )


def check(program: Program, folder: Path, goal: Goal) -> Outcome:
    """Take one step and validate on one batch, so that what is missing is known at once.

    With several ranks, this also starts the others.

    Raises:
        TuneError: If this fails.
    """
    short: dict[str, Any] = {"limit_train_batches": 1, "limit_val_batches": 1, "max_epochs": 1, "max_steps": -1}
    often: dict[str, Any] = {
        "check_val_every_n_epoch": 1,
        "val_check_interval": 1.0,
        "num_sanity_val_steps": 0,
        "min_epochs": None,
    }
    outcome = train(program, [], 0, folder, goal, **short, **often)
    if outcome.error is not None:
        raise TuneError(f"plain training fails: {outcome.error}")
    return outcome


def one_line(error: BaseException) -> str:
    """The kind and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
