"""Windows of micro-batches, and the gradients of earlier ones, out of the way while a later one gets its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gr.core.sharding import local_parts
from lightning_gr.core.two_pass import Replay, Transform

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["HeldGradients", "is_window_end"]


def is_window_end(trainer: "Trainer", batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch; Lightning cuts the last window of an epoch short."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches or trainer.is_last_batch


class HeldGradients:
    """Puts ``.grad`` aside before a backward pass and adds it back when that pass's gradient has been used."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        """Whether gradients are put aside."""
        return bool(self._held)

    def put_aside(self, params: Sequence[Tensor]) -> None:
        """Leave ``params`` without gradients. Nothing is copied."""
        self._held = [(param, param.grad) for param in params if param.grad is not None]
        for param, _ in self._held:
            param.grad = None

    @torch.no_grad()
    def give_back(self) -> None:
        """Add what was put aside to ``.grad``, once."""
        both = [(param.grad, grad) for param, grad in self._held if param.grad is not None]
        if both:
            now, before = zip(*both, strict=True)
            torch._foreach_add_(local_parts(now), local_parts(before))
        for param, grad in self._held:
            param.grad = grad if param.grad is None else param.grad
        self._held = []

    def before(self, replay: Replay) -> Replay:
        """``replay``, with the gradients given back first: DDP reduces all of them together in its backward pass."""

        def give_back_and_replay(transform: Transform, last: bool = True) -> None:
            self.give_back()
            replay(transform, last)

        return give_back_and_replay
