"""Measures the time, memory and operators of training steps for several training methods."""

import gc
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WAYS
from workloads import Workload

__all__ = [
    "STEPS",
    "WARM_UP",
    "Clock",
    "Counts",
    "Same",
    "Timing",
    "count",
    "count_pass",
    "make_trainer",
    "quiet",
    "time_steps",
]

# The first, second, fourth, eighth, ... second pass learns what the step writes, which takes longer and is measured by
# isolation.py. The steps after the eighth and before the sixteenth do not: those that follow the warm-up.
WARM_UP, STEPS = 9, 6

SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


@contextmanager
def quiet() -> Iterator[None]:
    """Use one thread and silence Lightning's messages and all warnings."""
    threads = torch.get_num_threads()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Create a Trainer for one epoch on the CPU, without logger, checkpoints and progress bar."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **dict.fromkeys(off, False), **options}
    return pl.Trainer(callbacks=list(callbacks), **options)


class Same:
    """A loader that repeats one batch; Lightning would treat a list as several loaders."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)


class Timing(NamedTuple):
    """The wall-clock and CPU time of a step, in seconds."""

    wall: float
    cpu: float


class Clock(pl.Callback):
    """Measures from the start of one step to the start of the next, so that nothing is missed."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.starts: list[tuple[float, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Record the start of the step."""
        self.starts.append((time.perf_counter(), time.process_time()))

    @property
    def steps(self) -> list[Timing]:
        """The durations of all steps after the warm-up."""
        starts = self.starts[self.warm_up :]
        return [Timing(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(starts)]


def time_steps(
    workload: Workload, ways: Sequence[str], rounds: int, steps: int, warm_up: int = WARM_UP
) -> dict[str, list[list[Timing]]]:
    """Time the steps of each method in each round. Every round runs all methods."""
    torch.manual_seed(0)
    modules = {way: WAYS[way].module(workload.model()) for way in ways}
    batches = Same(workload.batch(), warm_up + steps + 1)
    times: dict[str, list[list[Timing]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, module in modules.items():
            clock = Clock(warm_up)
            make_trainer(clock, *WAYS[way].callbacks()).fit(module, batches)
            times[way].append(clock.steps)
            module.zero_grad()
            module.trainer = None  # frees the optimizer's state and the callbacks' copies
            gc.collect()
    return times


class Operators(TorchDispatchMode):
    """Counts operators, the bytes that they read and write, and those that would wait for an accelerator.

    On the CPU, the backward pass also runs in this thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = self.bytes = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._opname != "detach":
            self.number += 1
            self.syncs += func._opname in SYNCS
            self.bytes += _moved(func._schema.arguments, args, kwargs or {}, copies="copy_" in func._opname)
            if not any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
                self.bytes += _nbytes(result)
        return result


def _moved(arguments: Sequence[Any], args: Any, kwargs: Any, copies: bool) -> int:
    """The bytes that are read, each input once, plus the bytes written in place."""
    total = 0
    for position, argument in enumerate(arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only_written = copies or argument.kwarg_only  # like ``out``
        total += _nbytes(value) * (1 if only_written or not written else 2)
    return total


def _nbytes(value: Any) -> int:
    items = value if isinstance(value, (list, tuple)) else [value]
    return sum(item.nbytes for item in items if isinstance(item, Tensor))


class Counts(NamedTuple):
    """Operators, bytes, synchronizations and peak of additionally allocated bytes of one step."""

    operators: int
    bytes: int
    syncs: int
    peak: int


# The index of the counted step. Learning evaluations (the first, second, fourth, … second pass) cost more.
STEADY = 6  # neither a step that is learned from nor the one after it, in which buffers are allocated again
_STEADY_STEP = "steady step"


class Counter(pl.Callback):
    """Enters ``mode`` for step ``at``, from its start to the start of the next step."""

    def __init__(self, at: int, mode: Any) -> None:
        self.at, self.mode = at, mode

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            self.mode.__enter__()
        if batch_idx == self.at + 1:
            self.mode.__exit__(None, None, None)


def count(workload: Workload, way: str) -> Counts:
    """Count one step, with the memory that it needs in addition to the weights and the optimizer's state."""
    torch.manual_seed(0)
    module, batches = WAYS[way].module(workload.model()), Same(workload.batch(), STEADY + 2)
    operators = Operators()
    make_trainer(Counter(STEADY, operators), *WAYS[way].callbacks()).fit(module, batches)
    module.zero_grad()
    gc.collect()  # so that the first Trainer's memory is not freed during the profile
    with _no_chatter(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        marked = Counter(STEADY, torch.profiler.record_function(_STEADY_STEP))
        make_trainer(marked, *WAYS[way].callbacks()).fit(module, batches)
    return Counts(operators.number, operators.bytes, operators.syncs, _peak(profile))


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Discard what the profiler's C++ code writes to standard error."""
    saved = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _peak(profile: Any) -> int:
    """The peak of allocated bytes in the steady step, relative to the start of the profile."""
    events = profile.profiler.kineto_results.events()
    [step] = [event for event in events if event.name() == _STEADY_STEP]
    end = step.start_ns() + step.duration_ns()
    now = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        if step.start_ns() <= event.start_ns() <= end:
            peak = max(peak, now)
    return peak


def count_pass(workload: Workload) -> Counts:
    """Count a single forward and backward pass without existing gradients."""
    torch.manual_seed(0)
    module, batch = WAYS["plain"].module(workload.model()), workload.batch()
    with Operators() as operators:
        module.loss(batch).backward()
    return Counts(operators.number, operators.bytes, operators.syncs, 0)
