"""Runs a study: asks what comes next, trains, and reports, on all ranks."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_gr.report.console import make_console, printable
from lightning_gr.tune.answer import TuneResult
from lightning_gr.tune.board import Board
from lightning_gr.tune.plan import Plan, Task
from lightning_gr.tune.program import Functions, Program
from lightning_gr.tune.ranges import RangeTest
from lightning_gr.tune.ranks import is_rank_zero, shared
from lightning_gr.tune.report import write_files
from lightning_gr.tune.space import DEFAULT_METHODS, METHODS, TuneError
from lightning_gr.tune.study import import_optuna
from lightning_gr.tune.trial import Interrupted, Outcome, check, one_line, train

__all__ = ["run", "tune"]

_POLL = 1.0


def tune(
    make_module: Callable[[], Any],
    make_data: Callable[[], Any] | None = None,
    *,
    monitor: str,
    mode: str | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    trials: int = 10,
    seeds: int = 3,
    trainer: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    max_time: str | float | None = None,
    storage: str | None = None,
    study: str = "tune",
    output: Path | str = Path("outputs", "tune"),
    seed: int = 0,
    test: bool = False,
    range_steps: int = 100,
    progress: bool = True,
) -> TuneResult:
    """Find out which methods help on a module and its data, and with which constants.

    A range test bounds the constants of each method, Optuna searches within the bounds and prunes poor trials, and the
    best constants of each method are compared with plain training over several seeds. Interrupted, it goes on when it
    is called again with the same arguments.

    Args:
        make_module: Makes a new LightningModule. It is called for each training, after all generators are seeded.
        make_data: Makes its data: a LightningDataModule, or the loaders for training, validation and, optionally,
            test. None uses the module's own loaders.
        monitor: The key of the validation metric, as in ``self.log("val_acc", ...)``.
        mode: ``"max"`` or ``"min"``. It may be left out for common names, such as ``val_acc`` and ``val_loss``.
        methods: Names from :data:`~lightning_gr.tune.METHODS`.
        trials: The number of trials for each method.
        seeds: The number of final trainings of each method and of plain training.
        trainer: The Trainer's arguments.
        settings: Further arguments of the methods' callbacks, by key: ``{"sam": {"interval": 2}}``.
        max_time: When to end, as HH:MM:SS, DD:HH:MM:SS or a number of seconds: the search ends early enough for the
            final trainings.
        storage: An Optuna storage: a database URL or a journal file. Default: an SQLite file in ``output``.
        study: The name of the study in the storage.
        output: The folder for all files.
        seed: The seed of the search. The final trainings use the following ones.
        test: Whether to evaluate the test set at the end of the final trainings.
        range_steps: The number of optimizer steps of each training of the range test.
        progress: Whether to show a progress bar, if standard output is a terminal.

    Raises:
        TuneError: If an argument is wrong, or plain training or all methods fail.
        KeyboardInterrupt: On Ctrl-C.

    Example::

        >>> from lightning_gr.tune import tune
        >>> result = tune(MyModule, MyData, monitor="val_acc", trainer={"max_epochs": 20})  # doctest: +SKIP
        >>> print(result.sentence)  # doctest: +SKIP
        SAM(rho=0.2) helps: +1.4 ± 0.3 points at 2.0 times the cost.
    """
    plan = Plan.checked(
        monitor=monitor,
        mode=mode,
        methods=methods,
        trials=trials,
        seeds=seeds,
        max_time=max_time,
        storage=storage,
        study=study,
        output=output,
        settings=dict(settings or {}),
        seed=seed,
        test=test,
        range_steps=range_steps,
        progress=progress,
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        return run(Functions(make_module, make_data, dict(trainer or {})), plan)
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        _restore(handler)


def _restore(handler: Any) -> None:
    """Lightning ignores Ctrl-C after the first one."""
    if signal.getsignal(signal.SIGINT) is not handler:
        try:
            signal.signal(signal.SIGINT, handler)
        except ValueError:  # not in the main thread, where Lightning changes nothing either
            return


def run(program: Program, plan: Plan) -> TuneResult:
    """Run a study on all ranks, and return the result on each.

    Args:
        program: Makes everything for one training.
        plan: What is to be searched.

    Raises:
        TuneError: If something is wrong with the arguments or the storage, or plain training or all methods fail.
        Interrupted: On Ctrl-C.
    """
    import_optuna()
    board = _open(program, plan) if is_rank_zero() else None
    name = f"check-{board.owner.name[:8]}" if board else "check"
    try:
        check(program, plan.output / "trials" / name, plan.goal)
        with _Bar(board, plan) as bar:
            _work(program, plan, board, bar)
        result = shared(lambda: _board(board).result())
        if board is not None:
            write_files(result, plan.output, plan.config, plan.settings)
        return result
    except KeyboardInterrupt:
        raise Interrupted("KeyboardInterrupt") from None
    except import_optuna().exceptions.StorageInternalError as error:
        raise TuneError(f"the storage was lost, start again to go on: {one_line(error)}") from error
    finally:
        if board is not None:
            with suppress(Exception):  # a storage that was lost; the job is free after a while
                board.close()
            _remove(plan.output / "trials" / name)


def _open(program: Program, plan: Plan) -> Board:
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TuneError(f"cannot write to the folder {plan.output}: {error.strerror}") from error
    return Board(plan, program.settings)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _board(board: Board | None) -> Board:
    if board is None:
        raise RuntimeError("only rank 0 has a board: ask through `shared`")
    return board


def _work(program: Program, plan: Plan, board: Board | None, bar: "_Bar") -> None:
    while True:
        task = shared(lambda: _board(board).next())
        if task is None:
            return
        if task.stage == "wait":
            bar.show("waiting for another process")
            time.sleep(_POLL)
            continue
        bar.show(str(task))
        if board is not None and board.job is not None:
            with board.job.alive():
                _perform(program, plan, board, task, bar)
        else:
            _perform(program, plan, None, task, bar)


def _perform(program: Program, plan: Plan, board: Board | None, task: Task, bar: "_Bar") -> None:
    folder = plan.output / "trials" / task.folder
    method = METHODS.get(task.method)
    try:
        if task.stage == "range" and method is not None:
            test = RangeTest(program, method, plan.settings_of(method), task.seed, folder, plan.range_steps)
            found = test.find()
            if board is not None:
                board.finish_range(found)
            return
        callbacks = [] if method is None else [method.callback(task.constants, plan.settings_of(method))]
        outcome = _train(program, plan, board, task, callbacks, folder, bar)
    except TuneError as error:
        if board is not None:
            board.fail(str(error))
        return
    if board is not None:
        board.finish(outcome, task)


def _train(
    program: Program, plan: Plan, board: Board | None, task: Task, callbacks: list[Any], folder: Path, bar: "_Bar"
) -> Outcome:
    options: dict[str, Any] = {"tick": bar.tick, "test": plan.test and task.stage == "final"}
    if task.stage == "search" and board is not None:
        options["prune"] = board.prune
    return train(program, callbacks, task.seed, folder, plan.goal, **options)


class _Bar:
    """A progress bar over the whole study, on rank 0 and in a terminal only."""

    def __init__(self, board: Board | None, plan: Plan) -> None:
        self.board, self._stack = board, ExitStack()
        console = make_console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(
            *columns,
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=board is None or not plan.progress or not console.is_terminal,
            speed_estimate_period=3600.0,
        )
        self._task = self._progress.add_task("range test")
        self._done = 0.0

    def __enter__(self) -> "_Bar":
        self._stack.enter_context(self._progress)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def show(self, text: str) -> None:
        """Say what is being done, and how much is done."""
        if self.board is None or self._progress.disable:
            return
        self._done, total = self.board.progress()
        self._progress.update(self._task, description=printable(text), completed=self._done, total=total)

    def tick(self, share: float) -> None:
        """Advance within a training."""
        self._progress.update(self._task, completed=self._done + min(share, 0.99))
