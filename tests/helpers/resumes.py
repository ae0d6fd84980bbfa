"""Training that can be resumed at any step, and training that is killed repeatedly; a child process of test_resume.py.

The child process trains in forks of itself and kills them with SIGKILL. A fork reports each moment that it reaches and
waits for an answer, so that it can be killed a random time after a random moment. The next fork continues from the last
complete checkpoint.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from modules import TinyModule, make_data, make_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_gr import SAM, Flooding, GradientRegularization, MomentumSAM, TwoPass, in_second_pass
from lightning_gr.rules import FriendlySAMRule, LookSAMRule

KILLS = 6
SAMPLES, BATCH_SIZE = 21, 3
MOMENTS = ["first pass", "second pass", "saving"]


class Loader:
    """A loader that shuffles in each epoch and can resume within one."""

    def __init__(self):
        self.data = make_data(SAMPLES, dtype=torch.float32)
        self.epoch, self.done = 0, 0

    def __len__(self):
        return SAMPLES // BATCH_SIZE

    def __iter__(self):
        if self.done == len(self):
            self.epoch, self.done = self.epoch + 1, 0
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).split(BATCH_SIZE)
        while self.done < len(self):
            self.done += 1
            yield tuple(part[order[self.done - 1]] for part in self.data)

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        vars(self).update(state)


class Training(TinyModule):
    """Trains with BatchNorm, Dropout, Adam and a schedule.

    Lightning saves no random state, so the seed follows from the position of the batch.

    Args:
        tell: Called with each moment and the optimizer step.
        optimizer: A function of the parameters.
    """

    def __init__(self, tell=lambda moment, step: None, optimizer=lambda params: torch.optim.Adam(params, lr=0.02)):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)]
        super().__init__(nn.Sequential(*layers), optimizer=optimizer)
        self.tell = tell

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        self.tell("second pass" if in_second_pass() else "first pass", self.global_step)
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        self.tell("saving", self.global_step)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def regularization():
    """Second passes in steps 7 (strength 1/4), 10 (1/2), 13 (3/4), 16 (1), …"""
    return [GradientRegularization(0.1, 0.1, start_step=4, interval=3, warmup_steps=12), Flooding(1.0)]


# the callbacks, options of the Trainer, every_n_train_steps
TRAININGS = {
    "GR": (regularization, {}, 2),
    "SAM": (lambda: [SAM(0.1), Flooding(1.0)], {"accumulate_grad_batches": 2}, 1),
    "SAM by micro-batch": (lambda: [SAM(0.1, accumulation="micro_batch")], {"accumulate_grad_batches": 2}, 1),
}
# rules that keep state, or use the optimizer's
KEEPING = {
    "Momentum-SAM": (lambda: [MomentumSAM(0.5, warmup_steps=9)], {"accumulate_grad_batches": 2}),
    "Friendly-SAM": (lambda: [TwoPass(FriendlySAMRule(0.1))], {"accumulate_grad_batches": 2}),
    "LookSAM": (lambda: [TwoPass(LookSAMRule(0.1, interval=4))], {}),
}


def train(*callbacks, module=None, ckpt_path=None, max_epochs=8, **options):
    """Train, from a checkpoint if given, and return the Trainer."""
    trainer = make_trainer(*callbacks, max_epochs=max_epochs, **options)
    trainer.fit(Training() if module is None else module, Loader(), ckpt_path=ckpt_path)
    return trainer


def last_complete(folder):
    """Return the newest readable checkpoint."""
    for path in sorted(Path(folder).glob("*.ckpt"), key=os.path.getmtime, reverse=True):
        with suppress(Exception):  # a truncated file raises many kinds of errors
            torch.load(path, weights_only=True)
            return str(path)
    return None


class SavesSafely(ModelCheckpoint):
    """Saves only where Lightning 2.6 can resume, repeatedly.

    In the first window after a resume ModelCheckpoint saves half of it, without the gradient; and a training that is
    resumed from the last batch of an epoch miscounts its epochs, so that what it saves then cannot be resumed from.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def train_in_fork(name, folder, reports, answers):
    """Train in the fork, and wait for an answer at each moment."""

    def tell(moment, step):
        os.write(reports, bytes([MOMENTS.index(moment)]))
        if not os.read(answers, 1):
            os._exit(1)

    callbacks, options, every = TRAININGS[name]
    saves = SavesSafely(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False)
    options = {**options, "module": Training(tell), "enable_checkpointing": True}
    train(*callbacks(), saves, ckpt_path=last_complete(folder), **options)


def kill_in_training(name, folder, moment, count, delay):
    """Train in a fork, and kill it ``delay`` seconds after it reached ``moment`` for the ``count``-th time."""
    (reports, to_us), (answers, from_us) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reports)
            os.close(from_us)
            train_in_fork(name, folder, to_us, answers)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(to_us)
    os.close(answers)
    while count:
        reached = os.read(reports, 1)
        assert reached, "the training ended before the kill"
        count -= MOMENTS[reached[0]] == moment
        os.write(from_us, b"!")
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    os.close(reports)
    os.close(from_us)


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    torch.set_num_threads(1)
    draw, report = random.Random(name), []
    for moment in draw.sample(MOMENTS * 2, KILLS):
        kill_in_training(name, folder, moment, draw.randint(1, 3), draw.uniform(0, 0.003))
        newest = last_complete(folder)
        # Lightning leaves complete files, unless it was killed while moving one between two disks
        if torn := newest is not None and moment == "saving":
            os.truncate(newest, os.path.getsize(newest) // 2)
        report.append((moment, torn))
    (Path(folder) / "report.json").write_text(json.dumps(report))
