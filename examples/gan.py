"""A GAN on handwritten digits with a regularized discriminator, in manual optimization.

Run it with `python examples/gan.py [--picture samples.png]`, or with `--devices 2` for two processes. It prints how
close the samples are to real digits, before and after training: the mean distance to the nearest real digit, and the
number of distinct nearest digits (which is small for a GAN that always draws the same one).
"""

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gr import GradientRegularization, GradientRegularizationMixin

NOISE = 16


def real_digits() -> Tensor:
    """1,797 images of 8 × 8 pixels with values from −1 to 1."""
    return torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)


def network(inputs: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    hidden = [nn.Linear(inputs, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(256, outputs), *last)


class GAN(GradientRegularizationMixin, pl.LightningModule):
    """The GAN of Goodfellow et al. (2014) with the non-saturating loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = network(NOISE, 64, nn.Tanh()), network(64, 1)

    def training_step(self, batch):
        (real,) = batch
        generator, discriminator = self.optimizers()
        noise = torch.randn(len(real), NOISE, device=self.device)
        fake = self.generator(noise).detach()
        with discriminator.toggle_model():
            d_loss = self.regularized_step(discriminator, lambda: self.discriminator_loss(real, fake))
        with generator.toggle_model():
            g_loss = self.regularized_step(generator, lambda: self.generator_loss(noise), rule=None)  # plain
        self.log_dict({"d_loss": d_loss, "g_loss": g_loss}, prog_bar=True)

    def discriminator_loss(self, real, fake):
        softplus = nn.functional.softplus
        return (softplus(-self.discriminator(real)) + softplus(self.discriminator(fake))).mean()

    def generator_loss(self, noise):
        return nn.functional.softplus(-self.discriminator(self.generator(noise))).mean()

    def configure_optimizers(self):
        options = {"lr": 5e-4, "betas": (0.5, 0.99)}
        return [torch.optim.Adam(net.parameters(), **options) for net in (self.generator, self.discriminator)]

    @torch.no_grad()
    def samples(self, count):
        return self.generator(torch.randn(count, NOISE, generator=torch.Generator().manual_seed(0)))


def quality(samples: Tensor) -> str:
    nearest = torch.cdist(samples, real_digits()).min(1)
    return f"distance {nearest.values.mean():.2f}, {len(nearest.indices.unique())} distinct nearest digits"


def draw(path: str, before: Tensor, after: Tensor) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.3))
    columns = {"before training": before, "after training": after, "real digits": real_digits()}
    for axis, (title, images) in zip(axes, columns.items(), strict=True):
        framed = nn.functional.pad(images[:64].view(8, 8, 8, 8), (1, 1, 1, 1), value=-1)
        grid = framed.transpose(1, 2).reshape(80, 80)
        axis.imshow(grid, cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--gamma", type=float, default=0.05, help="penalty strength for the discriminator; 0 is plain")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--picture", help="image file for samples before and after training")
    args = parser.parse_args()
    pl.seed_everything(0)
    module, data = GAN(), TensorDataset(real_digits())
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[GradientRegularization(gamma=args.gamma, epsilon=0.05)],
        accelerator="cpu",
        devices=args.devices,
        # the networks alternate, so each backward pass leaves the other network's parameters unused
        strategy="ddp_find_unused_parameters_true" if args.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = module.samples(256)
    trainer.fit(module, DataLoader(data, batch_size=128 // args.devices, shuffle=True, drop_last=True))
    after = module.samples(256)
    total = sum(p.detach().double().abs().sum() for p in module.parameters())
    print(f"rank {trainer.global_rank}: absolute weights sum up to {total:.12f}")
    if trainer.is_global_zero:
        print(f"before: {quality(before)}\nafter: {quality(after)}")
        print("A smaller distance and more distinct digits are better. The penalty keeps the discriminator smooth.")
        if args.picture:
            draw(args.picture, before, after)


if __name__ == "__main__":
    main()
