"""The digits of `lightning-gr demo`: `cd examples/tune && lightning-gr tune --config digits.yaml`.

500 images for training, 20% of them with random labels; 400 for validation and 897 for the test, all labels clean.
"""

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr.cli.demo.task import Digits, DigitsModule


class NoisyDigits(DigitsModule):
    """The demonstration's MLP, which also validates and tests."""

    def __init__(self, epochs: int = 60):
        super().__init__(epochs)
        self.save_hyperparameters()

    def _accuracy(self, batch):
        images, labels = batch
        return (self.net(images).argmax(1) == labels).float().mean()

    def validation_step(self, batch):
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels))
        self.log("val_acc", self._accuracy(batch))

    def test_step(self, batch):
        self.log("test_acc", self._accuracy(batch))


class DigitsData(pl.LightningDataModule):
    """One split into training and validation images for all trainings."""

    def __init__(self, split: int = 0):
        super().__init__()
        self.digits = Digits.load(split)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.digits.train), batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.digits.validation), batch_size=400)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*self.digits.test), batch_size=897)
