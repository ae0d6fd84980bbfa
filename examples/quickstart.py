"""The smallest complete program: digits, a LightningModule and one callback. Run `python examples/quickstart.py`.

100 of the 500 training labels are wrong. The network memorizes them in plain training, which costs accuracy on the
validation images, whose labels are right. The callback prevents most of that at the price of one pass per step.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import MomentumSAM


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits():
    """500 training images, 100 of them with random labels, and 1,297 validation images."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    labels[:100] = torch.randint(10, (100,), generator=torch.Generator().manual_seed(0))
    return TensorDataset(images[:500], labels[:500]), TensorDataset(images[500:], labels[500:])


def fit(callbacks):
    """Train for 60 epochs and return the validation accuracy."""
    pl.seed_everything(0)
    train, validation = digits()
    trainer = pl.Trainer(
        max_epochs=60,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), DataLoader(train, 64, shuffle=True), DataLoader(validation, 1297))
    return trainer.callback_metrics["accuracy"].item()


def main():
    plain, regularized = fit(callbacks=[]), fit(callbacks=[MomentumSAM(rho=2)])
    print(f"validation accuracy: {plain:.3f} without the callback, {regularized:.3f} with it")
    print("A fifth of the training labels are wrong: without the callback, the network memorizes more of them.")


if __name__ == "__main__":
    main()
