"""Fine-tune a pretrained network without perturbing its backbone: `python examples/finetuning.py`.

The backbone learns the digits 0 to 4 from many images. Then a new head and, with a small learning rate, the backbone
learn 5 to 9 from only 50. `exclude=["backbone.*"]` perturbs and regularizes only the head, which keeps the pretrained
weights out of the ascent step. Each line is the mean over five random choices of the 50 images.
"""

import argparse
import copy
import logging
import statistics

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import SAM

METHODS = {
    "plain": lambda: [],
    "SAM": lambda: [SAM(rho=0.2)],
    "SAM, head only": lambda: [SAM(rho=0.2, exclude=["backbone.*"])],
}


class Classifier(pl.LightningModule):
    def __init__(self, backbone=None, backbone_rate=0.05):
        super().__init__()
        self.backbone = backbone or nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.backbone_rate = backbone_rate
        self.head = nn.Linear(64, 5)

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.backbone(images)), labels)

    def test_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.head(self.backbone(images)).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        groups = [
            {"params": self.backbone.parameters(), "lr": self.backbone_rate},
            {"params": self.head.parameters()},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def train(model, data, epochs, callbacks=()):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", enable_model_summary=False, **options
    )
    trainer.fit(model, DataLoader(data, batch_size=25, shuffle=True))
    return trainer


def finetuned_accuracy(backbone, images, labels, seed, epochs, callbacks):
    pl.seed_everything(seed)
    order = torch.randperm(len(images))
    few, rest = order[:50], order[50:]
    model = Classifier(copy.deepcopy(backbone), backbone_rate=0.005)
    trainer = train(model, TensorDataset(images[few], labels[few]), epochs, callbacks)
    test = DataLoader(TensorDataset(images[rest], labels[rest]), len(rest))
    return trainer.test(model, test, verbose=False)[0]["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    known, new = labels < 5, labels >= 5
    pl.seed_everything(0)
    pretrained = Classifier()
    train(pretrained, TensorDataset(images[known], labels[known]), epochs=10)
    for name, make in METHODS.items():
        data = images[new], labels[new] - 5
        accuracies = [finetuned_accuracy(pretrained.backbone, *data, seed, args.epochs, make()) for seed in range(5)]
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        print(f"{name:15} accuracy on 5 to 9 from 50 images: {mean:.3f} ± {spread:.3f}")
    print("± is the standard deviation over five choices of the 50 images. Smaller differences say nothing.")


if __name__ == "__main__":
    main()
