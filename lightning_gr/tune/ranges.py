"""Range tests of whole programs: where the loss, and a short training, break."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_gr.tune.program import Functions, Program
from lightning_gr.tune.space import Constants, Method, TuneError, check_methods, rounded
from lightning_gr.tune.sweep import DisplacedLosses, RangeFinder, Sweep
from lightning_gr.tune.trial import Goal, train

__all__ = ["Range", "RangeTest", "range_test"]

# how far below the upper bound a search begins
DECADES = 2.0
# steps with a method have broken training if less than this share of what the plain steps before them learned is left
LEARNS = 0.1
_MOST_TESTS = 8
_NOTHING = Goal("", "min")


@dataclass(frozen=True)
class Range:
    """The range test of one method.

    Args:
        method: The method's name.
        sweep: The loss at displaced weights.
        bounds: The lower and the upper bound of each constant.
        suggestion: A first guess, and the first constants that a search tries.
        shortened: How often the upper bound was halved because training broke at it.
    """

    method: str
    sweep: Sweep
    bounds: dict[str, tuple[float, float]]
    suggestion: Constants = field(default_factory=dict)
    shortened: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for a storage."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Range":
        """Restore it from a storage, whose JSON has no tuples."""
        sweep: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields["sweep"].items()}
        bounds = {name: (low, high) for name, (low, high) in fields["bounds"].items()}
        return cls(**{**fields, "sweep": Sweep(**sweep), "bounds": bounds})


class _Stops(RangeFinder):
    """Ends the training with the test; the Trainer's own length stays, since learning rates may follow it."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Test, and stop."""
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step >= self.warmup_steps:
            trainer.should_stop = True


class _Probe(_Stops):
    """A range test in at most a quarter of the training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Shorten the plain steps if the training is short."""
        total = trainer.estimated_stepping_batches
        if math.isfinite(total):
            self.warmup_steps = max(1, min(self.warmup_steps, int(total) // 4))


class _Final(_Stops):
    """Measures the clean loss at the end of a short training with a method."""

    def on_fit_start(self, *args: Any) -> None:
        """Prepare, without looking for a method."""
        self.result, self.losses, self._batches = None, [], []

    def _sweep(self, trainer: Any, pl_module: Any) -> Sweep:
        return Sweep("", (), (), float(self.losses[0]), DisplacedLosses(trainer, pl_module, self._batches).clean())


def range_test(
    make_module: Callable[[], Any],
    make_data: Callable[[], Any] | None = None,
    *,
    methods: Any = ("F-GR", "SAM", "MomentumSAM", "flooding"),
    trainer: Mapping[str, Any] | None = None,
    warmup_steps: int = 100,
    short_training: bool = True,
    seed: int = 0,
    folder: Path | str | None = None,
) -> dict[str, Range]:
    """Find the constants at which training breaks, in about the time of a few hundred steps for each method.

    After ``warmup_steps`` plain steps, the loss of the last four batches is evaluated at weights displaced as the
    method displaces them. The edge is the constant at which the loss has risen by the loss of the first step. The upper
    bound is twice the edge, or a half, a quarter, ... of that if it already undoes, in half as many steps, what the
    plain ones have learned. The suggestion is half of the edge, and at most half of the bound.

    Args:
        make_module: Makes a new LightningModule.
        make_data: Makes its data: a LightningDataModule, or a tuple of loaders. None uses the module's own.
        methods: Names from :data:`~lightning_gr.tune.METHODS`.
        trainer: The Trainer's arguments.
        warmup_steps: The number of optimizer steps of each training.
        short_training: Whether to test the upper bound by training.
        seed: The seed of each training.
        folder: A folder for their files. Default: a temporary one.

    Raises:
        TuneError: If an argument is wrong, or the training fails.

    Example::

        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> flags = {"accelerator": "cpu", "max_steps": 20}
        >>> found = range_test(BoringModel, methods=["SAM"], trainer=flags, warmup_steps=5)
        >>> 0 < found["SAM"].suggestion["rho"] < found["SAM"].bounds["rho"][1]
        True
    """
    program = Functions(make_module, make_data, dict(trainer or {}))
    with TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        return {
            method.name: RangeTest(program, method, {}, seed, place, warmup_steps, short_training).find()
            for method in check_methods(methods)
        }


@dataclass(frozen=True)
class RangeTest:
    """The range test of one method.

    Args:
        program: What is trained.
        method: The method.
        settings: Further arguments of its callback.
        seed: The seed.
        folder: For files.
        steps: The number of plain optimizer steps before the test, but at most a quarter of the training.
        short_training: Whether to test the upper bound by training.
    """

    program: Program
    method: Method
    settings: Mapping[str, Any]
    seed: int
    folder: Path
    steps: int
    short_training: bool = True

    def find(self) -> Range:
        """Find the bounds.

        Raises:
            TuneError: If the training fails.
        """
        sweep, steps = self._sweep()
        halved = 0
        if self.short_training and sweep.constant != "level":
            while halved < _MOST_TESTS and self._breaks(rounded(sweep.bound / 2**halved), sweep, steps):
                halved += 1
        # the smallest constant that broke
        return _range(self.method, sweep, max(0, halved - 1))

    def _sweep(self) -> tuple[Sweep, int]:
        """Sweep the constant after plain steps, and return their number as well."""
        callback = self.method.callback(self.method.at_scale(1.0), self.settings)
        finder = _Probe(self.steps, method=callback, apply=False)
        error = self._train([finder])
        if error is not None:
            raise TuneError(error)
        sweep, steps = finder.result, finder.warmup_steps
        if sweep is None:
            raise TuneError(
                f"the range test needs {steps} optimizer steps with a loss, but training ended before: use a smaller"
                " --range_steps, or train longer"
            )
        if not math.isfinite(sweep.first) or not math.isfinite(sweep.clean):
            raise TuneError(
                f"plain training diverges within {steps} steps (loss {sweep.clean:g}): lower the learning rate"
            )
        if sweep.constant == "level" and sweep.first <= 0:
            raise TuneError(f"flooding needs a positive loss, but that of the first step is {sweep.first:g}")
        return sweep, steps

    def _breaks(self, high: float, sweep: Sweep, steps: int) -> bool:
        """Whether half as many steps with a constant, after the plain ones, undo what these have learned."""
        begin = {"start_step": max(steps, self.settings.get("start_step", 0))}
        callback = self.method.callback(self.method.at_scale(high), {**self.settings, **begin})
        measure = _Final(steps + max(1, steps // 2), apply=False)
        error = self._train([measure, callback])
        if error is not None and error.startswith("MisconfigurationException"):
            raise TuneError(error)  # the method does not fit this module or Trainer at all
        if error is not None or measure.result is None:
            return True
        learned = sweep.first - measure.result.clean
        return not learned >= LEARNS * (sweep.first - sweep.clean)

    def _train(self, callbacks: list[Any]) -> str | None:
        """Train without validation, and return the error, if any."""
        flags: dict[str, Any] = {
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "min_epochs": None,
            "min_steps": None,
        }
        return train(self.program, callbacks, self.seed, self.folder, _NOTHING, **flags).error


def _range(method: Method, sweep: Sweep, shortened: int) -> Range:
    high = rounded(sweep.bound / 2**shortened)
    guess = min(sweep.suggestion, rounded(high / 2))
    highs = _upper(method, high)
    bounds = {name: (value / 10**DECADES, value) for name, value in highs.items()}
    return Range(method.name, sweep, bounds, method.at_scale(guess), shortened)


def _upper(method: Method, high: float) -> Constants:
    """The upper bounds: γ may be twice the largest ε."""
    return {name: 2 * high if name == "gamma" else high for name in method.constants}
