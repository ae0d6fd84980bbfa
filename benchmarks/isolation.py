"""What it costs to leave no trace: processor time of a step with SAM that is neither a pass nor the algorithm.

``python benchmarks/isolation.py`` takes about two minutes on one core. It takes the time of each evaluation of a loss,
the first one and the one of the second pass, less that of the training step and the backward pass in them. What is left
is looking what may change, saving it and putting it back. ``docs/performance.md`` explains the table.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from measuring import Same, make_trainer, quiet
from torch import Tensor, nn
from ways import RHO, WAYS, sgd
from workloads import WORKLOADS, Workload

from lightning_gr import SAMRule, regularized_backward
from lightning_gr.callbacks.recorder import Recorder
from lightning_gr.replay.closure import ClosurePasses

FORMS = ("callback", "mixin", "function")


# by the name of a module, which nothing enters: what a closure can reach would be put back
_spent = {"own": 0.0}


def timed(function: Callable[..., Any], sign: int) -> Callable[..., Any]:
    """``function``, whose time counts, or with ``sign`` −1 does not."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _spent["own"] += sign * (time.thread_time() - start)

    return call


@contextmanager
def attached() -> Iterator[None]:
    """Take the time in the package's evaluations, less that in the user's code and in backward passes."""
    kept = [(cls, name, vars(cls)[name]) for cls in (Recorder, ClosurePasses) for name in _TIMED if name in vars(cls)]
    start_recorder, start_closure = Recorder.__init__, ClosurePasses.__init__

    def recorder(this: Any, *args: Any, **kwargs: Any) -> None:
        start_recorder(this, *args, **kwargs)
        this._original = timed(this._original, -1)
        this._backward = timed(this._backward, -1)

    def closure(this: Any, loss_fn: Any, *args: Any, **kwargs: Any) -> None:
        backward = {name: timed(kwargs.pop(name), -1) for name in ("backward", "backward_again")}
        start_closure(this, timed(loss_fn, -1), *args, **backward, **kwargs)

    try:
        for cls, name, function in kept:
            setattr(cls, name, timed(function, 1))
        Recorder.__init__, ClosurePasses.__init__ = recorder, timed(closure, 1)  # type: ignore[assignment]
        yield
    finally:
        Recorder.__init__, ClosurePasses.__init__ = start_recorder, start_closure  # type: ignore[method-assign]
        for cls, name, function in kept:
            setattr(cls, name, function)


_TIMED = ("_training_step", "first", "replay")


class Step(NamedTuple):
    """Seconds of the processor: of a step, and of what is neither a pass nor the algorithm in it."""

    all: float
    own: float


class Steps(pl.Callback):
    """Reads the processor time, and the part of it that is counted, at the start of each step."""

    def __init__(self) -> None:
        self.starts: list[Step] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Note both, as of now."""
        self.starts.append(Step(time.thread_time(), _spent["own"]))


def train(workload: Workload, form: str, count: int, steps: Steps) -> None:
    """Train for ``count`` steps with SAM."""
    torch.manual_seed(0)
    net, batch = workload.model(), workload.batch()
    if form == "function":
        loop(net, batch, count, steps)
        return
    way = WAYS["SAM" if form == "callback" else "SAM, mixin"]
    make_trainer(steps, *way.callbacks()).fit(way.module(net), Same(batch, count))


def loop(net: nn.Module, batch: tuple[Tensor, Tensor], count: int, steps: Steps) -> None:
    """Train without Lightning."""
    optimizer = sgd(net.parameters())
    for _ in range(count):
        steps.on_train_batch_start()
        optimizer.zero_grad()
        regularized_backward(lambda: nn.functional.cross_entropy(net(batch[0]), batch[1]), net, SAMRule(RHO))
        optimizer.step()


def measure(workload: Workload, form: str, count: int) -> tuple[Step, Step]:
    """A step between learning steps, and one of those: medians. The first one, which warms up, is left out."""
    steps = Steps()
    with attached():
        train(workload, form, count, steps)
    taken = [Step(b.all - a.all, b.own - a.own) for a, b in zip(steps.starts, steps.starts[1:], strict=False)]
    between = [step for number, step in enumerate(taken, 1) if number & (number - 1)]
    learning = [step for number, step in enumerate(taken, 1) if number > 1 and not number & (number - 1)]
    return _median(between), _median(learning)


def _median(steps: Sequence[Step]) -> Step:
    return Step(*(statistics.median(values) for values in zip(*steps, strict=True)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=["MLP, 32", "ResNet", "transformer"], choices=WORKLOADS)
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    options = parser.parse_args()
    print(f"{'model':14} {'form':10} {'step, ms':>9} {'isolation, ms':>14} {'share':>7} {'learning step, ms':>18}")
    with quiet():
        for workload in options.workloads:
            for form in options.forms:
                between, learning = measure(WORKLOADS[workload], form, options.steps)
                print(
                    f"{workload:14} {form:10} {1e3 * between.all:9.1f} {1e3 * between.own:14.2f}"
                    f" {between.own / between.all:7.1%} {1e3 * learning.own:18.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
