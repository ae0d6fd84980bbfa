"""Search for gamma and epsilon with Optuna, which prunes unpromising trials: `python examples/optuna_search.py`.

Needs `pip install optuna optuna-integration lightning`. The data are digits with 20% random training labels. Constants
are selected on a validation split, and the best ones are compared with plain training on a test split.
"""

import argparse
import logging
import warnings

import lightning.pytorch as pl
import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import GradientRegularization


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def digits():
    """A training, a validation and a test split."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = order[:500], order[500:900], order[900:]
    noisy = labels.clone()
    noisy[train[:100]] = torch.randint(10, (100,), generator=torch.Generator().manual_seed(1))
    return [TensorDataset(images[part], noisy[part]) for part in (train, validation, test)]


def accuracy(callbacks, train, validation, epochs):
    pl.seed_everything(0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", enable_model_summary=False, **options
    )
    trainer.fit(Classifier(), DataLoader(train, batch_size=50, shuffle=True), DataLoader(validation, 1000))
    return trainer.callback_metrics["accuracy"].item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    train, validation, test = digits()

    def objective(trial):
        gamma = trial.suggest_float("gamma", 0.01, 2.0, log=True)
        epsilon = trial.suggest_float("epsilon", 0.05, 1.0, log=True)
        callbacks = [
            GradientRegularization(gamma, epsilon),
            PyTorchLightningPruningCallback(trial, monitor="accuracy"),
        ]
        return accuracy(callbacks, train, validation, args.epochs)

    sampler = optuna.samplers.TPESampler(seed=0)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=args.epochs // 4)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=args.trials)
    stopped = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    best = study.best_params
    print(
        f"{args.trials} trials, {stopped} stopped early; best gamma {best['gamma']:.3f} epsilon {best['epsilon']:.3f}"
    )
    for name, callbacks in (("plain", []), ("best", [GradientRegularization(**best)])):
        print(f"{name:6} test accuracy {accuracy(callbacks, train, test, args.epochs):.3f}")
    print("A fifth of the training labels are wrong. The constants were selected on validation images, not on these.")


if __name__ == "__main__":
    main()
