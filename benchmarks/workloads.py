"""The models of ``step_cost.py`` and their batches, small enough for a CPU."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["WORKLOADS", "Workload", "make_mlp"]


class Workload(NamedTuple):
    """Factories for a model and for a batch (x, y) with class labels y."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def make_resnet() -> nn.Module:
    """ResNet-14 for 32 × 32 images: three stages of two blocks, 0.17 M parameters."""
    widths = [16, 16, 16, 32, 32, 64, 64]
    blocks = [Block(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Transformer(nn.Module):
    """A two-layer encoder with dropout and width 128 that classifies the last token; 0.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens))[:, -1])


class Deep(nn.Module):
    """Many tiny tensors: ``tensors``/2 residual layers of width ``width``."""

    def __init__(self, tensors: int = 1000, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(tensors // 2))

    def forward(self, x: Tensor) -> Tensor:
        alpha = 1 / len(self.layers)
        for layer in self.layers:
            x = torch.add(x, layer(x), alpha=alpha)
        return x


def make_mlp(*sizes: int) -> nn.Module:
    """An MLP with ReLU between linear layers of these sizes."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _vectors(batch: int, features: int, classes: int = 10) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, features), torch.randint(classes, (batch,)))


WORKLOADS = {
    "MLP, 32": Workload(lambda: make_mlp(784, 1000, 1000, 10), _vectors(32, 784)),
    "MLP, 256": Workload(lambda: make_mlp(784, 1000, 1000, 10), _vectors(256, 784)),
    "ResNet": Workload(make_resnet, lambda: (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))),
    "transformer": Workload(Transformer, lambda: (torch.randint(1000, (16, 64)), torch.randint(1000, (16,)))),
    "1,000 tensors": Workload(Deep, _vectors(16, 8, 8)),
    "100 M": Workload(lambda: make_mlp(*[4096] * 7), _vectors(2, 4096, 4096)),
}
