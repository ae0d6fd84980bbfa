"""Detects any change of places, without copies of large tensors."""

from collections.abc import Sequence

import torch

from lightning_gr.replay.contents import Content, TensorPlace, is_lazy
from lightning_gr.replay.digest import digests
from lightning_gr.replay.machinery import QuietTensorPlace
from lightning_gr.replay.marks import Marker, Marks
from lightning_gr.replay.opaque import OpaquePlace
from lightning_gr.replay.places import Place
from lightning_gr.replay.snapshot import Snapshot, storage_of

__all__ = ["Fingerprint"]

_SMALL = 2**16  # in bytes, of a tensor of an optimizer's state that is copied on an evaluation to learn from


class Fingerprint:
    """The exact state of some places: a digest of each tensor, and the entries of everything else.

    Args:
        places: The places.
        budget: The number of bytes of tensors that may also be copied, so that they can be restored.
    """

    def __init__(self, places: Sequence[Place], budget: int) -> None:
        tensors = [place for place in places if isinstance(place, TensorPlace) and not is_lazy(place.owner)]
        self._tensors = [place for place in tensors if not isinstance(place, QuietTensorPlace)]
        self._look_at_quiet([place for place in tensors if isinstance(place, QuietTensorPlace)])
        self._digests = digests([place.owner for place in self._tensors])
        self._copies: dict[int, Content | None] = {}
        small = [place for place in tensors if not isinstance(place, QuietTensorPlace) or _size(place) <= _SMALL]
        for place in sorted(small if budget else (), key=_size):
            budget -= _size(place)
            if budget < 0:
                break
            self._copies[id(place)] = place.save()
        self._rest = Snapshot(place for place in places if not isinstance(place, TensorPlace))

    def _look_at_quiet(self, places: Sequence[TensorPlace]) -> None:
        self._quiet, self._marks = places, Marks([Marker(places)])

    def changed(self, moved: frozenset[int] = frozenset()) -> list[Place]:
        """The places that differ now, except for tensors in the storages ``moved``."""
        now = digests([place.owner for place in self._tensors])
        pairs = zip(self._tensors, self._digests, now, strict=True)
        written: list[Place] = [p for p, old, new in pairs if old != new and storage_of(p.owner) not in moved]
        return written + self._rest.changed() + self._marks.changed(moved)

    def without(self, places: Sequence[Place]) -> Snapshot:
        """Remove ``places`` and return their values, as far as they are known."""
        chosen = {id(place) for place in places}
        kept = [(p, d) for p, d in zip(self._tensors, self._digests, strict=True) if id(p) not in chosen]
        self._tensors, self._digests = [p for p, _ in kept], [d for _, d in kept]
        self._look_at_quiet([place for place in self._quiet if id(place) not in chosen])
        taken = self._rest.without(chosen)
        taken.saved += [(p, self._copies.pop(id(p))) for p in places if id(p) in self._copies]
        return taken

    def restore(self, changed: Sequence[Place]) -> list[Place]:
        """Restore ``changed`` and return those of which there is no copy."""
        found = self.without(changed)
        found.restore()
        known = {id(place) for place, _ in found.saved if not isinstance(place, OpaquePlace)}
        return [place for place in changed if id(place) not in known]


def _size(place: TensorPlace) -> int:
    tensor = place.owner
    return int(tensor.numel() * tensor.element_size()) if tensor.layout == torch.strided and not tensor.is_nested else 0
