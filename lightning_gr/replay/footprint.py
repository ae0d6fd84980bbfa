"""What a training step writes to: learned by looking at all that it can reach, and protected from then on.

Enumerating kinds of state that deserve protection always misses one. So everything that is reachable from the module
is looked through, on the first evaluation, the second, the fourth and so on, before and after it; what has changed is
saved and put back around each second pass from then on. Between these steps cheap marks (the entries of containers,
version counters, a few entries of each tensor) tell of a write that comes late, so that not even its first time leaves
a trace. What is only read is never copied.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_gr._compat import writing_methods
from lightning_gr.replay.contents import FlagsPlace, LazyPlace, TensorPlace
from lightning_gr.replay.fingerprint import Fingerprint
from lightning_gr.replay.machinery import WriterPlace
from lightning_gr.replay.marks import Marker, Marks
from lightning_gr.replay.opaque import OpaquePlace
from lightning_gr.replay.places import Place, SetPlace
from lightning_gr.replay.references import References
from lightning_gr.replay.snapshot import Keeper, Kept, Snapshot
from lightning_gr.replay.walk import Walk

__all__ = ["Footprint"]


class _Part:
    """Places that have been looked through together, made ready to be saved and marked in each step."""

    def __init__(self, places: Sequence[Place], protects: Callable[[Place], bool]) -> None:
        protected = [protects(place) for place in places]
        self.places = places
        self.protected = [place for place, chosen in zip(places, protected, strict=True) if chosen]
        self.others = [place for place, chosen in zip(places, protected, strict=True) if not chosen]
        self.writers = [place.owner for place in places if isinstance(place, WriterPlace)]
        self.sets = [place for place in self.protected if type(place) is SetPlace and place.can_be_replaced]
        self.keeper = Keeper(self.protected)
        self.marker = Marker([place for place in self.others if place.has_mark])


_NOTHING = _Part([], lambda place: False)


class Footprint:
    """What the evaluations of one loss write to, as far as it has been learned.

    Args:
        roots: What is looked through, by name; called on each look, since a module may grow.
        hidden: Attributes of a LightningModule that belong to Lightning.
        closed: Objects that are not entered.
        warn: Is told what cannot be put back, once for each path.
    """

    def __init__(
        self,
        roots: Callable[[], Mapping[str, Any]],
        *,
        hidden: frozenset[str] = frozenset(),
        closed: Callable[[], Iterable[object]] = tuple,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        self._roots, self._hidden, self._closed = roots, hidden, closed
        self._warn = warn or _warn
        self._warned: set[str] = set()
        self._count = 0
        self._known: set[int] = set()  # the ids of what has been seen to be written
        self._moved: set[int] = set()
        self._all, self._fresh = _NOTHING, _NOTHING
        self._seen: dict[int, object] = {}
        self._tables: list[dict[str, Any]] = []  # the children of all modules
        self._tree: list[int] = []
        self._references: tuple[References, References] | None = None
        self._touched: dict[int, Place] = {}
        self._tensors: list[Tensor] = []

    @property
    def places(self) -> Sequence[Place]:
        """All that was found when everything was looked through."""
        return self._all.places

    @property
    def _parts(self) -> list[_Part]:
        return [part for part in (self._all, self._fresh) if part.places]

    @property
    def protected(self) -> list[Place]:
        """What is saved and put back around each pass."""
        return [place for part in self._parts for place in part.protected]

    @property
    def sets(self) -> list[SetPlace]:
        """The sets among them that another one can stand in for."""
        return [place for part in self._parts for place in part.sets]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaf tensors that require a gradient, by now: an evaluation may ask for that of its batch."""
        return [tensor for tensor in self._tensors if tensor.requires_grad and tensor.is_leaf]

    @property
    def writers(self) -> list[tuple[object, list[str]]]:
        """The clients of services that were found, with those of their methods that write."""
        return [(owner, writing_methods(owner)) for part in self._parts for owner in part.writers]

    def begin(self) -> bool:
        """Get ready for an evaluation; returns whether it is one to learn from, having looked through everything."""
        self._count += 1
        learning = self._count & (self._count - 1) == 0 or self._look_at_modules() != self._tree
        if learning:
            self._look()
        else:
            self._look_at_changes()
        return learning

    def _look_at_modules(self) -> list[int]:
        """The children of the modules that were there: whether they differ, the module has grown or shrunk."""
        return list(map(id, chain.from_iterable(map(dict.values, self._tables))))

    def _look(self) -> None:
        roots = self._roots()
        modules = [each for root in roots.values() if isinstance(root, nn.Module) for each in root.modules()]
        self._tables = [each._modules for each in modules if isinstance(each._modules, dict)]
        self._tree = self._look_at_modules()
        found = Walk(self._hidden, self._closed()).enter(roots.items())
        self._tensors = [place.owner for place in found.places if isinstance(place, TensorPlace)]
        found.places.append(FlagsPlace(self._tensors, "requires_grad"))
        self._all, self._fresh = _Part(found.places, self.protects), _NOTHING
        # not the roots themselves, which whoever remembers footprints by them wants to be freed
        self._seen = found.seen
        for root in roots.values():
            self._seen.pop(id(root), None)
        # before the second evaluation everything is looked through again
        self._references = (References(found.places), References([])) if self._count > 1 else None
        self._touched = {}

    def _look_at_changes(self) -> None:
        """Look through what has been put into attributes and containers since all was looked through."""
        if self._references is None:
            return
        everything, fresh = self._references
        changed = everything.changed()
        if not changed and not fresh.changed():
            return
        self._touched.update((id(place), place) for place in changed)
        closed = chain(self._closed(), self._roots().values())
        found = Walk(self._hidden, closed, self._seen)
        found.enter(child for place in self._touched.values() for child in place.children())
        if found.places or self._fresh.places:
            self._fresh = _Part(found.places, self.protects)
            self._references = everything, References(found.places)

    def _sort(self) -> None:
        self._all, self._fresh = (
            _Part(part.places, self.protects) if part.places else _NOTHING for part in (self._all, self._fresh)
        )

    def protects(self, place: Place) -> bool:
        """Whether a place is saved and put back around each pass."""
        watched = place.is_watched and id(place.owner) not in self._moved
        return watched or id(place.owner) in self._known

    def note_moved(self, params: Iterable[Tensor]) -> None:
        """Remember which parameters are displaced, and so belong to somebody else."""
        new = {id(param) for param in params} - self._moved
        if new:
            self._moved |= new
            self._sort()

    def written_weights(self) -> set[int] | None:
        """The ids of displaced parameters that have been seen to be written; None before any was displaced."""
        return self._known & self._moved if self._moved else None

    def owners(self) -> Iterable[object]:
        """What has been looked through, for another footprint that is not to enter it again."""
        return chain(self._roots().values(), self._seen.values())

    def note(self, places: Iterable[Place]) -> None:
        """From now on, protect ``places`` around each second pass."""
        new = {id(place.owner) for place in places} - self._known
        if new:
            self._known |= new
            self._sort()

    def keep(self, before: Iterable[Kept] = ()) -> Kept:
        """The values now of what is protected; see :class:`~lightning_gr.replay.snapshot.Kept`."""
        return Kept([part.keeper for part in self._parts], before)

    def unprotected(self, budget: int) -> Fingerprint:
        """What everything else looks like now, exactly, with copies of tensors as far as ``budget``, in bytes, goes."""
        return Fingerprint([place for part in self._parts for place in part.others], budget)

    def marks(self) -> Marks | Fingerprint:
        """What everything else looks like now, cheaply."""
        return Marks([part.marker for part in self._parts])

    def look_at_initialized(self, start: Snapshot | Kept) -> None:
        """Look through modules that were lazy at the ``start``, and protect what has got its shape since."""
        if start.changed(LazyPlace):
            before = {id(place.owner) for place in self.places}
            self._look()
            self.note(place for place in self.places if id(place.owner) not in before)

    def warn_about_opaque(self, before: Snapshot | Kept) -> None:
        """Name what a second pass has moved and nobody can move back."""
        for place in before.changed(OpaquePlace):
            self.warn_about(place, "cannot be put back, so each step with a second pass moves it twice")

    def warn_about(self, place: Place, why: str) -> None:
        """Name a place, once, whose value after a step is not what it would be without a second pass."""
        if place.path not in self._warned:
            self._warned.add(place.path)
            self._warn(f"`{place.path}` {why}: ask `lightning_gr.in_second_pass()` before you change it")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
