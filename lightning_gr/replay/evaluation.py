"""Evaluates a loss, records the state that it started from, and replays it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from lightning_gr.core.gradients import hidden_gradients
from lightning_gr.core.hooks import without_hooks
from lightning_gr.core.signals import without_interrupts
from lightning_gr.replay.contents import is_lazy
from lightning_gr.replay.fingerprint import Fingerprint
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.hooks import ObservingHooks
from lightning_gr.replay.isolation import RandomState, flagged, muted, noted_exceptions
from lightning_gr.replay.marks import Marks
from lightning_gr.replay.places import Place
from lightning_gr.replay.snapshot import Kept, Snapshot, Storages
from lightning_gr.replay.stand_ins import SetsAtStart
from lightning_gr.replay.weights import WrittenWeights

__all__ = ["Evaluation", "OwnGradients", "Surroundings"]

Output = TypeVar("Output")
OwnGradients = Literal["added", "dropped", "seen"]
# bytes of tensors that a learning evaluation may copy, in addition to twice the size of the weights
_SPARE_BYTES = 2**26

Muted = Sequence[tuple[Any, Sequence[str]]]


class Surroundings:
    """State shared by the evaluations of a loss.

    Args:
        footprint: The state that they may write to.
        devices: The accelerators in use, see :class:`~lightning_gr.replay.isolation.RandomState`.
        muted: Returns objects and the names of their methods to mute in a second pass.
        trained: Returns the parameters whose gradients a second pass adds to, or which its caller protects.
    """

    def __init__(
        self,
        footprint: Footprint,
        devices: Sequence[torch.device] = (),
        muted: Callable[[], Muted] = tuple,
        trained: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        self.footprint, self.devices, self.muted, self.trained = footprint, devices, muted, trained
        self.hooks, self.storages = ObservingHooks(), Storages()
        self.learning = False
        self.written_variables: set[str] = set()
        self.weights = WrittenWeights(footprint, trained)


class Evaluation(Generic[Output]):
    """Computes an output once, and replays the computation from the same start without side effects.

    Args:
        compute: Computes the loss, or an output that contains it.
        surroundings: The state that it may change.
        own: The state that only this evaluation can reach: a batch, or the variables of a closure.
    """

    def __init__(self, compute: Callable[[], Output], surroundings: Surroundings, own: Footprint | None = None) -> None:
        self.compute, self.surroundings = compute, surroundings
        self._footprints = [surroundings.footprint] if own is None else [surroundings.footprint, own]
        self._looked: Fingerprint | None = None

    def first(self) -> Output:
        """Record the random state and the module's state, and compute."""
        footprint, *own = self._footprints
        with flagged(second=False):
            self.surroundings.learning = footprint.begin()
            for each in own:
                each.begin()
            self._numbers = RandomState(self.surroundings.devices)
            self._start = self._keep()
            self._sets = SetsAtStart([place for each in self._footprints for place in each.sets])
            self._looked = footprint.unprotected(self._budget()) if self.surroundings.learning else None
            before = [self._looked or footprint.marks(), *(each.marks() for each in own)]
            output = self.compute()
        for position, (each, looked) in enumerate(zip(self._footprints, before, strict=True)):
            late = looked.changed()
            each.note(late)
            if position == 0 and self._looked is not None:
                # a learning evaluation knows their earlier values, from which the second pass starts
                self._start.append(self._looked.without(late))
        for each, start in zip(self._footprints, self._start, strict=False):
            each.look_at_initialized(start)
        self._written = self.surroundings.weights.note(self._start)
        return output

    def _protected(self) -> Iterator[Place]:
        return (place for each in self._footprints for place in each.protected)

    def _keep(self) -> list[Kept | Snapshot]:
        return [each.keep() for each in self._footprints]

    def _budget(self) -> int:
        return _SPARE_BYTES + 2 * sum(param.nbytes for param in self.surroundings.trained() if not is_lazy(param))

    def learn(self) -> None:
        """Evaluate once, without a trace, to find out what is written to. :meth:`again` starts from where this did."""
        trained = self.surroundings.trained()
        for each in self._footprints:
            each.begin()
        with ExitStack() as stack:
            stack.callback(RandomState(self.surroundings.devices).restore)
            for each in self._footprints:
                stack.callback(Snapshot(each.places).restore)
            stack.enter_context(_without_gradients(self._leaves(trained)))
            stack.enter_context(muted(self._muted()))
            stack.enter_context(flagged())
            stack.enter_context(without_hooks(trained))
            with hidden_gradients(trained):
                self.first()
        self._looked, self._written = None, []
        self._start = self._keep()
        self._sets = SetsAtStart([place for each in self._footprints for place in each.sets])

    @contextmanager
    def again(
        self,
        moved: Sequence[Tensor] = (),
        *,
        gradients: OwnGradients = "added",
        second: bool = True,
        hooks: bool = True,
    ) -> Iterator[Output]:
        """Compute once more, from the noted start; what the body does (a backward pass) leaves no trace either.

        Args:
            moved: Parameters that are displaced, whose values belong to whoever displaced them.
            gradients: What becomes of gradients that the computation itself leaves behind. It finds ``.grad`` empty,
                and those of ``moved`` are ``"added"``, or all are ``"dropped"``; or it finds what is there, which it
                has ``"seen"`` and may change.
            second: What :func:`~lightning_gr.in_second_pass` is to say meanwhile.
            hooks: Whether hooks on parameters run, except for those that only look at a gradient.
        """
        storages, trained = self.surroundings.storages.of(moved), self.surroundings.trained()
        footprint = self.surroundings.footprint
        footprint.note_moved(moved)
        with ExitStack() as stack:
            stack.enter_context(noted_exceptions())
            guard = without_interrupts()
            stack.callback(guard.end)
            guard.begin()
            after = [each.keep(self._start) for each in self._footprints]
            numbers = RandomState(self.surroundings.devices)
            stack.callback(self._verify, self._looked or footprint.marks(), storages)
            for each, snapshot in zip(self._footprints, after, strict=True):
                stack.callback(each.warn_about_opaque, snapshot)
            for snapshot in after:
                stack.callback(snapshot.restore, storages)
            stack.callback(numbers.restore)
            stack.enter_context(_without_gradients(self._leaves(trained)))
            stand_ins = stack.enter_context(self._sets.replaced())
            for begun in self._start:
                begun.restore(storages, now=after)
            self._sets.refer_to_stand_ins(stand_ins, self._protected())
            stack.enter_context(self.surroundings.weights.started(moved, self._written))
            self._numbers.restore()
            stack.enter_context(self.surroundings.hooks.silenced(trained) if hooks else without_hooks(trained))
            stack.enter_context(muted(self._muted()))
            stack.enter_context(flagged(second))
            stack.callback(guard.begin)
            guard.end()  # Ctrl-C counts while code of others runs
            with (
                nullcontext()
                if gradients == "seen"
                else hidden_gradients(trained, moved if gradients == "added" else ())
            ):
                output = self.compute()
            yield output

    def _muted(self) -> Muted:
        return [*self.surroundings.muted(), *(writer for each in self._footprints for writer in each.writers)]

    def _leaves(self, trained: Sequence[Tensor]) -> list[Tensor]:
        ids = {id(param) for param in trained}
        return [leaf for each in self._footprints for leaf in each.leaves if id(leaf) not in ids]

    def _verify(self, before: Fingerprint | Marks, moved: frozenset[int]) -> None:
        """Restore what a second pass has changed but the first one has not, if there is a copy.

        This happens if the first pass writes the same value, for example to a teacher that starts as a copy of its
        student.
        """
        self._looked = None
        changed = before.changed(moved)
        footprint = self.surroundings.footprint
        footprint.note(changed)
        for place in before.restore(changed):
            footprint.warn_about(place, "was changed by a second pass and cannot be put back")


@contextmanager
def _without_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Preserve the gradients of leaves that are not trained, such as those of a batch."""
    gradients = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
