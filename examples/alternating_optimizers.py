"""Two alternating optimizers, one of them with SAM: `python examples/alternating_optimizers.py [--epochs 20]`."""

import argparse

import pytorch_lightning as pl
import torch
from plain_loop import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import SAM, GradientRegularizationMixin


class Alternating(GradientRegularizationMixin, pl.LightningModule):
    """SGD trains the backbone and Adam trains the head, in alternating steps. Only the backbone is regularized."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        backbone, head = self.optimizers()
        optimizer, rule = (backbone, "trainer") if batch_idx % 2 == 0 else (head, None)
        with optimizer.toggle_model():
            loss = self.regularized_step(
                optimizer, lambda: nn.functional.cross_entropy(self(images), labels), rule=rule, gradient_clip_val=1.0
            )
        self.log("loss", loss)
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()

    def configure_optimizers(self):
        backbone = torch.optim.SGD(self.backbone.parameters(), lr=0.05, momentum=0.9)
        head = torch.optim.Adam(self.head.parameters(), lr=1e-3)
        return [backbone, head], [torch.optim.lr_scheduler.ExponentialLR(backbone, 0.95)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    images, labels, test_images, test_labels = digits()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    for name, callbacks in {"plain": [], "regularized": [SAM(rho=0.2)]}.items():
        pl.seed_everything(0)
        module = Alternating()
        trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True))
        accuracy = (module(test_images).argmax(1) == test_labels).float().mean()
        print(f"{name}: test accuracy {accuracy:.3f}")
    print("Only every other step, and only the backbone, is regularized: this shows how, and the gain is small.")


if __name__ == "__main__":
    main()
