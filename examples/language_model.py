"""A small character-level transformer, trained on Python's documentation: `python examples/language_model.py`.

It uses Adam with a learning-rate warm-up, so the penalty is also warmed up. Embeddings and norms are excluded from it.
The text is that of `help("topics")`, which is part of Python. The example prints the bits per character on held-out
text before and after training, without and with regularization.
"""

import argparse
import logging
import math
from pydoc_data.topics import topics

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_gr import GradientRegularization

CONTEXT = 64


class Windows(Dataset):
    """Windows of CONTEXT characters and the character that follows each of them."""

    def __init__(self, codes):
        self.codes = codes

    def __len__(self):
        return (len(self.codes) - 1) // CONTEXT

    def __getitem__(self, index):
        window = self.codes[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class LanguageModel(pl.LightningModule):
    def __init__(self, characters, width=64, steps=100):
        super().__init__()
        self.steps = steps
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)

    def loss(self, batch):
        inputs, targets = batch
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
        hidden = self.blocks(self.embedding(inputs) + self.position, mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())

    def training_step(self, batch):
        return self.loss(batch)

    def test_step(self, batch):
        self.log("bits", self.loss(batch) / math.log(2))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, self.steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run(callbacks, train, validation, characters, epochs):
    pl.seed_everything(0)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = LanguageModel(characters, steps=epochs * len(loader))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", enable_model_summary=False, **options
    )
    before = trainer.test(model, DataLoader(validation, 64), verbose=False)[0]["bits"]
    trainer.fit(model, loader)
    after = trainer.test(model, DataLoader(validation, 64), verbose=False)[0]["bits"]
    return before, after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--characters", type=int, default=50_000, help="length of the text to use")
    args = parser.parse_args()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    text = "\n".join(topics[name] for name in sorted(topics))[: args.characters]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    split = int(0.9 * len(codes))
    data = Windows(codes[:split]), Windows(codes[split:])
    print(f"{len(codes):,} characters, {len(alphabet)} distinct; bits per character on the held-out tenth:")
    penalty = GradientRegularization(
        gamma=0.01, epsilon=0.05, warmup_steps=50, exclude=["embedding.*", "position", "*norm*"]
    )
    for name, callbacks in (("plain", []), ("regularized", [penalty])):
        before, after = run(callbacks, *data, len(alphabet), args.epochs)
        print(f"{name:12} before {before:.3f}   after {after:.3f}")
    print("Lower is better. A small model does not overfit in a few epochs, so expect no gain from the penalty: the")
    print("example shows the settings for Adam with a warm-up.")


if __name__ == "__main__":
    main()
