"""Hooks on parameters: exchanged for others during a pass, and put back where they were."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_gr._compat import hook_tables

__all__ = ["ExchangedHooks", "OwnHook", "has_accumulation_hooks", "without_hooks"]

Hook = Callable[[Tensor], Any]


class OwnHook:
    """A hook of the package's own, which is no part of what a training step has set up. This one does nothing."""

    def __call__(self, tensor: Tensor) -> Any:
        """Leave the gradient as it is."""


class Zero(OwnHook):
    """Lets a gradient arrive as zero."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Nothing of ``tensor``."""
        return torch.zeros_like(tensor)


class ExchangedHooks:
    """Hooks that stand in for others until these are put back. Their order stays.

    Args:
        params: The parameters.
        choose: Is given the number of a hook, the hook and whether it runs after accumulation; returns another hook for
            it, or None to leave it.
    """

    def __init__(self, params: Sequence[Tensor], choose: Callable[[int, Hook, bool], OwnHook | None]) -> None:
        self._exchanged: list[tuple[dict[int, Hook], int, Hook, Hook]] = []
        for param in params:
            for after, table in enumerate(hook_tables(param)):
                for number, hook in table.items():
                    chosen = None if isinstance(hook, OwnHook) else choose(number, hook, bool(after))
                    if chosen is not None:
                        self._exchanged.append((table, number, hook, chosen))
        for where, number, _, other in self._exchanged:
            where[number] = other

    def put_back(self) -> None:
        """Put those back that nobody has removed meanwhile."""
        for table, number, hook, other in self._exchanged:
            if table.get(number) is other:
                table[number] = hook
        self._exchanged = []


@contextmanager
def without_hooks(params: Sequence[Tensor], *, after_accumulation: bool | None = None) -> Iterator[None]:
    """Let no hook on ``params`` run; ``after_accumulation``: only those that run then, or only the others."""
    nothing = OwnHook()
    exchanged = ExchangedHooks(
        params, lambda number, hook, after: nothing if after_accumulation in (None, after) else None
    )
    try:
        yield
    finally:
        exchanged.put_back()


def has_accumulation_hooks(param: Tensor) -> bool:
    """Whether a hook sees what has been accumulated in ``.grad`` (``register_post_accumulate_grad_hook``)."""
    return bool(hook_tables(param)[1])
