"""Training that is resumed from a checkpoint gives the same result, and methods may be added or removed there."""

import json
import os
import signal
import subprocess
import sys
import types
from contextlib import suppress

import pytest
import pytorch_lightning as pl
import torch
from launching import HERE, ROOT
from modules import METHODS, SOME, assert_same, make_trainer
from outside import Record
from resumes import KEEPING, KILLS, TRAININGS, Loader, Training, last_complete, regularization, train

from lightning_gr import Flooding, GRRule, in_second_pass
from lightning_gr.callbacks.base import TwoPass

LIMIT = 120.0  # seconds


def plain(value):
    """Convert nested containers of tensors to plain values, which can be compared bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def state_of(trainer):
    """Return the final state of training: weights and buffers, optimizer, schedule, and number of steps."""
    states = [trainer.model, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler]
    return [plain(state.state_dict()) for state in states], trainer.global_step


class Passes(types.ModuleType):
    """Records optimizer steps with a second pass, in a module object, since other records would be undone."""

    def __init__(self):
        super().__init__("passes")
        self.steps = set()

    def __call__(self, moment, step):
        if moment == "second pass":
            self.steps.add(step)


class Saves(pl.Callback):
    """Saves a checkpoint after each batch, under its number and the optimizer step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        done = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
        trainer.save_checkpoint(self.folder / f"{done}.ckpt")


# --- killed


@pytest.mark.launch
@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("name", TRAININGS)
def test_killed_training_ends_like_uninterrupted_training(name, tmp_path, capsys):
    # fsspec first writes checkpoints to a temporary file, which remains if it is killed
    path = os.pathsep.join([str(ROOT), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", str(HERE / "resumes.py"), name, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
    try:
        assert child.wait(LIMIT) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # including its fork
        child.wait()
    report = json.loads((tmp_path / "report.json").read_text())
    with capsys.disabled():
        print(f"\n{name}: killed in " + ", ".join(moment + ", checkpoint torn" * torn for moment, torn in report))
    assert len(report) == KILLS
    assert any(torn for _, torn in report)
    callbacks, options, _ = TRAININGS[name]
    resumed = train(*callbacks(), ckpt_path=last_complete(tmp_path), **options)
    assert state_of(resumed) == state_of(train(*callbacks(), **options))


# --- schedules


@pytest.mark.parametrize("name", TRAININGS)
def test_schedules_follow_the_global_step(name, tmp_path):
    """From any checkpoint, and without any of our state in it."""
    callbacks, options, _ = TRAININGS[name]
    options = {"max_epochs": 3, **options}
    unbroken = Passes()
    expected = state_of(train(*callbacks(), Saves(tmp_path), module=Training(unbroken), **options))
    assert len(unbroken.steps) == {"GR": 5, "SAM": 12, "SAM by micro-batch": 12}[name]
    for batches in (2, 4, 7, 9, 11, 14, 18, 20):  # each ends a window, as the last window of an epoch is shorter
        checkpoint = torch.load(tmp_path / f"{batches}.ckpt", weights_only=True)
        assert "lightning_gr" not in checkpoint
        checkpoint["callbacks"] = {}
        torch.save(checkpoint, tmp_path / "without.ckpt")
        resumed = Passes()
        trainer = train(*callbacks(), module=Training(resumed), ckpt_path=tmp_path / "without.ckpt", **options)
        assert resumed.steps == {step for step in unbroken.steps if step >= checkpoint["global_step"]}
        assert state_of(trainer) == expected


@pytest.mark.parametrize("name", KEEPING)
def test_the_state_of_a_rule_is_resumed(name, tmp_path):
    callbacks, options = KEEPING[name]
    options = {"max_epochs": 3, **options}
    expected = state_of(train(*callbacks(), Saves(tmp_path), **options))
    for batches in (2, 4, 9, 14, 18, 20):
        checkpoint = torch.load(tmp_path / f"{batches}.ckpt", weights_only=True)
        kept = [state["state"] for state in checkpoint["callbacks"].values() if "state" in state]
        assert bool(kept) == (name != "Momentum-SAM")
        assert all(set(vector) <= set(checkpoint["state_dict"]) for each in kept for vector in each.values())
        assert state_of(train(*callbacks(), ckpt_path=tmp_path / f"{batches}.ckpt", **options)) == expected


@pytest.mark.parametrize("name", ["SAM", "SAM by micro-batch"])
def test_the_rest_of_a_window_is_regularized(name, tmp_path):
    callbacks, options, _ = TRAININGS[name]
    train(*callbacks(), Saves(tmp_path), max_epochs=1, **options)
    resumed = Passes()
    train(*callbacks(), module=Training(resumed), max_epochs=1, ckpt_path=tmp_path / "3.ckpt", **options)
    assert resumed.steps == {1, 2, 3}


def test_the_same_trainer_continues_after_an_error(tmp_path):
    class Breaks(Training):
        def training_step(self, batch, batch_idx):
            if in_second_pass() and self.global_step == 10 and not errors:
                errors.append("broken")
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    errors = Record()
    trainer, module = make_trainer(*regularization(), Saves(tmp_path), max_epochs=3), Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, Loader())
    trainer.fit(module, Loader(), ckpt_path=tmp_path / "8.ckpt")
    assert list(errors) == ["broken"]
    assert state_of(trainer) == state_of(train(*regularization(), max_epochs=3))


# --- with another method than before

RULES = {"plain": GRRule(gamma=0.0), "GR": METHODS["forward GR"].rule, "SAM": METHODS["SAM"].rule}
CHANGES = [("plain", "GR"), ("plain", "SAM"), ("GR", "plain"), ("GR", "SAM"), ("SAM", "GR")]


def method(name):
    return [] if name == "plain" else [TwoPass(RULES[name])]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_method_can_continue(before, after, tmp_path):
    """The result is the same as when the rule changes during training."""

    class Changes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            both.rule = RULES[before if trainer.global_step < 9 else after]

    train(*method(before), Saves(tmp_path), max_epochs=2)
    both = TwoPass(RULES[before])
    expected = state_of(train(Changes(), both, max_epochs=3))
    assert state_of(train(*method(after), ckpt_path=tmp_path / "9.ckpt", max_epochs=3)) == expected


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_load_from_checkpoint(before, after, tmp_path):
    trainer = train(*method(before), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    copied, loaded = Training(), Training.load_from_checkpoint(tmp_path / "saved.ckpt")
    copied.load_state_dict(trainer.model.state_dict())
    assert_same(loaded.state_dict(), copied.state_dict())
    ends = [state_of(train(*method(after), module=module, max_epochs=1)) for module in (loaded, copied)]
    assert ends[0] == ends[1]


# --- what is in a checkpoint


class SavesEverywhere(pl.Callback):
    """Saves a checkpoint in each hook, and keeps its contents."""

    def __init__(self, path):
        self.path, self.saved = path, []

    def save(self, hook, trainer):
        trainer.save_checkpoint(self.path)
        self.saved.append((hook, torch.load(self.path, weights_only=True)))


for _name in [n for n in dir(pl.Callback) if n.startswith("on_") and "checkpoint" not in n]:
    setattr(SavesEverywhere, _name, lambda self, trainer, *args, _name=_name: self.save(_name, trainer))


class Breaks(Training):
    """Raises in a second pass of its last step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if in_second_pass() and self.global_step == self.last:
            raise RuntimeError("broken")
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.net, batch))

    def val_dataloader(self):
        return Loader()


class Raises(pl.Callback):
    """Raises at the point where the second pass would run, if it is the last callback."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == pl_module.last:
            raise RuntimeError("broken")


def save_everywhere(path, *callbacks, accumulate, at_end=(), **options):
    # with a learning rate of zero, runs with and without second passes have the same weights throughout
    module = Breaks(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    module.last = {1: 5, 2: 3}[accumulate]
    first, last = SavesEverywhere(path), SavesEverywhere(path)
    options = {"limit_train_batches": 3, "limit_val_batches": 1, "accumulate_grad_batches": accumulate, **options}
    with pytest.raises(RuntimeError, match="broken"):
        train(first, *callbacks, last, *at_end, module=module, max_epochs=2, **options)
    return first.saved + last.saved


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", [*SOME, "SAM"])
def test_checkpoints_equal_those_of_plain_training(name, accumulate, tmp_path):
    """Whichever hook saves it, before or after our callback, it has clean weights and no additional entries."""
    path = tmp_path / "saved.ckpt"
    without = save_everywhere(path, at_end=[Raises()], accumulate=accumulate)
    with_it = save_everywhere(path, METHODS[name].callback(), Flooding(1.0), accumulate=accumulate)
    assert {"on_exception", "on_validation_end", "on_after_backward"} < {hook for hook, _ in without}
    assert plain(with_it) == plain(without)
