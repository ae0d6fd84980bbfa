"""Several ranks of one study: rank 0 asks, and all ranks hear."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_gr.tune.space import TuneError

__all__ = ["is_rank_zero", "shared"]

T = TypeVar("T")


def is_rank_zero() -> bool:
    """Whether this process is the one that asks; also before Lightning has started the others."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def shared(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, on all ranks; a :class:`~lightning_gr.tune.TuneError` is raised on all."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:  # all ranks must hear of it, or they would wait
            box[1] = f"{error}"
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise TuneError(box[1])
    result: T = box[0]
    return result
