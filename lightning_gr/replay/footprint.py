"""What a training step writes to: learned by looking at all that it can reach, and protected from then on.

Enumerating kinds of state that deserve protection always misses one. So everything that is reachable from the module
is looked through, on the first evaluation, the second, the fourth and so on, before and after it; what has changed is
saved and put back around each second pass from then on. Between these steps cheap marks (the entries of containers,
version counters, a few entries of each tensor) tell of a write that comes late, so that not even its first time leaves
a trace. What is only read is never copied.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._compat import writing_methods
from lightning_gr.core.sharding import local_parts
from lightning_gr.replay.contents import Content, FlagsPlace, LazyPlace, TensorPlace, is_lazy, restore_tensors, sample
from lightning_gr.replay.digest import digests
from lightning_gr.replay.machinery import QuietTensorPlace, WriterPlace
from lightning_gr.replay.opaque import OpaquePlace
from lightning_gr.replay.places import Place
from lightning_gr.replay.walk import Walk, walk

__all__ = ["Footprint", "Snapshot"]


_SMALL = 2**16  # in bytes, of a tensor of an optimizer's state that is copied on an evaluation to learn from


def _references(place: Place) -> list[Any]:
    """What a place refers to; of tensors only the identity, since they may be large and are to be freed in time."""
    return [id(value) if isinstance(value, Tensor) else value for value in place.values()]


def _differ(now: list[Any], before: list[Any]) -> bool:
    return len(now) != len(before) or any(
        a is not b and not (type(a) is int and a == b) for a, b in zip(now, before, strict=True)
    )


class Snapshot:
    """The values of some places at one moment."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.saved = [(place, place.save()) for place in places]

    def changed(self, kind: type[Place] = Place) -> list[Place]:
        """The places of one kind that have another value now."""
        return [place for place, saved in self.saved if isinstance(place, kind) and place.differs(saved)]

    def without(self, chosen: set[int]) -> "Snapshot":
        """Take the places with these ids out; returns them with their values."""
        taken = Snapshot(())
        taken.saved = [pair for pair in self.saved if id(pair[0]) in chosen]
        self.saved = [pair for pair in self.saved if id(pair[0]) not in chosen]
        return taken

    def restore(self, moved: frozenset[int] = frozenset()) -> None:
        """Put the values back, except for tensors that lie in the storages ``moved``."""
        tensors: list[Tensor] = []
        values: list[Content] = []
        for place, saved in self.saved:
            if isinstance(place, TensorPlace):
                if saved is not None and not (moved and _storage_of(place.owner) in moved):
                    tensors.append(place.owner)
                    values.append(saved)
            elif place.differs(saved):
                place.restore(saved)
        restore_tensors(tensors, values)


def _storage_of(tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_nested or is_lazy(tensor):
        return 0
    return local_parts([tensor])[0].untyped_storage().data_ptr()


def storages_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    """The storages in which ``tensors`` lie now."""
    return frozenset(map(_storage_of, tensors)) - {0}


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
        self._shape: tuple[int, ...] = ()
        self._known: set[int] = set()  # the ids of what has been seen to be written
        self._moved: set[int] = set()
        self._fresh: list[Place] = []
        self._contents: list[tuple[Place, list[Any]]] = []
        self._others: list[Place] = []
        self.places: list[Place] = []
        self._tensors: list[Tensor] = []
        self.protected: list[Place] = []

    @property
    def leaves(self) -> list[Tensor]:
        """The leaf tensors that require a gradient, by now: an evaluation may ask for that of its batch."""
        return [tensor for tensor in self._tensors if tensor.requires_grad and tensor.is_leaf]

    @property
    def writers(self) -> list[tuple[object, list[str]]]:
        """The clients of services that were found, with those of their methods that write."""
        found = (place.owner for place in (*self.places, *self._fresh) if isinstance(place, WriterPlace))
        return [(owner, writing_methods(owner)) for owner in found]

    def begin(self) -> bool:
        """Get ready for an evaluation; returns whether it is one to learn from, having looked through everything."""
        self._count += 1
        shape = self._tree()
        learning = self._count & (self._count - 1) == 0 or shape != self._shape
        if learning:
            self._look(shape)
        else:
            self._look_at_changes()
        return learning

    def _tree(self) -> tuple[int, ...]:
        """The modules and how many tensors they hold: whether it differs, the module has grown or shrunk."""
        modules = [root for root in self._roots().values() if isinstance(root, nn.Module)]
        return tuple(id(module) for root in modules for module in root.modules())

    def _look(self, shape: tuple[int, ...]) -> None:
        self.places = walk(self._roots(), self._hidden, self._closed())
        self._tensors = [place.owner for place in self.places if isinstance(place, TensorPlace)]
        self.places.append(FlagsPlace(self._tensors, "requires_grad"))
        self._shape, self._fresh = shape, []
        self._contents = [(place, _references(place)) for place in self.places if place.is_watched]
        self._sort()

    def _look_at_changes(self) -> None:
        """Look through what has been put into attributes and containers since all was looked through."""
        changed = [place for place, before in self._contents if _differ(_references(place), before)]
        if not changed and not self._fresh:
            return
        closed = [*self._closed(), *(place.owner for place in self.places)]
        found = Walk(self._hidden, closed).enter(child for place in changed for child in place.children())
        self._fresh = found.places
        self._sort()

    def _sort(self) -> None:
        self.protected, self._others = [], []
        for place in (*self.places, *self._fresh):
            (self.protected if self.protects(place) else self._others).append(place)

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
        return [*self._roots().values(), *(place.owner for place in self.places)]

    def note(self, places: Iterable[Place]) -> None:
        """From now on, protect ``places`` around each second pass."""
        new = {id(place.owner) for place in places} - self._known
        if new:
            self._known |= new
            self._sort()

    def unprotected(self, budget: int) -> "Fingerprint":
        """What everything else looks like now, exactly, with copies of tensors as far as ``budget``, in bytes, goes."""
        return Fingerprint(self._others, budget)

    def marks(self) -> "Marks":
        """What everything else looks like now, cheaply."""
        return Marks([place for place in self._others if place.has_mark])

    def look_at_initialized(self, start: "Snapshot") -> None:
        """Look through modules that were lazy at the ``start``, and protect what has got its shape since."""
        if start.changed(LazyPlace):
            before = {id(place.owner) for place in self.places}
            self._look(self._tree())
            self.note(place for place in self.places if id(place.owner) not in before)

    def warn_about_opaque(self, before: "Snapshot") -> None:
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


class Fingerprint:
    """Exactly what some places look like: a digest of each tensor, the entries of everything else.

    Args:
        places: The places.
        budget: How many bytes of tensors may be copied besides, so that they can be put back.
    """

    def __init__(self, places: Sequence[Place], budget: int) -> None:
        tensors = [place for place in places if isinstance(place, TensorPlace) and not is_lazy(place.owner)]
        self._tensors = [place for place in tensors if not isinstance(place, QuietTensorPlace)]
        self._quiet = Marks([place for place in tensors if isinstance(place, QuietTensorPlace)])
        self._digests = digests([place.owner for place in self._tensors])
        self._copies: dict[int, Content | None] = {}
        small = [place for place in tensors if not isinstance(place, QuietTensorPlace) or _size(place) <= _SMALL]
        for place in sorted(small if budget else (), key=_size):
            budget -= _size(place)
            if budget < 0:
                break
            self._copies[id(place)] = place.save()
        self._rest = Snapshot(place for place in places if not isinstance(place, TensorPlace))

    def changed(self, moved: frozenset[int] = frozenset()) -> list[Place]:
        """The places that look different now, except for tensors in the storages ``moved``."""
        now = digests([place.owner for place in self._tensors])
        pairs = zip(self._tensors, self._digests, now, strict=True)
        written: list[Place] = [p for p, old, new in pairs if old != new and _storage_of(p.owner) not in moved]
        return written + self._rest.changed() + self._quiet.changed(moved)

    def without(self, places: Sequence[Place]) -> "Snapshot":
        """Take ``places`` out; returns their values, as far as they are known."""
        chosen = {id(place) for place in places}
        kept = [(p, d) for p, d in zip(self._tensors, self._digests, strict=True) if id(p) not in chosen]
        self._tensors, self._digests = [p for p, _ in kept], [d for _, d in kept]
        self._quiet = self._quiet.without(chosen)
        taken = self._rest.without(chosen)
        taken.saved += [(p, self._copies.pop(id(p))) for p in places if id(p) in self._copies]
        return taken

    def restore(self, changed: Sequence[Place]) -> list[Place]:
        """Put ``changed`` back, and return those of which there is no copy."""
        found = self.without(changed)
        found.restore()
        known = {id(place) for place, _ in found.saved if not isinstance(place, OpaquePlace)}
        return [place for place in changed if id(place) not in known]


def _size(place: TensorPlace) -> int:
    tensor = place.owner
    return int(tensor.numel() * tensor.element_size()) if tensor.layout == torch.strided and not tensor.is_nested else 0


class Marks:
    """What tells of most writes to some places at next to no cost: version counters, addresses, a few entries."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._marks = [place.mark() for place in places]
        self._hosted = [p for p in places if _is_on_host(p.owner) and not isinstance(p, QuietTensorPlace)]
        self._few = sample([place.owner for place in self._hosted])

    def changed(self, moved: frozenset[int] = frozenset()) -> list[Place]:
        """The places that look different now, except for tensors in the storages ``moved``."""
        found = [p for p, mark in zip(self._places, self._marks, strict=True) if p.mark() != mark]
        now = sample([place.owner for place in self._hosted])
        found += [p for p, old, new in zip(self._hosted, self._few, now, strict=True) if old != new and p not in found]
        return [p for p in found if not (moved and isinstance(p, TensorPlace) and _storage_of(p.owner) in moved)]

    def without(self, chosen: set[int]) -> "Marks":
        """The others, as they look by now, without the places with these ids."""
        return Marks([place for place in self._places if id(place) not in chosen])

    def restore(self, changed: Sequence[Place]) -> Sequence[Place]:
        """There are no copies: returns ``changed``."""
        return changed


def _is_on_host(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and not tensor.requires_grad
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
    )
