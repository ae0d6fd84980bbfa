"""Protects the arguments of a training step: containers are restored, and tensors must not change."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_gr.replay.contents import TensorPlace, is_lazy, is_plain
from lightning_gr.replay.digest import digests
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.marks import Marker, Marks
from lightning_gr.replay.opaque import OpaquePlace, can_be_moved
from lightning_gr.replay.places import EntryPlace, Place, SequencePlace
from lightning_gr.replay.snapshot import Kept, Snapshot
from lightning_gr.replay.walk import SIMPLE

__all__ = ["Batch"]

_FEW, _MOST = 8, 64


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
        plain = _plain_places(self._roots())
        if plain is None:
            self.begin()
        else:
            self._hold(plain)
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

    def protects(self, place: Place) -> bool:
        """Whether a place is restored: all but tensors, see :meth:`note`."""
        return not isinstance(place, TensorPlace) and super().protects(place)

    def keep(self, before: Iterable[Kept | Snapshot] = ()) -> Kept | Snapshot:
        """Save the containers; if they are few, one by one, since preparing to save all at once takes longer."""
        return Snapshot(self.protected) if len(self.protected) <= _FEW else super().keep(before)

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


def _plain_places(roots: Mapping[str, Any]) -> list[Place] | None:
    """What :func:`~lightning_gr.replay.walk.walk` finds, in a fifth of its time; None if ``roots`` hold other things.

    They may hold numbers, strings, tuples, a few lists and dictionaries, and tensors that nothing is attached to.
    """
    found: dict[int, Place] = {}
    waiting = list(roots.items())
    for path, value in waiting:
        kind = type(value)
        if kind in SIMPLE or id(value) in found:
            continue
        if kind is tuple:
            waiting.extend((path, item) for item in value)
        elif kind is Tensor and is_plain(value) and not (value.requires_grad or value.__dict__):
            found[id(value)] = TensorPlace(value, path)
        elif kind is list or kind is dict:
            found[id(value)] = place = SequencePlace(value, path) if kind is list else EntryPlace(value, path)
            waiting.extend(place.children())
        else:
            return None
        if len(waiting) > _MOST:
            return None
    return list(found.values())
