"""The smallest complete program: digits, a LightningModule and one callback. Run `python examples/quickstart.py`."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_gr import GradientRegularization


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main():
    pl.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16
    train, validation = random_split(TensorDataset(images, torch.tensor(labels)), [1200, len(images) - 1200])
    trainer = pl.Trainer(
        max_epochs=20,
        callbacks=[GradientRegularization(gamma=0.1, epsilon=0.05)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=600))
    print(f"validation accuracy: {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
