"""Train on digits with noisy labels, without and with regularization, to see the logs, tables and plots.

Run it with ``python examples/see_it.py``. It needs scikit-learn and matplotlib (``pip install -e '.[demo]'``) and takes
about half a minute on two cores. It prints the panel and the table for F-GR, and writes the logs of each run,
``runs.png`` (as drawn by ``lightning-gr plot``) and ``slices.png`` to ``outputs/see_it``.
"""

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import SAM, GradientNormMonitor, GradientRegularization, SharpnessMonitor
from lightning_gr.cli.demo.task import Digits, DigitsModule
from lightning_gr.report.plotting import run_plot
from lightning_gr.slices import loss_slice, plot_slices

METHODS = {
    "plain": lambda: GradientNormMonitor(prefix="gr/"),
    "F-GR": lambda: GradientRegularization(gamma=1.0, epsilon=0.5, metrics="all"),
    "SAM": lambda: SAM(rho=0.5, metrics="all", verbose=False),
}


class Classifier(DigitsModule):
    """The demo's MLP, which also logs its training loss and its accuracy on clean images."""

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        images, labels = batch
        self.log("test_acc", (self.net(images).argmax(1) == labels).float().mean(), batch_size=len(labels))


def fit(name, data, epochs, folder):
    """Train with one method and return the module."""
    torch.manual_seed(0)
    module = Classifier(epochs)
    loader = DataLoader(TensorDataset(*data.train), batch_size=64, shuffle=True)
    held_out = DataLoader(TensorDataset(*data.test), batch_size=len(data.test[0]))
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(folder, name, version=""),
        callbacks=[METHODS[name](), SharpnessMonitor(every_n_epochs=5, trace=False)],
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_checkpointing=False,
    ).fit(module, loader, held_out)
    return module


def main(epochs, folder):
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*srun.*|.*treespec.*|.*already exists.*")
    data = Digits.load(0)
    modules = {name: fit(name, data, epochs, folder) for name in METHODS}
    run_plot([folder / name for name in METHODS], folder / "runs.png", smooth=5)
    images, labels = data.train
    slices = {
        name: loss_slice(lambda net=module.net: nn.functional.cross_entropy(net(images), labels), module, radius=3.0)
        for name, module in modules.items()
    }
    plot_slices(slices, folder / "slices.png")
    print(f"Figures: {folder / 'runs.png'} and {folder / 'slices.png'}")
    print("Plain training has the lowest training loss, since it memorizes wrong labels, and the largest eigenvalue.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("outputs", "see_it"))
    args = parser.parse_args()
    main(args.epochs, args.output)
