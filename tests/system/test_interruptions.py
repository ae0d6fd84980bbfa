"""Whatever breaks off a second pass: the weights are the clean ones, in the module and in a checkpoint saved then."""

import signal
import sys

import pytest
import torch
from modules import (
    METHODS,
    TinyModule,
    assert_same,
    cross_entropy,
    make_data,
    make_loader,
    make_trainer,
    mlp,
    weights,
)
from pytorch_lightning.callbacks import OnExceptionCheckpoint

from lightning_gr import in_second_pass
from lightning_gr.core.perturb import WeightCopy
from lightning_gr.core.two_pass import add_second_pass_
from lightning_gr.replay import isolation

MOVING = ["forward GR", "backward GR", "central norm penalty", "SAM", "ASAM with eta"]
STOPS = {
    "error": RuntimeError("broken"),
    "Ctrl-C": KeyboardInterrupt(),
    "out of memory": torch.OutOfMemoryError("no memory left"),
    "not finite": FloatingPointError("loss is nan"),
}


class Stops(TinyModule):
    """Ends by ``stop`` in the second pass of its third step, in the forward or in the backward pass."""

    stop, at = None, "forward"

    def on_train_batch_start(self, batch, batch_idx):
        self.clean = weights(self.net)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if in_second_pass() and batch_idx == 2:
            # perturbed by now, or the test would show nothing
            assert not all(torch.equal(p, self.clean[name]) for name, p in self.net.named_parameters())
            if self.at == "forward":
                raise self.stop
            loss.register_hook(self.raise_it)
        return loss

    def raise_it(self, grad):
        raise self.stop


@pytest.fixture
def _sigint():
    # Lightning turns Ctrl-C off when it has seen one
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")  # Lightning's own, about OnExceptionCheckpoint
@pytest.mark.parametrize("at", ["forward", "backward"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", MOVING)
def test_weights_are_restored(name, stop, at, tmp_path):
    module = Stops()
    module.stop, module.at = STOPS[stop], at
    trainer = make_trainer(METHODS[name].callback(), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    with pytest.raises(SystemExit if stop == "Ctrl-C" else type(module.stop)):
        trainer.fit(module, make_loader())
    assert_same(weights(module.net), module.clean)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    assert_same({key.removeprefix("net."): value for key, value in saved.items()}, module.clean)
    assert not in_second_pass()
    assert "training_step" not in vars(trainer.strategy)
    assert "log" not in vars(module)


def second_pass_of(name, net):
    """Run the second pass of a method on ``net``, all of it but what Lightning adds."""
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    batch = make_data()
    modules, before = isolation.StatefulModules(net), isolation.ModuleState(isolation.StatefulModules(net))

    def replay(transform, last=True):
        with isolation.second_pass(modules, before):
            transform(cross_entropy(net, batch)).backward()

    add_second_pass_(METHODS[name].rule.update(), list(net.parameters()), replay, WeightCopy())


class Interrupter:
    """Raises KeyboardInterrupt before the ``count``-th bytecode that the package executes."""

    def __init__(self, count):
        self.left = count

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *exc):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith("lightning_gr"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("name", ["central norm penalty", "ASAM with eta"])
def test_ctrl_c_before_any_bytecode(name):
    """Wherever in our code Ctrl-C comes, restoring included, the weights end as they were."""
    net = mlp()
    clean, count, interrupted = weights(net), 0, True
    while interrupted:
        count += 7  # not each one, to be quick; 7 is no period of anything
        interrupter = Interrupter(count)
        try:
            with interrupter:
                second_pass_of(name, net)
        except KeyboardInterrupt:
            pass
        interrupted = interrupter.left <= 0
        torch.set_grad_enabled(True)  # torch.no_grad may be interrupted too
        assert_same(weights(net), clean)
    assert count > 500


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_while_restoring(monkeypatch, after):
    """It comes before, or in the middle of, copying the weights back: a second attempt completes it."""
    real, calls = WeightCopy.put_back, []

    def put_back(self, params):
        calls.append(len(calls))
        if len(calls) == 3:
            for param, value in list(zip(params, self.tensors, strict=True))[:after]:
                param.copy_(value)
            raise KeyboardInterrupt
        real(self, params)

    class Clean(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.clean = weights(self.net)

    monkeypatch.setattr(WeightCopy, "put_back", put_back)
    module = Clean()
    with pytest.raises(SystemExit):
        make_trainer(METHODS["SAM"].callback()).fit(module, make_loader())
    assert len(calls) == 4
    assert_same(weights(module.net), module.clean)


# --- signals


@pytest.fixture
def handled():
    """Signals that a Python handler has seen, and whether weights could have been perturbed then."""
    seen = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: seen.append((n, inside))) for number in numbers}
    inside = False

    def enter(value):
        nonlocal inside
        inside = value

    yield seen, enter
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_wait_and_are_called_in_order(handled):
    seen, enter = handled
    with isolation.deferred_signals():
        enter(True)
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(number)
        assert seen == []
        enter(False)
    order = [signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    assert seen == [(number, False) for number in order]
    signal.raise_signal(signal.SIGUSR1)
    assert len(seen) == 5


def test_no_signal_is_lost_if_a_handler_or_the_body_raises(handled):
    seen, _ = handled

    def refuse(number, frame):
        raise SystemExit("first")

    @isolation.deferred_signals()
    def body():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        raise ValueError("body")

    signal.signal(signal.SIGTERM, refuse)
    with pytest.raises(SystemExit, match="first"):
        body()
    assert [number for number, _ in seen] == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) is refuse


def test_a_handler_installed_meanwhile_stays(handled):
    with isolation.deferred_signals():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_ctrl_c_is_not_held_back():
    @isolation.deferred_signals()
    def body():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the body went on")

    with pytest.raises(KeyboardInterrupt):
        body()
