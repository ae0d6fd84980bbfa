"""The models of ``gpu.py``, of the sizes that users train on one GPU, and the same in miniature to try the program."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from workloads import WORKLOADS, Block, Workload, make_mlp

__all__ = ["LARGE", "TINY"]


def make_resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for 32 × 32 images: four stages of two blocks, 11 M parameters with width 64."""
    widths = [width * factor for factor in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Block(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def _encoder(width: int, heads: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class ViT(nn.Module):
    """A vision transformer that averages over patches; with the default sizes ViT-S/16 with 22 M parameters."""

    def __init__(
        self, size: int = 224, patch: int = 16, width: int = 384, heads: int = 6, depth: int = 12, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.encoder = _encoder(width, heads, depth)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(1))


class TextTransformer(nn.Module):
    """A transformer that predicts a token at each position; 100 M parameters with the default sizes."""

    def __init__(
        self, length: int = 512, width: int = 768, heads: int = 12, depth: int = 12, tokens: int = 10_000
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.encoder = _encoder(width, heads, depth)
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.head(self.encoder(self.embedding(tokens) + self.positions))
        return found.transpose(1, 2)  # classes in the second dimension, as cross_entropy expects


def _images(batch: int, size: int, classes: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, 3, size, size), torch.randint(classes, (batch,)))


def _text(batch: int, length: int, tokens: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(tokens, (batch, length)), torch.randint(tokens, (batch, length)))


LARGE = {
    "MLP": WORKLOADS["MLP, 256"],
    "ResNet-18": Workload(make_resnet18, _images(128, 32, 10)),
    "ViT-S": Workload(ViT, _images(64, 224, 1000)),
    "100 M": Workload(TextTransformer, _text(8, 512, 10_000)),
}
TINY = {
    "MLP": Workload(lambda: make_mlp(32, 64, 10), lambda: (torch.randn(8, 32), torch.randint(10, (8,)))),
    "ResNet-18": Workload(lambda: make_resnet18(4), _images(4, 16, 10)),
    "ViT-S": Workload(lambda: ViT(32, 16, 16, 2, 2, 10), _images(4, 32, 10)),
    "100 M": Workload(lambda: TextTransformer(8, 16, 2, 2, 20), _text(4, 8, 20)),
}
