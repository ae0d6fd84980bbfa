"""Digits with LightningCLI, configured by flags or YAML: `python examples/cli.py fit --config=examples/cli.yaml`.

Choose a method with `--gr.gamma=0.1`, `--sam.rho=0.1` or `--flooding.level=0.1`; see `fit --help` and `fit --gr.help`.
`lightning-gr fit --model=cli.Classifier --data=cli.Digits` does the same without this file's last two lines.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_gr import GradientRegularizationCLI


class Digits(pl.LightningDataModule):
    """Handwritten digits of 8 × 8 pixels.

    Args:
        batch_size: The number of images per step.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        self.train, self.validation = random_split(data, [1200, 597], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, 597)


class Classifier(pl.LightningModule):
    """A multilayer perceptron.

    Args:
        width: The number of units in the hidden layer.
        learning_rate: The learning rate of SGD with momentum.
    """

    def __init__(self, width: int = 128, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def on_fit_end(self) -> None:
        print(f"validation accuracy {self.trainer.callback_metrics['accuracy']:.3f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


if __name__ == "__main__":
    GradientRegularizationCLI(Classifier, Digits, save_config_kwargs={"overwrite": True})
