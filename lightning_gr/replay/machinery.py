"""State outside the module that a training step may write to: Trainer, optimizers, clients of loggers."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.places import AttributePlace, EntryPlace, Place

__all__ = ["BindingPlace", "QuietTensorPlace", "StatePlace", "WriterPlace"]


class BindingPlace(AttributePlace):
    """The attributes of an object, whose values are not searched.

    Args:
        owner: The ``__dict__`` of the object.
        path: The path to the object.
        containers: Whether to search its plain dictionaries, lists and sets.
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
    """A dictionary with tensors that training steps rarely write, such as an optimizer's state or metrics.

    Args:
        owner: The dictionary, for example the state of an optimizer or of one parameter.
        path: The path to the dictionary.
        quiet: Whether its entries are not expected to change.
    """

    __slots__ = ()

    def __init__(self, owner: dict[Any, Any], path: str, quiet: bool = True) -> None:
        super().__init__(owner, path, quiet)

    def children(self) -> Iterator[tuple[str, Any]]:
        for position, (key, value) in enumerate(dict.items(self.owner)):
            # other keys are parameters, and formatting them would read their content
            path = f"{self.path}[{key!r}]" if isinstance(key, str) else f"{self.path}[{position}]"
            if isinstance(value, dict):
                yield path, StatePlace(value, path)
            elif isinstance(value, Tensor):
                yield path, QuietTensorPlace(value, path)
            else:
                yield path, value


class QuietTensorPlace(TensorPlace):
    """A tensor for which only the version counter is checked, because reading it is rarely worth the cost."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return False

    def mark(self) -> tuple[int, int]:
        return 0 if self.owner.is_inference() else self.owner._version, 0


class WriterPlace(Place):
    """A client of a service or a file for metrics. Its output cannot be undone, so it is muted in second passes."""

    __slots__ = ()

    @property
    def is_watched(self) -> bool:
        return False

    def save(self) -> None:
        """Save nothing."""

    def differs(self, saved: Any) -> bool:
        return False

    def restore(self, saved: Any) -> None:
        """Restore nothing."""
