# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Tutorial: from plain training to flat minima
#
# **In short.** One callback raises the test accuracy of a small classifier whose training labels are partly wrong by
# about 7 points. This tutorial trains without and with callbacks, reads what they log, chooses a constant on validation
# data, and resumes from a checkpoint. It takes about a minute on a CPU and downloads nothing.
#
# It is a Python program, `examples/tutorial.py`: run it as it is (`python examples/tutorial.py`), or open it as a
# notebook in Jupyter (`pip install jupytext`, then `jupytext --to ipynb examples/tutorial.py`).
#
# ```bash
# pip install -e '.[demo]'
# ```

# %%
import csv
import logging
import warnings
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import GradientNormMonitor, GradientRegularization, MomentumSAM

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)  # more threads slow down a network as small as this one
folder = Path(mkdtemp())

# %% [markdown]
# ## Data and module
#
# scikit-learn's 1,797 handwritten digits of 8 × 8 pixels: 500 for training, 400 for validation, 897 for testing. 100 of
# the 500 training labels are replaced by random ones, which a network of this size can memorize. The module is
# ordinary: it knows nothing of regularization.

# %%
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16 - 0.3, torch.tensor(labels)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, validation, test = (TensorDataset(images[part], labels[part]) for part in order.split([500, 400, 897]))
train.tensors[1][:100] = torch.randint(10, (100,), generator=torch.Generator().manual_seed(1))


class Classifier(pl.LightningModule):
    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs
        self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def test_step(self, batch):
        x, y = batch
        self.log("test_accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


# %% [markdown]
# ## Plain, F-GR and Momentum-SAM
#
# The function below trains once with the callbacks that it is given. Nothing else differs between the three runs: same
# initial weights, same batches, same optimizer.
#
# - `GradientRegularization(gamma, epsilon)`, *F-GR*, computes a second gradient at θ + ε ∇L and penalizes (γ/2)‖∇L‖². A
#   step takes two passes.
# - `MomentumSAM(rho)` computes its only gradient at a point ahead along the optimizer's momentum. A step takes one
#   pass.
# - `GradientNormMonitor` only logs the gradient norm, for comparison.


# %%
def fit(name, *callbacks, epochs=60, checkpoint=None):
    """Train with ``callbacks`` and return the Trainer, which has the module, its accuracy and the folder of its log."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=pl.loggers.CSVLogger(folder, name, version=""),
        log_every_n_steps=4,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(train, batch_size=64, shuffle=True)
    trainer.fit(Classifier(60), loader, DataLoader(validation, 1000), ckpt_path=checkpoint)
    return trainer


def test_accuracy(trainer):
    """The accuracy on the 897 test images, in percent."""
    (scores,) = trainer.test(trainer.lightning_module, DataLoader(test, 1000), verbose=False)
    return 100 * scores["test_accuracy"]


runs = {
    "plain": fit("plain", GradientNormMonitor(prefix="gr/")),
    "F-GR": fit("F-GR", GradientRegularization(gamma=1.0, epsilon=0.5, metrics="all")),
    "Momentum-SAM": fit("Momentum-SAM", MomentumSAM(rho=2.0, metrics="all")),
}
for name, trainer in runs.items():
    print(f"{name:14} test accuracy {test_accuracy(trainer):.1f}%")

# %% [markdown]
# Both methods gain several points. This is one seed; `lightning-gr demo` repeats the comparison with three.
#
# ## Reading the metrics
#
# The callbacks log through `self.log`, so the values reach every Lightning logger. Here, a CSV file:


# %%
def column(name, key):
    """The steps and values of one metric of a run."""
    with (folder / name / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]
    return zip(*rows, strict=True)


figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
for axis, key in zip(axes, ("loss", "gr/grad_norm", "accuracy"), strict=True):
    for name in runs:
        axis.plot(*column(name, key), label=name, linewidth=1)
    axis.set(title=key, xlabel="step")
axes[0].legend(frameon=False)
axes[2].set_ylim(0.8, 1.0)
figure.savefig(folder / "tutorial.png", dpi=110)

# %% [markdown]
# - **loss**: plain training ends at the lowest loss, because it memorizes wrong labels. F-GR stops above it.
#   Momentum-SAM's is the loss at the point ahead, which is higher than at the weights themselves.
# - **gr/grad_norm**: the norm of a mini-batch's gradient, which F-GR halves. Momentum-SAM's is also from the point
#   ahead.
# - **accuracy** on clean validation images: plain training peaks early and falls while it memorizes; the others stay
#   up.
#
# `metrics="all"` logs more. Two of these values tell whether a constant is in a useful range:

# %%
for key in ("gr/sharpness", "gr/alignment"):
    _, values = column("F-GR", key)
    print(f"F-GR {key:13} first {values[0]:6.3f}  last {values[-1]:6.3f}")

# %% [markdown]
# `gr/sharpness` is how much the loss rises from θ to θ + ε ∇L. If it is tiny compared with the loss, the second
# gradient is nearly the first one, and nothing is regularized. `gr/alignment` is the cosine between the two gradients:
# near 1 the step ε is short for this loss, near 0 it is too long. [Metrics](metrics.md) lists all keys, with formulas
# and units.
#
# ## Choosing a constant
#
# Try values that are about three times apart, on validation data and never on test data:

# %%
scores = {}
for rho in (0.2, 0.6, 2.0, 6.0):
    scores[rho] = 100 * fit(f"rho{rho}", MomentumSAM(rho, verbose=False)).callback_metrics["accuracy"].item()
    print(f"Momentum-SAM rho = {rho}: validation accuracy {scores[rho]:.1f}%")
best = max(scores, key=scores.get)
print(f"selected: {best}")

# %% [markdown]
# Small values do little, and one that is too large destroys training: there is a range, not a sharp optimum. With more
# than one seed per value, you see how much of a difference is noise. [Choosing constants](choosing.md) has starting
# points and ranges for each method.
#
# ## A checkpoint, and a resume
#
# Checkpoints contain the weights themselves, never displaced ones, so they load without this package. Here, training
# stops after 30 of 60 epochs and resumes:

# %%
half = fit("first half", MomentumSAM(best, verbose=False), epochs=30)
half.save_checkpoint(folder / "half.ckpt")
resumed = fit("second half", MomentumSAM(best, verbose=False), checkpoint=folder / "half.ckpt")
print(f"steps: {half.global_step} and then up to {resumed.global_step}")
print(f"test accuracy after resuming: {test_accuracy(resumed):.1f}%")

# %% [markdown]
# The resumed run is not the uninterrupted one bit for bit, because Lightning does not save random state and the loader
# shuffles differently after resuming; the cluster example shows a run that is. The callback itself needs nothing from
# the checkpoint: schedules such as `start_step` and `warmup_steps` continue from the Trainer's step.
#
# Where to go next: [schedules, exclusions, manual optimization](usage.md), [the methods](methods.md), [the command
# line](command_line.md).
