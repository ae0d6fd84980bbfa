"""Gradient regularization with Ray Train: digits, on a temporary local Ray cluster with two workers.

    pip install -e . 'ray[train]>=2.56' scikit-learn
    python examples/ray_train.py

`--engine lightning` does the same in two processes started by Lightning, and reaches the same weights, bit for bit.
"""

import argparse
import hashlib
import os
import tempfile

os.environ.setdefault(
    "RAY_USAGE_STATS_ENABLED", "0"
)  # opt out of Ray's usage reports, which must happen before the import

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_gr import GradientRegularization

try:  # Ray prefers this namespace, and its strategies only work in a Trainer from the same one
    import lightning.pytorch as pl
except ModuleNotFoundError:
    import pytorch_lightning as pl


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(epochs, callbacks=(), ckpt_path=None, **engine):
    """Train on each worker; return the final metrics and a digest of each worker's weights."""
    pl.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    training, validation = random_split(data, [1197, 600])
    regularization = GradientRegularization(gamma=0.1, epsilon=0.05, ascent_sync=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[regularization, *callbacks], accelerator="cpu", **quiet, **engine
    )
    model, loaders = Classifier(), (DataLoader(training, 32, shuffle=True), DataLoader(validation, 300))
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    digests = [None] * trainer.world_size
    torch.distributed.all_gather_object(digests, hashlib.sha256(weights.numpy()).hexdigest()[:16])
    return {name: value.item() for name, value in trainer.callback_metrics.items()}, digests


def on_ray(config):
    engine = {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()]}
    return train(config["epochs"], callbacks=[RayTrainReportCallback()], **engine)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--engine", choices=["ray", "lightning"], default="ray")
    args = parser.parse_args()
    if args.engine == "lightning":
        metrics, digests = train(args.epochs, strategy="ddp", devices=2)
    else:
        cluster = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        with tempfile.TemporaryDirectory() as folder, cluster:
            trainer = TorchTrainer(
                on_ray,
                train_loop_config={"epochs": args.epochs},
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(storage_path=folder),
            )
            metrics, digests = trainer.fit().return_value
    print(f"validation accuracy: {metrics['accuracy']:.3f}, weights of the workers: {' '.join(digests)}")
    print(
        "Equal hashes: both workers hold the same weights. The digits are clean, so plain training is as accurate here."
    )


if __name__ == "__main__":
    main()
