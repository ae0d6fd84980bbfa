"""Replaces hooks on parameters during a pass and restores them afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_gr._compat import hook_tables, with_hooks

__all__ = ["ExchangedHooks", "OwnHook", "has_accumulation_hooks", "times", "without_hooks"]

Hook = Callable[[Tensor], Any]


class OwnHook:
    """Base class of the package's own hooks, as opposed to those of a training step. It does nothing."""

    def __call__(self, tensor: Tensor) -> Any:
        """Keep the gradient unchanged by returning None."""


class Zero(OwnHook):
    """Replaces a gradient by zeros."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return zeros in the shape of the gradient."""
        return torch.zeros_like(tensor)


class Times(OwnHook):
    """Multiplies a gradient.

    Args:
        factor: By what.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the product."""
        return tensor * self.factor


@contextmanager
def times(factor: float, params: Sequence[Tensor]) -> Iterator[None]:
    """Multiply what is back-propagated to ``params``, after the hooks that they have and before it is accumulated."""
    removes = [param.register_hook(Times(factor)).remove for param in params if param.requires_grad and factor != 1.0]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for remove in removes:
            remove()


class ExchangedHooks:
    """Replaces hooks with others until they are restored, without changing their order.

    Args:
        params: The parameters whose hooks to replace.
        choose: Called with a hook's number, the hook and whether it runs after accumulation. It returns a replacement,
            or None to keep the hook.
    """

    def __init__(self, params: Sequence[Tensor], choose: Callable[[int, Hook, bool], OwnHook | None]) -> None:
        self._exchanged: list[tuple[dict[int, Hook], int, Hook, Hook]] = []
        for param in with_hooks(params):
            for after, table in enumerate(hook_tables(param)):
                for number, hook in table.items():
                    chosen = None if isinstance(hook, OwnHook) else choose(number, hook, bool(after))
                    if chosen is not None:
                        self._exchanged.append((table, number, hook, chosen))
        for where, number, _, other in self._exchanged:
            where[number] = other

    def put_back(self) -> None:
        """Restore the hooks, except for those removed in the meantime."""
        for table, number, hook, other in self._exchanged:
            if table.get(number) is other:
                table[number] = hook
        self._exchanged = []


@contextmanager
def without_hooks(params: Sequence[Tensor], *, after_accumulation: bool | None = None) -> Iterator[None]:
    """Disable the hooks on ``params``: all of them, or only those that run (or do not run) ``after_accumulation``."""
    nothing = OwnHook()
    exchanged = ExchangedHooks(
        params, lambda number, hook, after: nothing if after_accumulation in (None, after) else None
    )
    try:
        yield
    finally:
        exchanged.put_back()


def has_accumulation_hooks(param: Tensor) -> bool:
    """Whether ``param`` has hooks that run after accumulation (``register_post_accumulate_grad_hook``)."""
    return bool(hook_tables(param)[1])
