"""Handles trained weights that the training step itself also writes, by clipping or with its own optimizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.snapshot import Kept, Snapshot

__all__ = ["WrittenWeights"]


class WrittenWeights:
    """Makes a second pass start from the weights that the first one started from, displaced like all others.

    Args:
        footprint: The footprint of the evaluations.
        trained: Returns the parameters that may be displaced.
    """

    def __init__(self, footprint: Footprint, trained: Callable[[], Sequence[Tensor]]) -> None:
        self._footprint, self._trained = footprint, trained
        self._left: dict[int, Tensor] = {}  # what the last evaluation has left in them

    def note(self, start: Sequence[Kept | Snapshot]) -> list[tuple[Tensor, Tensor]]:
        """Return the weights that an evaluation has written, each with its value at the ``start``."""
        ids = self._footprint.written_weights()
        if ids is None:
            ids = {id(param) for param in self._trained()}
        found = [
            (place, saved.value)
            for snapshot in (start if ids else ())
            for place, saved in snapshot.saved
            if id(place.owner) in ids and isinstance(place, TensorPlace) and place.has_changed(saved)
        ]
        self._footprint.note(place for place, _ in found)
        self._left.update((id(place.owner), place.owner.detach().clone()) for place, _ in found)
        return [(place.owner, value) for place, value in found]

    @contextmanager
    def started(self, moved: Sequence[Tensor], written: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Set those of the ``moved`` weights that were ``written`` to the values at the start of that call, displaced.

        Afterwards they return to their displaced values, since another pass may start from there.
        """
        known, ids = self._footprint.written_weights() or (), {id(param) for param in moved}
        displaced = [(param, param.data, param.data.clone()) for param in moved if id(param) in known]
        marks = [(param._version, param.data_ptr()) for param in moved]
        try:
            for param, value in written:
                if id(param) in ids:
                    param.data.add_(value - self._left[id(param)])
            yield
        finally:
            changed = [p for p, mark in zip(moved, marks, strict=True) if (p._version, p.data_ptr()) != mark]
            self._footprint.note(TensorPlace(param, "") for param in changed)
            for param, memory, value in displaced:
                param.data = memory.copy_(value)
