"""Sharded tensors: the DTensors of FSDP2 (``fully_shard``) and of tensor parallelism.

All vector operations run on the local shards, so no parameter is ever gathered. A norm reduces a single number.
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
    """This rank's shard of each tensor, sharing its storage; the tensor itself if it is not distributed."""
    return [tensor.to_local() if is_distributed(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def by_layout(tensors: Sequence[Tensor]) -> dict[Hashable, list[Tensor]]:
    """Group tensors by how they are distributed over ranks. The key for tensors that are not is None."""
    groups: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else None  # type: ignore[attr-defined]
        groups.setdefault(layout, []).append(tensor)
    return groups


def norm_over_ranks(norm: Tensor, like: Tensor) -> Tensor:
    """Combine the norms of local shards into the norm of tensors distributed like ``like``. Reduces one number."""
    if not is_distributed(like):
        return norm
    # in float64, so that the square of a large norm does not overflow
    return sum_over_ranks(norm.double().square(), like).sqrt().to(norm.dtype)


def sum_over_ranks(values: Tensor, like: Tensor) -> Tensor:
    """Sum ``values`` over the ranks that share ``like``; return them unchanged if it is not distributed."""
    if not is_distributed(like):
        return values
    distributed: Any = like
    total = values.clone()
    for dim, placement in enumerate(distributed.placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(total, group=distributed.device_mesh.get_group(dim))
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average ``value`` over all ranks, without changing it."""
    # not strategy.reduce, which overwrites its argument and also sends a barrier
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def settle_gradients(params: Sequence[Tensor]) -> None:
    """Reduce partial gradients, which sequence-parallel layers leave spread over ranks as unreduced sums."""
    for param in params:
        grad: Any = param.grad
        if grad is not None and is_distributed(grad) and any(place.is_partial() for place in grad.placements):
            param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
