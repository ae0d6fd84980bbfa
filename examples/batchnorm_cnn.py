"""A convolutional network with BatchNorm, trained without and with each method: `python examples/batchnorm_cnn.py`.

The data are digits of 8 × 8 pixels with 20% random training labels. BatchNorm's statistics come from the clean passes
only: each batch is counted once, as the last column shows.
"""

import argparse
import logging

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import SAM, Flooding, GradientRegularization

METHODS = {
    "plain": lambda: [],
    "F-GR": lambda: [GradientRegularization(gamma=0.1, epsilon=0.05)],
    "SAM": lambda: [SAM(rho=0.05, warmup_steps=100)],
    "flooding": lambda: [Flooding(level=0.8)],
}


class CNN(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def digits():
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:500], order[500:]
    noisy = labels[train].clone()
    noisy[:100] = torch.randint(10, (100,), generator=torch.Generator().manual_seed(1))
    return TensorDataset(images[train], noisy), TensorDataset(images[test], labels[test])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    train, test = digits()
    for name, make in METHODS.items():
        pl.seed_everything(0)
        model, callbacks = CNN(), make()
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_epochs=args.epochs, callbacks=callbacks, accelerator="cpu", enable_model_summary=False, **options
        )
        trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
        accuracy = trainer.test(model, DataLoader(test, 1297), verbose=False)[0]["accuracy"]
        counted = int(model.net[1].num_batches_tracked)
        print(f"{name:9} test accuracy {accuracy:.3f}   steps {trainer.global_step}   batches counted {counted}")
    print("The last two columns agree: second passes leave BatchNorm's statistics alone. Of 1,297 test images,")
    print("about a point is noise. `lightning-gr demo` compares methods over several seeds.")


if __name__ == "__main__":
    main()
