"""What is to be done next, derived from what the storage says has been done: range tests, the search, the end."""

import math
import statistics
import time
from typing import Any

from lightning_gr.tune.answer import Row, TuneResult
from lightning_gr.tune.plan import Plan, Task
from lightning_gr.tune.ranges import Range
from lightning_gr.tune.space import PLAIN, Constants, Method, TuneError, rounded
from lightning_gr.tune.study import Job, Owner, Queue, import_optuna, open_storage
from lightning_gr.tune.trial import Outcome

__all__ = ["Board"]

# below this share of a training, no trial is pruned
_SPARED = 1 / 3
_GOLDEN, _PLASTIC = 1.618033988749895, 1.324717957244746


class Board:
    """The study, as rank 0 sees it.

    Args:
        plan: What is to be searched.
        settings: What distinguishes the program from others.

    Raises:
        TuneError: If the storage cannot be opened, or holds another study by this name.
    """

    def __init__(self, plan: Plan, settings: dict[str, Any]) -> None:
        self.plan = plan
        self.storage = open_storage(plan.storage, plan.output)
        self.owner = Owner(plan.output / "processes")
        self.deadline = None if plan.max_time is None else time.monotonic() + plan.max_time
        self.job: Job | None = None
        self._queues: dict[str, Queue] = {}
        self._check_identity({**settings, **plan.identity()})

    def _queue(self, name: str, mode: str = "max") -> Queue:
        full = f"{self.plan.study}: {name}"
        if full not in self._queues:
            queue = self._queues[full] = Queue(self.storage, full, self.owner, mode)
            optuna = import_optuna()
            queue.study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        return self._queues[full]

    def _check_identity(self, settings: dict[str, Any]) -> None:
        header = self._queue("settings").study
        before = header.user_attrs.get("settings")
        if before is None:
            header.set_user_attr("settings", settings)
            return
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            name = names[0]
            others = f" (and {len(names) - 1} more: {', '.join(names[1:4])})" if len(names) > 1 else ""
            self.close()
            place = self.plan.output if self.plan.storage is None else "the storage"
            raise TuneError(
                f"{place} holds another study: {name} was {before.get(name)!r} and is {settings.get(name)!r}{others}:"
                f" give another {'--output' if self.plan.storage is None else '--study'}"
            )

    def close(self) -> None:
        """Give up the claims of this process, and its connections."""
        if self.job is not None:
            self.job.release()
        self.owner.close()
        self.storage.remove_session()
        if hasattr(self.storage, "engine"):  # that of a database
            self.storage.engine.dispose()

    # --- what is known

    def _search(self, method: Method) -> Queue:
        return self._queue(f"search {method.name}", self.plan.goal.mode)

    def _final(self, name: str, constants: Constants) -> Queue:
        inner = "".join(f" {constant}={value:g}" for constant, value in constants.items())
        return self._queue(f"final {name}{inner}{' with test' if self.plan.test else ''}", self.plan.goal.mode)

    def ranges(self) -> dict[str, Range]:
        """The range tests that have succeeded."""
        found = {}
        for method in self.plan.methods:
            done = self._queue(f"range {method.name}").done().get(0)
            if done is not None and "range" in done.user_attrs:
                found[method.name] = Range.from_dict(done.user_attrs["range"])
        return found

    def _errors(self, method: Method) -> list[str]:
        queues = (self._queue(f"range {method.name}"), self._search(method))
        return [
            str(t.user_attrs["error"]) for queue in queues for t in queue.done().values() if "error" in t.user_attrs
        ]

    def best(self, method: Method) -> Constants | None:
        """The constants of the best trial that went to the end."""
        done = [t for t in self._search(method).done().values() if t.value is not None and math.isfinite(t.value)]
        done = [t for t in done if t.state.name == "COMPLETE"]
        if not done:
            return None
        sign = self.plan.goal.sign
        return dict(max(done, key=lambda t: sign * t.value).user_attrs["constants"])

    def _finals(self) -> list[tuple[str, Constants]]:
        chosen = [(method.name, self.best(method)) for method in self.plan.methods]
        return [(PLAIN, {}), *((name, constants) for name, constants in chosen if constants is not None)]

    # --- what comes next

    def next(self) -> Task | None:
        """Claim the next task; None at the end. Only rank 0 may call this."""
        for stage in (self._next_range, self._next_search, self._next_final):
            task = stage()
            if task is not None:
                return task
        return None

    def _next_range(self) -> Task | None:
        waits = False
        for method in self.plan.methods:
            queue = self._queue(f"range {method.name}")
            if 0 in queue.done():
                continue
            job = queue.claim(1)
            if job is not None:
                self.job = job
                return Task("range", method.name, {}, self.plan.seed)
            waits = True
        return Task("wait") if waits else None

    def _next_search(self) -> Task | None:
        ranges = self.ranges()
        if not ranges:
            raise TuneError(f"no method can be used here: {self._first_error()}")
        waits = False
        methods = [method for method in self.plan.methods if method.name in ranges]
        for method in sorted(methods, key=lambda method: self._search(method).started()):
            queue = self._search(method)
            if len(queue.done()) >= self.plan.trials or self._is_late():
                continue
            self.job = queue.claim(self.plan.trials)
            if self.job is not None:
                constants = self._suggest(queue, self.job, ranges[method.name])
                return Task("search", method.name, constants, self.plan.seed, self.job.index)
            waits = waits or len(queue.done()) < self.plan.trials
        return Task("wait") if waits else None

    def _suggest(self, queue: Queue, job: Job, found: Range) -> Constants:
        chosen = queue.suggest(job, found.bounds, first_guesses(found))
        constants = {name: rounded(value) for name, value in chosen.items()}
        job.trial.set_user_attr("constants", constants)
        return constants

    def _next_final(self) -> Task | None:
        finals = self._finals()
        if len(finals) == 1:
            raise TuneError(f"no trial of any method finished: {self._first_error()}")
        waits = False
        for name, constants in sorted(finals, key=lambda final: self._final(*final).started()):
            queue = self._final(name, constants)
            if len(queue.done()) >= self.plan.seeds:
                continue
            self.job = queue.claim(self.plan.seeds)
            if self.job is not None:
                return Task("final", name, constants, self.plan.seed + 1 + self.job.index, self.job.index)
            waits = True
        return Task("wait") if waits else None

    def _first_error(self) -> str:
        errors = (error for method in self.plan.methods for error in self._errors(method))
        return next(errors, "none went to the end, all were pruned, diverged, or were out of time")

    def _is_late(self) -> bool:
        """Whether the rest of the time is needed for the final trainings."""
        if self.deadline is None:
            return False
        done = [t for method in self.plan.methods for t in self._search(method).done().values()]
        lasted = [t.user_attrs["seconds"] for t in done if t.state.name == "COMPLETE" and "seconds" in t.user_attrs]
        each = statistics.mean(lasted) if lasted else 0.0
        return time.monotonic() + each * (1 + self.plan.seeds * (len(self.plan.methods) + 1)) > self.deadline

    # --- what came of it

    def prune(self, number: int, value: float, share: float) -> bool:
        """Whether to end the current trial after a validation: if it is worse than most were then, and than most ended.

        What most were then is not enough: a training that memorizes wrong labels is ahead at first, and gets worse.
        """
        if self.job is None:
            return False
        self.job.trial.report(value, number)
        if not math.isfinite(value):
            return True
        if share < _SPARED or not self.job.trial.should_prune():
            return False
        results = [trial.value for trial in self.job.queue.trials() if trial.state.name == "COMPLETE"]
        sign = self.plan.goal.sign
        return not results or sign * value < sign * statistics.median(results)

    def _current(self) -> Job:
        if self.job is None:
            raise RuntimeError("no job is being worked on: call `next` first")
        return self.job

    def finish_range(self, found: Range) -> None:
        """Keep a range test."""
        self._current().finish(found.sweep.edge, range=found.as_dict())
        self.job = None

    def fail(self, error: str) -> None:
        """Keep the current job as failed."""
        self._current().fail(error)
        self.job = None

    def finish(self, outcome: Outcome, task: Task) -> None:
        """Keep the outcome of a training."""
        job = self._current()
        facts = {**outcome.as_dict(), "seed": task.seed, "constants": task.constants}
        error = facts.pop("error")
        if error is not None:
            job.fail(error, **facts)
        else:
            value = None if outcome.pruned or not math.isfinite(outcome.value) else outcome.value
            job.finish(value, **facts)
        self.job = None

    def progress(self) -> tuple[float, float]:
        """The number of jobs that are done, and of all."""
        plan = self.plan
        searched = sum(min(len(self._search(method).done()), plan.trials) for method in plan.methods)
        ended = sum(min(len(self._final(*final).done()), plan.seeds) for final in self._finals()) if searched else 0
        ranged = sum(1 for method in plan.methods if 0 in self._queue(f"range {method.name}").done())
        count = len(plan.methods)
        return ranged + searched + ended, count * (1 + plan.trials) + (count + 1) * plan.seeds

    # --- the end

    def result(self) -> TuneResult:
        """What was found."""
        trials, rows = [], []
        for method in self.plan.methods:
            trials += [_record("search", method.name, i, t) for i, t in self._search(method).done().items()]
        plain: dict[int, dict[str, Any]] = {}
        for name, constants in self._finals():
            done = [_record("final", name, i, t) for i, t in self._final(name, constants).done().items()]
            done = done[: self.plan.seeds]
            trials += done
            by_seed = {record["seed"]: record for record in done if record["state"] == "COMPLETE"}
            plain = plain or by_seed
            rows.append(self._row(name, constants, by_seed, plain))
            if name == PLAIN and not by_seed:
                raise TuneError(f"plain training fails: {done[0].get('error') if done else 'it did not run'}")
        found = {row.method for row in rows if row.values}
        errors = {m.name: self._why(m) for m in self.plan.methods if m.name not in found}
        return TuneResult(self.plan.goal, rows, trials, self.ranges(), errors)

    def _why(self, method: Method) -> str:
        return next(iter(self._errors(method)), "no trial went to the end")

    def _row(self, name: str, constants: Constants, by_seed: dict[int, Any], plain: dict[int, Any]) -> Row:
        ratios = [by_seed[s]["step_seconds"] / plain[s]["step_seconds"] for s in by_seed if s in plain]
        ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
        return Row(
            name,
            constants,
            {seed: record["value"] for seed, record in by_seed.items()},
            {seed: record["value"] for seed, record in plain.items()},
            statistics.median(ratios) if ratios else math.nan,
            _tested(by_seed, self.plan.goal.monitor),
            _tested(plain, self.plan.goal.monitor),
        )


def first_guesses(found: Range) -> list[Constants]:
    """The first constants of a search: the suggestion of the range test, then points that fill the space evenly.

    Source: the additive recurrence with the generalized golden ratios, which keeps points apart however many there are.
    """
    bounds = list(found.bounds.items())
    ratio = _GOLDEN if len(bounds) == 1 else _PLASTIC
    guesses = [{name: min(max(found.suggestion[name], low), high) for name, (low, high) in bounds}]
    for i in range(1, 4 * len(bounds) + 1):
        shares = [(0.5 + i * ratio ** -(j + 1)) % 1.0 for j in range(len(bounds))]
        guesses.append({n: low * (high / low) ** u for (n, (low, high)), u in zip(bounds, shares, strict=True)})
    return guesses


def _record(stage: str, method: str, index: int, trial: Any) -> dict[str, Any]:
    facts = trial.user_attrs
    last = list(trial.intermediate_values.values())[-1:] or facts.get("values", [])[-1:]
    value = trial.value if trial.value is not None else (last[0] if last else None)
    names = ("seed", "constants", "seconds", "step_seconds", "test", "error", "steps")
    kept = {name: facts[name] for name in names if name in facts}
    return {"stage": stage, "method": method, "index": index, "state": trial.state.name, "value": value, **kept}


def _tested(by_seed: dict[int, Any], monitor: str) -> dict[int, float]:
    """The test metric that corresponds to the monitor, such as test_acc for val_acc, or else the first one."""
    wanted = monitor.replace("valid", "val").replace("val", "test")
    found = {}
    for seed, record in by_seed.items():
        metrics = record.get("test") or {}
        if metrics:
            found[seed] = metrics.get(wanted, metrics.get(monitor, next(iter(metrics.values()))))
    return found
