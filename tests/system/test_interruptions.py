"""Whatever interrupts a second pass, the weights are restored, in the module and in a checkpoint saved then."""

import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from interrupter import Interrupter, second_pass_of
from launching import ROOT
from modules import (
    METHODS,
    MOVING,
    SOME_MOVING,
    TinyModule,
    assert_same,
    make_loader,
    make_trainer,
    mlp,
    weights,
)
from pytorch_lightning.callbacks import OnExceptionCheckpoint

from lightning_gr import in_second_pass
from lightning_gr.core.storage import WeightStorage

STOPS = {
    "error": RuntimeError("broken"),
    "Ctrl-C": KeyboardInterrupt(),
    "out of memory": torch.OutOfMemoryError("no memory left"),
    "not finite": FloatingPointError("loss is nan"),
}


class Stops(TinyModule):
    """Raises ``stop`` in the second pass of its third step, in the forward or in the backward pass."""

    stop, at = None, "forward"

    def on_train_batch_start(self, batch, batch_idx):
        self.clean = weights(self.net)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if in_second_pass() and batch_idx == 2:
            # weights must be perturbed now, or the test would be meaningless
            assert not all(torch.equal(p, self.clean[name]) for name, p in self.net.named_parameters())
            if self.at == "forward":
                raise self.stop
            loss.register_hook(self.raise_it)
        return loss

    def raise_it(self, grad):
        raise self.stop


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")  # from Lightning, about OnExceptionCheckpoint
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


POINTS = 60  # spread over about ten thousand bytecodes of the pass


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lightning_gr.core", "lightning_gr"])
@pytest.mark.parametrize("name", SOME_MOVING)
def test_ctrl_c_before_any_bytecode(name, part):
    """Wherever Ctrl-C hits our code, including while restoring, the weights end unchanged."""
    net = mlp()
    clean, all_of_it = weights(net), Interrupter(10**9, part)
    second_pass = second_pass_of(name, net)
    with all_of_it:
        second_pass()
    total = 10**9 - all_of_it.left
    assert total > 500
    for count in range(1, total, total // POINTS):
        second_pass = second_pass_of(name, net)
        with suppress(KeyboardInterrupt), Interrupter(count, part):
            second_pass()
        torch.set_grad_enabled(True)  # torch.no_grad may be interrupted too
        assert_same(weights(net), clean)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_while_restoring(monkeypatch, after):
    """Ctrl-C hits before or in the middle of restoring the weights, and a second attempt completes it."""
    real, calls = WeightStorage.put_back, []

    def put_back(self):
        calls.append(len(calls))
        if len(calls) == 3:
            for param, value in list(zip(self.copy.params, self.copy.copies, strict=True))[:after]:
                param.copy_(value)
            raise KeyboardInterrupt
        real(self)

    class Clean(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.clean = weights(self.net)

    monkeypatch.setattr(WeightStorage, "put_back", put_back)
    module = Clean()
    with pytest.raises(SystemExit):
        make_trainer(METHODS["SAM"].callback()).fit(module, make_loader())
    assert len(calls) == 4
    assert_same(weights(module.net), module.clean)


def test_ctrl_c_is_not_ignored():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


IN_BACKGROUND = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `pytest &` starts, and so do the processes that it starts
command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *sys.argv[1:]]
sys.exit(subprocess.run(command).returncode)
"""


@pytest.mark.launch
@pytest.mark.slow
def test_ctrl_c_in_a_background_job():
    signals = f"{ROOT}/tests/core/test_signals.py"
    tests = [f"{__file__}::test_ctrl_c_is_not_ignored", f"{signals}::test_ctrl_c_is_not_deferred"]
    command = [sys.executable, "-c", IN_BACKGROUND, *tests]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert "passed" in ended.stdout
