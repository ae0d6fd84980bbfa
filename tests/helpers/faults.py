"""A training run that receives signals at random moments, run as a child process by test_signals.py.

Each handler saves a checkpoint, as Lightning's SLURM handler does, at whatever moment it is called. It
acknowledges each signal on standard output, so that the sender notices if one gets lost.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys

import pytorch_lightning as pl
import torch
from modules import mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import SAM, in_second_pass

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


class Training(pl.LightningModule):
    """Trains until it is told to stop."""

    def __init__(self):
        super().__init__()
        self.net = mlp(256, 256, dtype=torch.float32)

    def training_step(self, batch, batch_idx):
        arrived(in_second_pass())
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        arrived(in_second_pass())
        return loss

    def configure_optimizers(self):
        # foreach changes all weights in one operation, so that no handler can see a mixture of old and new ones
        return torch.optim.SGD(self.parameters(), lr=0.05, foreach=True)


def digest(state_dict):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state_dict.values())).hexdigest()


clean, saved, in_pass = set(), [], [0]
mail, wake = os.pipe()
os.set_blocking(mail, False)
os.set_blocking(wake, False)


def arrived(second):
    """Add the signals received since the last call to those that arrived in a second pass, if this is one."""
    with contextlib.suppress(BlockingIOError):
        letters = [letter for letter in os.read(mail, 1000) if letter in NUMBERS]
        in_pass[0] += len(letters) * second


class Faults(pl.Callback):
    """Replaces Lightning's signal handlers, which would end the training, and keeps digests of the weights."""

    def __init__(self, limit, folder):
        self.limit = limit
        self.path = os.path.join(folder, "handler.ckpt")

    def on_train_start(self, trainer, pl_module):
        def handle(number, frame):
            trainer.save_checkpoint(self.path)
            saved.append(digest(torch.load(self.path, weights_only=True)["state_dict"]))
            os.write(1, bytes([number]))

        for number in NUMBERS:
            signal.signal(number, handle)
        signal.set_wakeup_fd(wake)
        os.write(1, b"!")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        clean.add(digest(pl_module.state_dict()))
        trainer.should_stop = len(saved) >= self.limit

    def on_train_end(self, trainer, pl_module):
        clean.add(digest(pl_module.state_dict()))


if __name__ == "__main__":
    limit, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(64, 5), torch.randint(3, (64,)))
    trainer = pl.Trainer(
        max_epochs=-1,
        callbacks=[SAM(rho=0.5), Faults(limit, folder)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Training(), DataLoader(data, 64))
    report = {"saved": len(saved), "perturbed": sum(d not in clean for d in saved), "in second pass": in_pass[0]}
    with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file)
