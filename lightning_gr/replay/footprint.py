"""Learns what a training step writes to, by searching all that it can reach, and protects that from then on.

A list of kinds of state to protect always misses one. Therefore, on the first evaluation, the second, the fourth and so
on, everything reachable from the module is searched and compared before and after it. What has changed is saved and
restored around each second pass from then on. Between these evaluations, cheap marks (the entries of containers,
version counters, a few entries of each tensor) detect writes that start late, so that even the first of them leaves no
trace. State that is only read is never copied.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
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
    """Places found by one search, prepared to be saved and marked in each step."""

    def __init__(self, places: Sequence[Place], protects: Callable[[Place], bool]) -> None:
        protected = [protects(place) for place in places]
        self.places = places
        self.protected = [place for place, chosen in zip(places, protected, strict=True) if chosen]
        self.others = [place for place, chosen in zip(places, protected, strict=True) if not chosen]
        self.writers = [place.owner for place in places if isinstance(place, WriterPlace)]
        self.sets = [place for place in self.protected if type(place) is SetPlace and place.can_be_replaced]

    @cached_property
    def keeper(self) -> Keeper:
        return Keeper(self.protected)

    @cached_property
    def marker(self) -> Marker:
        return Marker([place for place in self.others if place.has_mark])


_NOTHING = _Part([], lambda place: False)


class Footprint:
    """What the evaluations of one loss write to, as far as is known.

    Args:
        roots: Returns the objects to search from, by name. It is called for each search, since a module may grow.
        hidden: Attributes of a LightningModule that belong to Lightning.
        closed: Returns objects that are not searched.
        managed: Returns attributes of other modules that belong to a strategy, by the identity of the module.
        warn: Called with a message about what cannot be restored, once for each path.
    """

    def __init__(
        self,
        roots: Callable[[], Mapping[str, Any]],
        *,
        hidden: frozenset[str] = frozenset(),
        closed: Callable[[], Iterable[object]] = tuple,
        managed: Callable[[], Mapping[int, frozenset[str]]] = dict,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        self._roots, self._hidden, self._closed, self._managed = roots, hidden, closed, managed
        self._warn = warn or _warn
        self._warned: set[str] = set()
        self._count = 0
        self._known: set[int] = set()  # the ids of what was seen to be written
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
        """All places found by the last full search."""
        return self._all.places

    @property
    def _parts(self) -> list[_Part]:
        return [part for part in (self._all, self._fresh) if part.places]

    @property
    def protected(self) -> list[Place]:
        """The places that are saved and restored around each pass."""
        return [place for part in self._parts for place in part.protected]

    @property
    def sets(self) -> list[SetPlace]:
        """The protected sets that can be replaced by another one."""
        return [place for part in self._parts for place in part.sets]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaf tensors that require a gradient now, since an evaluation may change that for its batch."""
        return [tensor for tensor in self._tensors if tensor.requires_grad and tensor.is_leaf]

    @property
    def writers(self) -> list[tuple[object, list[str]]]:
        """The clients of services among the places, with the names of their methods that write."""
        return [(owner, writing_methods(owner)) for part in self._parts for owner in part.writers]

    def begin(self) -> bool:
        """Prepare for an evaluation; return whether it is a learning one, for which everything has been searched."""
        self._count += 1
        learning = self._count & (self._count - 1) == 0 or self._look_at_modules() != self._tree
        if learning:
            self._look()
        else:
            self._look_at_changes()
        return learning

    def _look_at_modules(self) -> list[int]:
        """The identities of the known modules' children, which differ if the module has grown or shrunk."""
        return list(map(id, chain.from_iterable(map(dict.values, self._tables))))

    def _look(self) -> None:
        roots = self._roots()
        modules = [each for root in roots.values() if isinstance(root, nn.Module) for each in root.modules()]
        self._tables = [each._modules for each in modules if isinstance(each._modules, dict)]
        self._tree = self._look_at_modules()
        found = Walk(self._hidden, self._closed(), managed=self._managed()).enter(roots.items())
        self._hold(found.places)
        # without the roots, so that a cache keyed by them does not keep them alive
        self._seen = found.seen
        for root in roots.values():
            self._seen.pop(id(root), None)
        # the second evaluation searches everything again
        self._references = (References(found.places), References([])) if self._count > 1 else None
        self._touched = {}

    def _hold(self, places: list[Place]) -> None:
        self._tensors = [place.owner for place in places if isinstance(place, TensorPlace)]
        places.append(FlagsPlace(self._tensors, "requires_grad"))
        self._all, self._fresh = _Part(places, self.protects), _NOTHING

    def _look_at_changes(self) -> None:
        """Search what was added to attributes and containers since the last full search."""
        if self._references is None:
            return
        everything, fresh = self._references
        changed = everything.changed()
        if not changed and not fresh.changed():
            return
        self._touched.update((id(place), place) for place in changed)
        closed = chain(self._closed(), self._roots().values())
        found = Walk(self._hidden, closed, self._seen, self._managed())
        found.enter(child for place in self._touched.values() for child in place.children())
        if found.places or self._fresh.places:
            self._fresh = _Part(found.places, self.protects)
            self._references = everything, References(found.places)

    def _sort(self) -> None:
        self._all, self._fresh = (
            _Part(part.places, self.protects) if part.places else _NOTHING for part in (self._all, self._fresh)
        )

    def protects(self, place: Place) -> bool:
        """Whether a place is saved and restored around each pass."""
        watched = place.is_watched and id(place.owner) not in self._moved
        return watched or id(place.owner) in self._known

    def note_moved(self, params: Iterable[Tensor]) -> None:
        """Record which parameters are displaced. Whoever displaces them restores them."""
        new = {id(param) for param in params} - self._moved
        if new:
            self._moved |= new
            self._sort()

    def written_weights(self) -> set[int] | None:
        """The ids of displaced parameters that were seen to be written; None before any was displaced."""
        return self._known & self._moved if self._moved else None

    def owners(self) -> Iterable[object]:
        """The searched objects, which another footprint need not search again."""
        return chain(self._roots().values(), self._seen.values())

    def note(self, places: Iterable[Place]) -> None:
        """Protect ``places`` around each second pass from now on."""
        new = {id(place.owner) for place in places} - self._known
        if new:
            self._known |= new
            self._sort()

    def keep(self, before: Iterable[Kept | Snapshot] = ()) -> Kept | Snapshot:
        """Save what is protected; see :class:`~lightning_gr.replay.snapshot.Kept`."""
        return Kept([part.keeper for part in self._parts], before)

    def unprotected(self, budget: int) -> Fingerprint:
        """Record everything else exactly, with copies of tensors of up to ``budget`` bytes in total."""
        return Fingerprint([place for part in self._parts for place in part.others], budget)

    def marks(self) -> Marks | Fingerprint:
        """Record cheap marks of everything else."""
        return Marks([part.marker for part in self._parts])

    def look_at_initialized(self, start: Snapshot | Kept) -> None:
        """Search modules that were lazy at the ``start``, and protect the tensors initialized since."""
        if start.changed(LazyPlace):
            before = {id(place.owner) for place in self.places}
            self._look()
            self.note(place for place in self.places if id(place.owner) not in before)

    def warn_about_opaque(self, before: Snapshot | Kept) -> None:
        """Warn about iterators and the like that a second pass has advanced and that cannot be rewound."""
        for place in before.changed(OpaquePlace):
            self.warn_about(place, "cannot be put back, so each step with a second pass moves it twice")

    def warn_about(self, place: Place, why: str) -> None:
        """Warn once about a place whose value after a step is not what it would be without a second pass."""
        if place.path not in self._warned:
            self._warned.add(place.path)
            self._warn(f"`{place.path}` {why}: ask `lightning_gr.in_second_pass()` before you change it")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
