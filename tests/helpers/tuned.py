"""A small problem for comparing methods, at well under a second per training; as a program, a whole study.

`python tuned.py OUTPUT [STORAGE]` runs a study and prints its answer. TUNED_SLEEP makes each epoch take longer.
"""

import os
import sys
import time

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

FLAGS = {"max_epochs": 4, "accelerator": "cpu", "log_every_n_steps": 1}
SIZE = {"trials": 3, "seeds": 2, "range_steps": 6, "methods": ["plain", "SAM", "flooding"]}


class Problem(pl.LightningModule):
    """A small classifier with momentum."""

    def __init__(self, width: int = 8, lr: float = 0.1):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
        self.lr = lr

    def training_step(self, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch):
        x, y = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(x), y))
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())

    def test_step(self, batch):
        x, y = batch
        self.log("test_acc", (self.net(x).argmax(1) == y).float().mean())

    def on_train_epoch_end(self):
        time.sleep(float(os.environ.get("TUNED_SLEEP", "0")))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Data(pl.LightningDataModule):
    """Two noisy classes, the same for all seeds."""

    def __init__(self, size: int = 48):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(3 * size, 4, generator=draw)
        y = (x.sum(1) + torch.randn(3 * size, generator=draw) > 0).long()
        self.parts = [TensorDataset(x[i::3], y[i::3]) for i in range(3)]

    def train_dataloader(self):
        return DataLoader(self.parts[0], batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], batch_size=64)

    def test_dataloader(self):
        return DataLoader(self.parts[2], batch_size=64)


def study(output, **options):
    from lightning_gr.tune import tune

    return tune(Problem, Data, **{"monitor": "val_loss", "trainer": FLAGS, "output": output, **SIZE, **options})


def answer(result):
    """Return everything that must not depend on interruptions, which is all but the durations."""
    rows = [(row.label, sorted(row.values.items())) for row in result.rows]
    trials = [(t["stage"], t["method"], t["index"], t["state"], t["value"], t["constants"]) for t in result.trials]
    return repr((rows, trials))


if __name__ == "__main__":
    storage = sys.argv[2] if len(sys.argv) > 2 else None
    print(answer(study(sys.argv[1], storage=storage)))
