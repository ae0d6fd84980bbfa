"""Locates the boundaries of accumulation windows, the micro-batches of one optimizer step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["is_window_end", "is_window_start"]


def is_window_start(trainer: "Trainer", batch_idx: int) -> bool:
    """Whether this is the first micro-batch after an optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def is_window_end(trainer: "Trainer", batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch. The last window of an epoch may be shorter."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches or trainer.is_last_batch
