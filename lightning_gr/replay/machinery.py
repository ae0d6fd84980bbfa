"""What a training step may write to in the machinery that trains it: Trainer, optimizers, clients of loggers."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.places import AttributePlace, EntryPlace, Place

__all__ = ["BindingPlace", "QuietTensorPlace", "StatePlace", "WriterPlace"]


class BindingPlace(AttributePlace):
    """What the attributes of an object are bound to, which is not entered.

    Args:
        owner: Its ``__dict__``.
        path: Where it was found.
        containers: Whether its plain dictionaries, lists and sets are.
    """

    __slots__ = ("containers",)

    def __init__(self, owner: dict[str, Any], path: str, containers: bool) -> None:
        super().__init__(owner, path)
        self.containers = containers

    def children(self) -> Iterator[tuple[str, Any]]:
        for path, value in super().children():
            if self.containers and type(value) is dict:
                yield path, StatePlace(value, path, quiet=False)
            elif self.containers and type(value) in (list, set):
                yield path, value


class StatePlace(EntryPlace):
    """Entries whose tensors others write to all the time, and training steps hardly ever: an optimizer's, metrics.

    Args:
        owner: A dictionary, such as that of an optimizer or of one parameter.
        path: Where it was found.
        quiet: Whether its entries are not expected to change.
    """

    __slots__ = ()

    def __init__(self, owner: dict[Any, Any], path: str, quiet: bool = True) -> None:
        super().__init__(owner, path, quiet)

    def children(self) -> Iterator[tuple[str, Any]]:
        for position, (key, value) in enumerate(dict.items(self.owner)):
            # other keys are parameters, whose representation would read them
            path = f"{self.path}[{key!r}]" if isinstance(key, str) else f"{self.path}[{position}]"
            if isinstance(value, dict):
                yield path, StatePlace(value, path)
            elif isinstance(value, Tensor):
                yield path, QuietTensorPlace(value, path)
            else:
                yield path, value


class QuietTensorPlace(TensorPlace):
    """A tensor of which only the version counter is looked at: reading it would cost more than it is likely to tell."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return False

    def mark(self) -> tuple[int, int]:
        return 0 if self.owner.is_inference() else self.owner._version, 0


class WriterPlace(Place):
    """A client of a service, or a file for metrics. Nobody can take back what it was told, so it is muted meanwhile."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return False

    def save(self) -> None:
        """There is nothing to save."""

    def differs(self, saved: Any) -> bool:
        return False

    def restore(self, saved: Any) -> None:
        """There is nothing to put back."""
