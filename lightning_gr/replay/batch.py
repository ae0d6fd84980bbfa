"""Protects the arguments of a training step: containers are restored, and tensors must not change."""

from collections.abc import Iterable
from typing import Any

from lightning_gr.replay.contents import TensorPlace, is_lazy
from lightning_gr.replay.digest import digests
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.marks import Marker, Marks
from lightning_gr.replay.opaque import OpaquePlace, can_be_moved
from lightning_gr.replay.places import Place

__all__ = ["Batch"]


class Batch(Footprint):
    """The footprint of a call on its arguments. Objects keep their identity, and no tensors are copied.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        module: The module, which is not searched from here.
        thorough: Whether changes are found by reading all entries of a tensor instead of a few.

    Raises:
        RuntimeError: If the batch contains an iterator, which the second pass would find exhausted.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], module: object, *, thorough: bool = False
    ) -> None:
        super().__init__(lambda: {"batch": args, "keywords": kwargs}, closed=lambda: [module])
        self.begin()
        for place in self.places:
            if isinstance(place, OpaquePlace) and can_be_moved(place.owner):
                raise RuntimeError(
                    f"The batch contains an iterator ({type(place.owner).__name__}), which the second pass would find"
                    " exhausted: let the collate function turn it into a list or a tensor"
                )
        self._content = [place for place in self.places if isinstance(place, TensorPlace)]
        self._marker = Marker(self._content, thorough=True)
        self._thorough = thorough
        self._before = self._after = self._state()

    def begin(self) -> bool:
        """Search the batch, but only the first time."""
        return super().begin() if not self.places else False

    def note(self, places: Iterable[Place]) -> None:
        """Do nothing, because tensors of a batch are not protected; :meth:`check` rejects writes to them instead."""

    def marks(self) -> Marks:
        """Nothing is learned from them, see :meth:`note`."""
        return Marks([])

    def _state(self) -> tuple[Any, list[int]]:
        tensors = [place.owner for place in self._content] if self._thorough else []
        return self._marker.look(), digests([tensor for tensor in tensors if not is_lazy(tensor)])

    def note_after_first(self) -> None:
        """Record the tensors after the first pass. They are only checked if there is a second pass."""
        self._after = self._state()

    def check(self, loader: object) -> None:
        """Check that a second pass sees the same data as the first one.

        Raises:
            RuntimeError: If the first pass wrote to a tensor, or if ``loader`` has written to it since.
        """
        if self._after != self._before:
            raise RuntimeError(
                "training_step changed a tensor of its batch in place, so it cannot be run again on the same data:"
                " work on a copy, as in `x = batch['x'].clone()`"
            )
        if self._state() != self._after:
            raise RuntimeError(
                f"The data loader ({type(loader).__name__}) wrote new data into the tensors of an earlier batch of the"
                " same window, which the second pass needs: let it return new tensors, for example `x.clone()`, or use"
                " `accumulation='micro_batch'`"
            )
