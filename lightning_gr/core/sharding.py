"""Tensors of which each rank holds a part: the DTensors of FSDP2 (``fully_shard``) and of tensor parallelism.

All our vector work is done on the local parts, so that no parameter is ever gathered; of a norm one number is reduced.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "by_layout",
    "is_distributed",
    "local_parts",
    "mean_over_ranks",
    "norm_over_ranks",
    "settle_gradients",
    "sum_over_ranks",
]


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    # not isinstance: some builds of torch come without torch.distributed.tensor
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What of each tensor lies on this rank, sharing its storage; all of it where it is not distributed."""
    return [tensor.to_local() if is_distributed(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def by_layout(tensors: Sequence[Tensor]) -> dict[Hashable, list[Tensor]]:
    """The tensors grouped by how they are spread over ranks; the key None stands for tensors that are not."""
    groups: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else None  # type: ignore[attr-defined]
        groups.setdefault(layout, []).append(tensor)
    return groups


def norm_over_ranks(norm: Tensor, like: Tensor) -> Tensor:
    """The norm of tensors that are spread as ``like`` is, from that of their local parts: one number is reduced."""
    if not is_distributed(like):
        return norm
    # in float64, since the square of a large norm must not overflow
    return sum_over_ranks(norm.double().square(), like).sqrt().to(norm.dtype)


def sum_over_ranks(values: Tensor, like: Tensor) -> Tensor:
    """The sums over the ranks that hold parts of ``like``; ``values`` themselves where there are none."""
    if not is_distributed(like):
        return values
    spread: Any = like
    total = values.clone()
    for dim, placement in enumerate(spread.placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(total, group=spread.device_mesh.get_group(dim))
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over all ranks of a number that each of them has."""
    # not strategy.reduce: it overwrites its argument, and sends a barrier besides
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def settle_gradients(params: Sequence[Tensor]) -> None:
    """Sum up gradients whose summands still lie on several ranks (sequence parallel layers leave such ones)."""
    for param in params:
        grad: Any = param.grad
        if grad is not None and is_distributed(grad) and any(place.is_partial() for place in grad.placements):
            param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
