"""Jobs that several processes share through Optuna's storages, and that outlive a killed process.

Each kind of job is an Optuna study of its own, and each job a trial. A process claims a job and proves with a lock, and
with a time stamp every few seconds, that it is alive; a job whose process is not is queued again with what had been
decided about it. A job's index is its number among all but the repeated ones, so it does not depend on interruptions.
"""

import contextlib
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.tune.space import TuneError

if TYPE_CHECKING:
    import optuna

try:
    import fcntl
except ImportError:  # Windows: a killed process is noticed by its time stamp alone
    fcntl = None  # type: ignore[assignment]

__all__ = ["Job", "Owner", "Queue", "import_optuna", "open_storage"]

BEAT, GRACE = 10.0, 60.0
# a job that kills its process each time, for lack of memory, must not be repeated forever
MOST_ATTEMPTS = 5


def import_optuna() -> Any:
    """Import Optuna, without its messages.

    Raises:
        TuneError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise TuneError("tuning needs optuna: pip install 'lightning_gr[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_storage(storage: str | None, folder: Path) -> Any:
    """Open a storage: a database URL, a journal file, or by default an SQLite file in the output folder.

    Raises:
        TuneError: If it cannot be reached.
    """
    optuna = import_optuna()
    if storage is None:
        storage = f"sqlite:///{folder / 'study.db'}"
    try:
        return _opened(optuna, storage)
    except Exception as error:
        # a missing driver is named by the cause alone
        reason = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise TuneError(f"cannot open the storage {_without_password(storage)}: {text}") from error


def _opened(optuna: Any, storage: str, attempts: int = 5) -> Any:
    """Open a storage, again if another process is creating its tables at the same time."""
    try:
        return _open(optuna, storage)
    except Exception as error:
        clash = any(word in str(error).lower() for word in ("already exists", "locked", "unique"))
        if attempts == 1 or not clash:
            raise
    time.sleep(0.5)
    return _opened(optuna, storage, attempts - 1)


def _open(optuna: Any, storage: str) -> Any:
    if "://" not in storage:
        backend = optuna.storages.journal.JournalFileBackend(storage)
        return optuna.storages.JournalStorage(backend)
    # wait for other processes instead of failing at once
    options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(storage, engine_kwargs=options)


def _without_password(storage: str) -> str:
    head, at, tail = storage.rpartition("@")
    return f"{head.rpartition(':')[0]}:***@{tail}" if at and head.count(":") > 1 else storage


class Owner:
    """This process, for as long as it holds its lock.

    Args:
        folder: Where the locks of the processes on this output folder are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / self.name).open("w")
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Give up the lock."""
        self._file.close()
        (self.folder / self.name).unlink(missing_ok=True)

    def is_dead(self, name: str) -> bool | None:
        """Whether another process with this output folder has ended; None if that cannot be known from here."""
        path = self.folder / name
        if name == self.name:
            return False
        if fcntl is None or not path.exists():
            return None
        with contextlib.suppress(OSError), path.open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False


class Job:
    """A claimed job.

    Args:
        queue: The queue that it is from.
        trial: The Optuna trial.
        index: Its number in the queue.
    """

    def __init__(self, queue: "Queue", trial: "optuna.Trial", index: int) -> None:
        self.queue, self.trial, self.index = queue, trial, index
        self.over = False

    @contextmanager
    def alive(self) -> Iterator[None]:
        """A context manager during which the job is marked as being worked on."""
        end = threading.Event()

        def beat() -> None:
            while not end.wait(BEAT):
                with contextlib.suppress(Exception):  # a storage that is away for a moment
                    self.trial.set_user_attr("alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def finish(self, value: float | None, **facts: Any) -> None:
        """Keep the result. Without a value, the job counts as pruned."""
        state = self.queue.states
        self._tell(state.PRUNED if value is None else state.COMPLETE, value, facts)

    def fail(self, error: str, **facts: Any) -> None:
        """Keep the job as failed."""
        self._tell(self.queue.states.FAIL, None, {**facts, "error": error})

    def release(self) -> None:
        """Queue the job again at once, since this process stops."""
        if not self.over:
            self.queue.repeat(self.trial, counts=False)
            self.over = True

    def _tell(self, state: Any, value: float | None, facts: dict[str, Any]) -> None:
        optuna = import_optuna()
        self.over = True
        # another process may have taken this one for dead, as after a laptop has slept
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
            for name, fact in facts.items():
                self.trial.set_user_attr(name, fact)
            self.queue.study.tell(self.trial, value, state=state)


class Queue:
    """Jobs of one kind.

    Args:
        storage: The storage, see :func:`open_storage`.
        name: The name of the Optuna study.
        owner: This process.
        mode: Whether the values are to be maximized (``"max"``) or minimized.
    """

    def __init__(self, storage: Any, name: str, owner: Owner, mode: str = "max") -> None:
        optuna = import_optuna()
        self.states, self.owner, self.name = optuna.trial.TrialState, owner, name
        direction = "maximize" if mode == "max" else "minimize"
        self.study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)

    def trials(self) -> list[Any]:
        """All trials, also those that were repeated."""
        return list(self.study.get_trials(deepcopy=False))

    def done(self) -> dict[int, Any]:
        """The finished jobs by index: complete, pruned or failed with an error."""
        trials = self.trials()
        ended: dict[int, Any] = {}
        for trial in trials:
            if trial.state.is_finished() and (trial.state != self.states.FAIL or "error" in trial.user_attrs):
                ended.setdefault(_index(trial, trials), trial)
        return dict(sorted(ended.items()))

    def started(self) -> int:
        """How many jobs were ever claimed."""
        return sum(1 for trial in self.trials() if not _is_extra(trial))

    def claim(self, limit: int) -> Job | None:
        """Claim the next job with an index below ``limit``; None if all are taken."""
        self.release_stale()
        trials = self.trials()
        waiting = any(trial.state == self.states.WAITING for trial in trials)
        if not waiting and sum(1 for trial in trials if not _is_extra(trial)) >= limit:
            return None
        trial = self._ask()
        trial.set_user_attr("owner", self.owner.name)
        trial.set_user_attr("alive", time.time())
        trials = self.trials()
        index = _index(trials[trial.number], trials)
        if index < limit:
            return Job(self, trial, index)
        trial.set_user_attr("surplus", True)  # another process was faster
        self.study.tell(trial, state=self.states.FAIL)
        return None

    def _ask(self) -> Any:
        optuna = import_optuna()
        self.study.sampler = optuna.samplers.RandomSampler(seed=0)  # what is tried is decided with the index
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.study.ask()

    def release_stale(self) -> None:
        """Queue the jobs again whose processes have ended without a result."""
        trials = self.trials()
        repeated = {trial.user_attrs.get("repeats") for trial in trials}
        for trial in trials:
            if trial.state == self.states.RUNNING and self._is_stale(trial):
                self.repeat(trial)
            elif trial.state == self.states.FAIL and trial.number not in repeated and self._is_lost(trial):
                self._queue(trial, trial.user_attrs.get("attempts", 0) + 1)

    def _is_stale(self, trial: Any) -> bool:
        owner = trial.user_attrs.get("owner")
        dead = None if owner is None else self.owner.is_dead(owner)
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - trial.user_attrs.get("alive", begun) > GRACE if dead is None else dead

    def _is_lost(self, trial: Any) -> bool:
        """Whether a process ended between giving up a job and queuing it again."""
        if "error" in trial.user_attrs or "surplus" in trial.user_attrs:
            return False
        ended = trial.datetime_complete
        return ended is None or time.time() - ended.timestamp() > 5.0

    def repeat(self, trial: Any, *, counts: bool = True) -> None:
        """Queue a running trial again, with its constants."""
        optuna = import_optuna()
        attempts = trial.user_attrs.get("attempts", 0) + counts
        try:
            if attempts >= MOST_ATTEMPTS:
                handle = optuna.trial.Trial(self.study, trial._trial_id)
                handle.set_user_attr("error", f"its process ended without a result {attempts} times")
            self.study.tell(trial.number, state=self.states.FAIL)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            return  # another process did
        if attempts < MOST_ATTEMPTS:
            self._queue(self.trials()[trial.number], attempts)

    def _queue(self, trial: Any, attempts: int) -> None:
        optuna = import_optuna()
        kept = {"index": _index(trial, self.trials()), "repeats": trial.number, "attempts": attempts}
        self.study.add_trial(
            optuna.create_trial(
                state=self.states.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=kept,
            )
        )

    def suggest(
        self, job: Job, bounds: dict[str, tuple[float, float]], first: Sequence[dict[str, float]]
    ) -> dict[str, float]:
        """Choose constants for a job, log-uniform within bounds.

        Args:
            job: The job. If it is repeated, it keeps its constants.
            bounds: The bounds of each constant.
            first: The constants of the first jobs. Later ones are chosen by the tree-structured Parzen estimator, from
                the results so far and a seed that depends on the index alone.
        """
        given = first[job.index] if job.index < len(first) else {}
        return {name: self._suggest(job, name, ends, given) for name, ends in bounds.items()}

    def _suggest(self, job: Job, name: str, ends: tuple[float, float], given: dict[str, float]) -> float:
        """Choose one constant, with a seed of its own: the others may have been chosen before an interruption."""
        optuna = import_optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls the sampler of fixed values experimental
            if name in given:
                base = optuna.samplers.RandomSampler(seed=0)
                self.study.sampler = optuna.samplers.PartialFixedSampler({name: given[name]}, base)
            else:
                seed = zlib.crc32(f"{self.name}/{job.index}/{name}".encode())
                self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=False)
            return float(job.trial.suggest_float(name, *ends, log=True))


def _is_extra(trial: Any) -> bool:
    return "repeats" in trial.user_attrs or "surplus" in trial.user_attrs


def _index(trial: Any, trials: Sequence[Any]) -> int:
    """The number of a job, not counting repeated and surplus trials before it."""
    if "index" in trial.user_attrs:
        return int(trial.user_attrs["index"])
    return sum(1 for other in trials[: trial.number] if not _is_extra(other))
