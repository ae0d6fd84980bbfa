"""The arguments of a training step, which it may take apart: containers are put back, tensors must not change."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_gr.replay.contents import TensorPlace, is_lazy, sample
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.opaque import OpaquePlace, can_be_moved
from lightning_gr.replay.places import Place

__all__ = ["Batch"]


class Batch(Footprint):
    """The footprint on the arguments of one call. The objects stay the same ones, and nothing of them is copied.

    Args:
        args: The positional arguments.
        kwargs: The others.
        module: The module, which is not entered from here.

    Raises:
        RuntimeError: If there is an iterator in the batch, which is empty in the second pass.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: object) -> None:
        super().__init__(lambda: {"batch": args, "keywords": kwargs}, closed=lambda: [module])
        self.begin()
        for place in self.places:
            if isinstance(place, OpaquePlace) and can_be_moved(place.owner):
                raise RuntimeError(
                    f"The batch holds an iterator ({type(place.owner).__name__}), which the second pass would find used"
                    " up: let the collate function turn it into a list or a tensor"
                )
        self._content = [place for place in self.places if isinstance(place, TensorPlace)]
        self._before = self._after = self._state()

    def begin(self) -> bool:
        """Look through the batch, once."""
        return super().begin() if not self.places else False

    def note(self, places: Iterable[Place]) -> None:
        """Its tensors are not protected: a write to one is refused instead, see :meth:`check`."""

    def _state(self) -> tuple[list[Any], list[Any]]:
        plain = [place.owner for place in self._content if _is_plain(place.owner)]
        return [place.mark() for place in self._content], sample(plain)

    def note_after_first(self) -> None:
        """Note what the tensors look like after the first pass. Nothing is refused before there is a second one."""
        self._after = self._state()

    def check(self, loader: object) -> None:
        """Refuse a second pass on other data than the first one's.

        Raises:
            RuntimeError: If the first pass wrote to a tensor, or if ``loader`` has written to it since.
        """
        if self._after != self._before:
            raise RuntimeError(
                "training_step changed a tensor of its batch in place, so it cannot be run again on the same data:"
                " work on a copy there, as in `x = batch['x'].clone()`"
            )
        if self._state() != self._after:
            raise RuntimeError(
                f"The data loader ({type(loader).__name__}) wrote new data into the tensors of an earlier batch of the"
                " same window, which the second pass needs: let it return new tensors, as by `x.clone()`, or use"
                " `accumulation='micro_batch'`"
            )


def _is_plain(tensor: Tensor) -> bool:
    """Whether its entries lie in memory one by one, where they can be read at no cost."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return is_dense and tensor.device.type == "cpu" and not is_lazy(tensor)
