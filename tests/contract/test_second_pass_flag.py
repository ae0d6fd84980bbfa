"""The contract for ``in_second_pass()``: correct after nested calls and errors, and in several threads."""

import contextvars
import threading

import pytest
import torch
from contract import FORMS, Batches, Situation, make_trainer, over, seed, train
from oracle import CENTRAL, sam
from outside import Counter, Record
from torch import nn

from lightning_gr import (
    SAM,
    GRRule,
    SAMRule,
    SharpnessMonitor,
    hessian_eigenvalue,
    hessian_trace,
    in_second_pass,
    regularized_backward,
)

SEEN = Record()


class Asks(Situation):
    """Asks before and after a nested call."""

    def step(self, batch):
        before = in_second_pass()
        self.nest(batch)
        SEEN.append((before, in_second_pass()))
        return self.mse(batch)

    def nest(self, batch):
        """Do nothing, unless overridden."""


class Trace(Asks):
    def nest(self, batch):
        hessian_trace(lambda: self.mse(batch), self.net, max_samples=2, min_samples=2)


class Eigenvalue(Asks):
    def nest(self, batch):
        hessian_eigenvalue(lambda: self.mse(batch), [self.net.weight], max_iterations=2)


class Nested(Asks):
    """Takes a step with another network, as in meta-learning."""

    def nest(self, batch):
        other, inside = nn.Linear(3, 2).double(), Record()

        def loss_fn():
            inside.append(in_second_pass())
            return (other(batch[0]) - batch[1]).square().mean()

        regularized_backward(loss_fn, other, GRRule(0.1, 0.1))
        assert inside[1]
        assert inside[0] == in_second_pass()  # its first pass belongs to the pass around it


class NestedPlain(Asks):
    """A nested rule without a second pass."""

    def nest(self, batch):
        other = nn.Linear(3, 2).double()
        regularized_backward(lambda: (other(batch[0]) - batch[1]).square().mean(), other, SAMRule(0.0))


class NestedFails(Asks):
    """The nested second pass raises an error, which the step catches."""

    def nest(self, batch):
        other, calls = nn.Linear(3, 2).double(), Counter()

        def loss_fn():
            if calls() == 1:
                raise FloatingPointError
            return other(batch[0]).square().mean()

        with pytest.raises(FloatingPointError):
            regularized_backward(loss_fn, other, SAMRule(0.1))


class InHook(Asks):
    """Asks in the backward pass, in a hook of a tensor."""

    def step(self, batch):
        loss = self.mse(batch)
        before = in_second_pass()
        loss.register_hook(lambda grad: SEEN.append((before, in_second_pass())))
        return loss


@over(Asks, Trace, Eigenvalue, Nested, NestedPlain, NestedFails, InHook)
def test_the_flag_is_restored_after_nested_calls(kind, form):
    for method, probes in ((sam(0.5), 1), (CENTRAL, 2)):
        SEEN.clear()
        train(kind, form, method)
        assert SEEN.count((False, False)) == 9
        assert SEEN.count((True, True)) == 9 * probes
        assert len(SEEN) == 9 * (1 + probes)
        assert not in_second_pass()


@pytest.mark.parametrize("form", FORMS)
def test_the_flag_is_off_after_an_error(form):
    class Fails(Situation):
        def step(self, batch):
            if in_second_pass():
                raise FloatingPointError
            return self.mse(batch)

    with pytest.raises(FloatingPointError):
        train(Fails, form, sam(0.5))
    assert not in_second_pass()


def test_a_monitor_and_its_loss():
    """The flag may be set or not while the sharpness is measured, but it must be off afterwards."""
    seed()
    module = Asks()
    SEEN.clear()
    make_trainer(SharpnessMonitor(samples=2), SAM(0.1), max_epochs=2).fit(module, Batches(module.make_batches()))
    assert not in_second_pass()
    assert all(before == after for before, after in SEEN)
    assert SEEN.count((False, False)) == 18


def test_threads():
    """Two loops in two threads each see their own passes."""
    wrong, barrier = Record(), threading.Barrier(2, timeout=60)

    def loop():
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
        x = torch.randn(4, 3).double()
        for _ in range(20):
            calls = Counter()

            def loss_fn(calls=calls):
                second = calls() == 1
                barrier.wait()
                wrong.extend(1 for _ in range(4) if in_second_pass() != second)
                barrier.wait()
                return net(x).square().mean()

            regularized_backward(loss_fn, net, SAMRule(0.1))
            if in_second_pass():
                wrong.append(1)

    run_in_threads(loop, loop)
    assert len(wrong) == 0


def test_a_plain_loop_in_parallel_with_a_regularized_one():
    """Only one of two threads makes second passes."""
    wrong, barrier = [], threading.Barrier(2, timeout=60)

    def regularized():
        net, x = nn.Linear(3, 1).double(), torch.randn(4, 3).double()

        def loss_fn():
            barrier.wait()
            loss = net(x).square().mean()
            barrier.wait()
            return loss

        for _ in range(10):
            regularized_backward(loss_fn, net, SAMRule(0.1))

    def plain():
        for _ in range(20):
            barrier.wait()
            wrong.append(in_second_pass())
            barrier.wait()

    run_in_threads(regularized, plain)
    assert wrong == [False] * 20


def test_two_trainers_in_two_threads():
    wrong = Record()

    class Checks(Situation):
        steps = 40

        def prepare(self):
            self.calls = 0

        def step(self, batch):
            CALLS.value = getattr(CALLS, "value", 0) + 1
            expected = CALLS.value % 2 == 0
            loss = self.mse(batch)
            if in_second_pass() != expected:
                wrong.append(CALLS.value)
            return loss

    def fit():
        module = Checks()
        make_trainer(SAM(0.1)).fit(module, Batches(module.make_batches()))

    run_in_threads(fit, fit)
    assert wrong == []


def test_a_plain_trainer_in_parallel_with_a_regularized_one():
    """In a thread without second passes the flag stays off, whatever other threads do."""
    seen, running = Record(), threading.Event()

    class Slow(Situation):
        steps = 40

        def step(self, batch):
            running.wait(10)
            return self.mse(batch)

    class Plain(Situation):
        steps = 200

        def step(self, batch):
            running.set()
            seen.append(in_second_pass())
            return self.mse(batch)

    def fit(kind, *callbacks):
        module = kind()
        make_trainer(*callbacks).fit(module, Batches(module.make_batches()))

    run_in_threads(lambda: fit(Slow, SAM(0.1)), lambda: fit(Plain))
    assert seen == [False] * 200


def test_a_thread_with_a_copied_context_sees_the_flag_of_its_step():
    net, x, seen = nn.Linear(3, 1).double(), torch.randn(4, 3).double(), Record()

    def ask():
        seen.append(in_second_pass())

    def loss_fn():
        thread = threading.Thread(target=contextvars.copy_context().run, args=(ask,))
        thread.start()
        thread.join()
        return net(x).square().mean()

    regularized_backward(loss_fn, net, SAMRule(0.1))
    assert seen == [False, True]


CALLS = threading.local()


def run_in_threads(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
