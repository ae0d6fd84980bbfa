"""The contract for signals: the program's own handlers are restored, whatever interrupts a step."""

import signal
import sys

import pytest
import torch
from contract import Batches, Situation, make_trainer
from oracle import sam
from outside import Record
from torch import nn

from lightning_gr import GRRule, SAMRule, in_second_pass, regularized_backward

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


POINTS = 40


class Interrupter:
    """Sends Ctrl-C before the ``count``-th bytecode that the package executes."""

    def __init__(self, count):
        self.left = count

    def __enter__(self):
        self.before = sys.gettrace()  # set by coverage, if it is being measured
        sys.settrace(self.trace)

    def __exit__(self, *exc):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith("lightning_gr"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self.trace


@pytest.fixture
def received(_ctrl_c):
    """The signals that the program's own handlers received, and the handler."""
    seen = Record()

    def note(number, frame):
        seen.append(number)

    before = {number: signal.signal(number, note) for number in NUMBERS}
    yield seen, note
    for number, handler in before.items():
        signal.signal(number, handler)


class Net(nn.Linear):
    """Changes its state in each call: a buffer through ``.data``, a list and a generator."""

    def __init__(self):
        super().__init__(3, 1)
        self.double()
        self.register_buffer("mean", torch.zeros(()).double())
        self.history, self.generator = [], torch.Generator().manual_seed(0)

    def forward(self, x):
        y = super().forward(x + 0.1 * torch.randn(x.shape, generator=self.generator).double())
        self.mean.data.mul_(0.9).add_(y.detach().mean())
        self.history.append(y.mean().item())
        return y

    def state(self):
        return self.mean.clone(), list(self.history), self.generator.get_state()


def interrupted(rule, loss_fn, check):
    """Interrupt a step at bytecodes spread over all of it, and check the state each time."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3).double(), torch.randn(1, 3).double()

    def step(count):
        net = Net()
        net.weight.data.copy_(weight)
        interrupter, before, hit, states = Interrupter(count), net.state(), False, []

        def loss_of_step():
            loss = loss_fn(net, x)
            if not in_second_pass():
                states.append(net.state())
            return loss

        try:
            with interrupter:
                regularized_backward(loss_of_step, net, rule)
        except KeyboardInterrupt:
            hit = True
        finally:
            torch.set_grad_enabled(True)  # torch.no_grad may be interrupted too
        left = net.state()
        # as before the step or after its first pass, and nothing else
        assert any(str(left) == str(state) for state in (before, *states)), f"after bytecode {count}"
        assert torch.equal(net.weight, weight)
        check(count, hit)
        return interrupter.left

    last = 10**9 - step(10**9)
    assert last > 5000
    hits = [step(count) <= 0 for count in range(3, last, last // POINTS + 1)]
    assert sum(hits) > POINTS / 2


def loss_of(net, x):
    return net(x).square().mean()


@pytest.mark.parametrize("rule", [SAMRule(0.1), GRRule(0.1, 0.1, scheme="central")])
def test_handlers_are_restored_wherever_ctrl_c_hits(rule, received):
    seen, note = received

    def check(count, hit):
        for number in NUMBERS:
            assert signal.getsignal(number) is note, f"{number} after bytecode {count}"
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        seen.clear()
        assert not in_second_pass()

    interrupted(rule, loss_of, check)


def test_no_signal_is_lost_wherever_ctrl_c_hits(received):
    """A signal that arrives in the second pass is delivered once."""
    seen, note = received
    raised = Record()

    def loss_fn(net, x):
        if in_second_pass():
            raised.append(1)
            signal.raise_signal(signal.SIGUSR1)
        return loss_of(net, x)

    def check(count, hit):
        assert signal.getsignal(signal.SIGUSR1) is note, f"after bytecode {count}"
        assert len(seen) == len(raised), f"after bytecode {count}"
        seen.clear()
        raised.clear()

    interrupted(SAMRule(0.1), loss_fn, check)


def test_a_handler_that_raises(received):
    """Such as the timeout of a test runner: its exception must not prevent the other handlers from running."""
    seen, note = received

    class TimedOutError(Exception):
        pass

    def raises(number, frame):
        seen.append(number)
        raise TimedOutError

    signal.signal(signal.SIGUSR2, raises)
    net = nn.Linear(3, 1)
    x = torch.randn(4, 3)

    def loss_fn():
        if in_second_pass():
            for number in (signal.SIGUSR2, signal.SIGTERM):
                signal.raise_signal(number)
        return loss_of(net, x)

    weight = net.weight.detach().clone()
    with pytest.raises(TimedOutError):
        regularized_backward(loss_fn, net, SAMRule(0.1))
    assert sorted(seen) == sorted([signal.SIGUSR2, signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) is note
    assert signal.getsignal(signal.SIGUSR2) is raises
    assert torch.equal(net.weight, weight)


@pytest.fixture
def _sigint():
    # Lightning ignores Ctrl-C after the first one
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_sigint")
def test_ctrl_c_in_a_trainer(received):
    _, note = received

    class Stopped(Situation):
        def step(self, batch):
            if in_second_pass():
                signal.raise_signal(signal.SIGINT)
            return self.mse(batch)

    module = Stopped()
    with pytest.raises(SystemExit):
        make_trainer(sam(0.1).callback()).fit(module, Batches(module.make_batches()))
    assert signal.getsignal(signal.SIGUSR1) is note
    assert signal.getsignal(signal.SIGTERM) is note


def test_a_handler_installed_in_the_step_stays(received):
    """As long as in plain training, at the end of which Lightning restores the earlier handlers."""

    def other(number, frame):
        """Do nothing."""

    class Installs(Situation):
        def prepare(self):
            self.seen = []

        def step(self, batch):
            signal.signal(signal.SIGUSR1, other)
            return self.mse(batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen.append([signal.getsignal(number) for number in NUMBERS[1:]])

    found = []
    for callbacks in ([], [sam(0.1).callback()]):
        module = Installs()
        make_trainer(*callbacks).fit(module, Batches(module.make_batches()))
        found.append((module.seen, [signal.getsignal(number) for number in NUMBERS]))
    assert found[0][0][0][0] is other
    assert found[1] == found[0]
