"""Logs values through Lightning, and keeps the first, last, smallest and largest of each."""

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
    """What a value went through, on the device."""

    first: Tensor
    last: Tensor
    low: Tensor
    high: Tensor


class StepLog:
    """Logs values through ``self.log`` and keeps their ranges.

    Args:
        prefix: What all keys begin with.
        in_bar: Names that go to the progress bar, too.

    Raises:
        ValueError: If ``prefix`` is no string.
    """

    def __init__(self, prefix: str, in_bar: Sequence[str] = ()) -> None:
        if not isinstance(prefix, str):
            raise ValueError(f"Expected argument `prefix` to be a string but got {prefix!r}")
        self.prefix, self.in_bar = prefix, tuple(in_bar)
        self.ranges: dict[str, Range] = {}
        self._logged: set[str] = set()

    @torch.no_grad()
    def log(
        self, trainer: "Trainer", pl_module: "LightningModule", values: Mapping[str, Tensor], own: Iterable[str] = ()
    ) -> None:
        """Log 0-dimensional tensors; those named in ``own`` are first averaged over the ranks, all in one all-reduce.

        Each rank must have the same names.
        """
        values = dict(values)
        together = [name for name in own if name in values]
        if together and trainer.world_size > 1:
            mean = mean_over_ranks(torch.stack([values[name] for name in together]))
            values |= dict(zip(together, mean, strict=True))
        for name, value in values.items():
            first, _, low, high = self.ranges.get(name, (value,) * 4)
            self.ranges[name] = Range(first, value, torch.fmin(low, value), torch.fmax(high, value))
        forget_logged(trainer, self._logged - {self.prefix + name for name in values})
        for name, value in values.items():
            shown = name.rpartition("/")[2] in self.in_bar
            pl_module.log(self.prefix + name, value, on_step=True, on_epoch=False, prog_bar=shown, batch_size=1)
            self._logged.add(self.prefix + name)
