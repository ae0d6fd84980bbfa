"""Lists of tensors taken as one vector: inner products and random vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inner_product", "random_signs", "random_unit", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def inner_product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """⟨x, y⟩ as a 0-dimensional tensor on the first one's device, accumulated in float32 at least.

    Needs room for the product of one pair of tensors; there is no foreach operator for it. Complex tensors count as
    pairs of real ones.

    Example::

        >>> inner_product([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
        tensor(8.)
    """
    products = [(wide(x) * wide(y).conj()).sum().real for x, y in zip(xs, ys, strict=True)]
    home = products[0].device
    return torch.stack([product.to(home, non_blocking=True) for product in products]).sum()


def random_signs(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A vector of independent +1 and −1 (Rademacher) of the shapes of ``like``."""
    drawn = [torch.randint(2, x.shape, generator=generator, device=generator.device) for x in like]
    return [(2 * d - 1).to(x.device, wide(x).dtype) for d, x in zip(drawn, like, strict=True)]


def random_unit(like: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A vector of length 1 in a uniformly random direction, of the shapes of ``like``."""
    drawn = [torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32) for x in like]
    vector = [d.to(x.device, wide(x).dtype) for d, x in zip(drawn, like, strict=True)]
    torch._foreach_mul_(vector, 1.0 / float(inner_product(vector, vector)) ** 0.5)
    return vector
