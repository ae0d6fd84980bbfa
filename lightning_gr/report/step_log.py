"""Logs values through Lightning and keeps the first, last, smallest and largest of each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_gr._compat import forget_logged
from lightning_gr.core.sharding import mean_over_ranks

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Range", "StepLog"]


class Range(NamedTuple):
    """The first, last, smallest and largest value of a metric, as tensors on the device."""

    first: Tensor
    last: Tensor
    low: Tensor
    high: Tensor


class StepLog:
    """Logs values through ``self.log`` and keeps their ranges.

    Args:
        prefix: The prefix of all keys.
        in_bar: Names that are also shown in the progress bar.

    Raises:
        ValueError: If ``prefix`` is not a string.
    """

    def __init__(self, prefix: str, in_bar: Sequence[str] = ()) -> None:
        if not isinstance(prefix, str):
            raise ValueError(f"Expected argument `prefix` to be a string but got {prefix!r}")
        self.prefix, self.in_bar = prefix, tuple(in_bar)
        self.ranges: dict[str, Range] = {}
        self._logged: set[str] = set()

    @torch.no_grad()
    def log(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        values: Mapping[str, Tensor],
        per_rank: Iterable[str] = (),
    ) -> None:
        """Log 0-dimensional tensors, after averaging those named in ``per_rank`` over ranks in a single all-reduce.

        All ranks must pass the same names.
        """
        values = dict(values)
        names = [name for name in per_rank if name in values]
        if names and trainer.world_size > 1:
            mean = mean_over_ranks(torch.stack([values[name] for name in names]))
            values |= dict(zip(names, mean, strict=True))
        for name, value in values.items():
            first, _, low, high = self.ranges.get(name, (value,) * 4)
            self.ranges[name] = Range(first, value, torch.fmin(low, value), torch.fmax(high, value))
        forget_logged(trainer, self._logged - {self.prefix + name for name in values})
        for name, value in values.items():
            shown = name.rpartition("/")[2] in self.in_bar
            pl_module.log(self.prefix + name, value, on_step=True, on_epoch=False, prog_bar=shown, batch_size=1)
            self._logged.add(self.prefix + name)
