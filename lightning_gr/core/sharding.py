"""Sharded tensors: the DTensors of FSDP2 (``fully_shard``) and of tensor parallelism, and the plain ones of FSDP1.

All vector operations run on the local shards, so no parameter is ever gathered. A norm reduces a single number.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "SideGroup",
    "by_layout",
    "is_distributed",
    "is_initialized",
    "local_parts",
    "mean_over_ranks",
    "norm_over_ranks",
    "plain_are_shards",
    "settle_gradients",
    "shards_over",
    "sum_of_shards",
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


def is_initialized() -> bool:
    """Whether there are other processes to communicate with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


_shards: ContextVar[tuple[Any, torch.device] | None] = ContextVar("_shards", default=None)


@contextmanager
def shards_over(group: Any, device: torch.device) -> Iterator[None]:
    """A context manager in which plain tensors are parts of longer ones, each rank of ``group`` with its own.

    FSDP1 leaves parameters and gradients as such parts, which do not say so themselves. A rank may have none of them.

    Args:
        group: The process group; None if the tensors are whole.
        device: The device of its collectives.
    """
    token = _shards.set(None if group is None else (group, device))
    try:
        yield
    finally:
        _shards.reset(token)


def plain_are_shards() -> bool:
    """Whether plain tensors are parts at the moment, see :func:`shards_over`."""
    return _shards.get() is not None


def sum_of_shards(values: Tensor) -> Tensor:
    """Sum ``values`` over the ranks that share plain tensors; return them unchanged if these are whole."""
    shards = _shards.get()
    if shards is None:
        return values
    # in float64, since a rank without a part does not know the type of the others
    total = values.to(shards[1], torch.float64).clone()
    torch.distributed.all_reduce(total, group=shards[0])
    return total.to(values)


def by_layout(tensors: Sequence[Tensor]) -> dict[Hashable, list[Tensor]]:
    """Group tensors by how they are distributed over ranks. The key for tensors that are not is None."""
    groups: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if is_distributed(tensor) else None  # type: ignore[attr-defined]
        groups.setdefault(layout, []).append(tensor)
    return groups


def norm_over_ranks(norm: Tensor, like: Tensor) -> Tensor:
    """Combine the norms of local shards into the norm of tensors distributed like ``like``. Reduces one number."""
    if not is_distributed(like) and not plain_are_shards():
        return norm
    # in float64, so that the square of a large norm does not overflow
    return sum_over_ranks(norm.double().square(), like).sqrt().to(norm.dtype)


def sum_over_ranks(values: Tensor, like: Tensor) -> Tensor:
    """Sum ``values`` over the ranks that share ``like``; return them unchanged if it is not distributed."""
    if not is_distributed(like):
        return sum_of_shards(values)
    distributed: Any = like
    # not where the shards are, if they are offloaded to the CPU, for which there may be no backend
    total = values.to(distributed.device_mesh.device_type).clone()
    for dim, placement in enumerate(distributed.placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(total, group=distributed.device_mesh.get_group(dim))
    return total.to(values.device)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average ``value`` over all ranks, without changing it."""
    # not strategy.reduce, which overwrites its argument and also sends a barrier
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


class SideGroup:
    """A process group of its own, whose reductions are in step even where those of DDP are not.

    A rank that has a batch less runs one forward pass less, and so DDP sends its buffers, or rearranges its buckets, at
    another moment there. All ranks must create it together, and then call its methods equally often.

    Args:
        device: The device of the process group's collectives.
        name: What it is for. The process group is kept for the next one of that name, since one that is given back on
            one rank breaks what others are still doing.
    """

    _groups: ClassVar[dict[str, tuple[Any, Any]]] = {}

    def __init__(self, device: torch.device, name: str) -> None:
        world = torch.distributed.group.WORLD
        if self._groups.get(name, (None, None))[0] is not world:
            self._groups[name] = world, torch.distributed.new_group()
        self._group, self._device = self._groups[name][1], device
        self._absent: list[Any] = []

    def mean_over_present(self, value: Tensor) -> Tensor:
        """Average a 0-dimensional tensor over the ranks that have one, in float64, and wait for it."""
        total = torch.stack([value.detach().to(self._device, torch.float64), self._numbers(1.0)[0]])
        torch.distributed.all_reduce(total, group=self._group)
        self._absent = []  # earlier reductions are done
        return total[0] / total[1]

    def be_absent(self) -> None:
        """Take part in :meth:`mean_over_present` of other ranks without a value, and without waiting for them."""
        total = self._numbers(0.0, 0.0)
        self._absent.append((total, torch.distributed.all_reduce(total, group=self._group, async_op=True)))

    def agree(self, number: int) -> Callable[[], bool]:
        """Return a function that waits and tells whether all ranks have called this with the same number."""
        both = self._numbers(number, -number)
        work = torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)

        def agreed() -> bool:
            work.wait()
            high, low = both.tolist()
            return bool(high == -low)

        return agreed

    def _numbers(self, *numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self._device)


def settle_gradients(params: Sequence[Tensor]) -> None:
    """Reduce partial gradients, which sequence-parallel layers leave spread over ranks as unreduced sums."""
    for param in params:
        grad: Any = param.grad
        if grad is not None and is_distributed(grad) and any(place.is_partial() for place in grad.placements):
            param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
