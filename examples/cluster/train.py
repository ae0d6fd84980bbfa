"""A cluster job: digits, a small network and gradient regularization, with LightningCLI.

It stops cleanly when it is preempted, resumes when it is started again, and reaches the same weights as an
uninterrupted run. See README.md in this folder.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_info
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import lightning_gr  # noqa: F401  (registers its callbacks' short names)


class Digits(pl.LightningDataModule):
    """Handwritten digits, in an order that only depends on the epoch, so that a run can resume within one.

    Args:
        batch_size: The number of images per step, over all devices.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> StatefulDataLoader:
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = StatefulDistributedSampler(data, ranks, rank, shuffle=True, seed=0, drop_last=True)
        return StatefulDataLoader(data, self.batch_size // ranks, sampler=sampler, drop_last=True)


class Classifier(pl.LightningModule):
    """A multilayer perceptron.

    Args:
        width: The number of units in each hidden layer.
        learning_rate: The learning rate of SGD with momentum.
    """

    def __init__(self, width: int = 256, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class Preemption(pl.Callback):
    """On SIGUSR1, saves a checkpoint and requeues the job at the end of the step, once all ranks know about it.

    Lightning's own requeueing saves from inside the signal handler, wherever the program happens to be. The checkpoint
    may then count a step that was not taken, and ranks at different points can deadlock (Lightning issues 21406 and
    21407). Here the handler only sets a flag, and the ranks agree on it once per step.
    """

    def __init__(self) -> None:
        self.requested = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        signal.signal(signal.SIGUSR1, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # this runs before the checkpoint callback's hook, which Lightning calls last
        if trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            trainer.save_checkpoint(Path(trainer.checkpoint_callback.dirpath) / "last.ckpt")
            rank_zero_info(f"Preempted after step {trainer.global_step}: run the same command again to resume.")
            if trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
            raise SystemExit(0)  # on an error, srun and torchrun would kill the rank that requeues the job


if __name__ == "__main__":
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None
    LightningCLI(
        Classifier,
        Digits,
        trainer_defaults={"callbacks": [Preemption()], "plugins": plugins},
        save_config_kwargs={"overwrite": True},  # a resumed run finds the file of the first one
    )
