"""Saves and restores the states of communication hooks, such as PowerSGD's error feedback and PostLocalSGD's counter.

A hook runs in each reduction of gradients, but what it keeps belongs to optimizer steps: only one reduction of a step
may change it.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from types import MemberDescriptorType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CommStates"]

Restore = Callable[[], Any]
# parameters are displaced when this is restored, and others go on meanwhile
_NOT_ENTERED = (nn.Module, nn.Parameter, torch.optim.Optimizer, ModuleType, type, str, bytes, int, float, complex)
_NOT_ENTERED_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")  # of a Trainer, for example


class CommStates:
    """The states of communication hooks at a moment.

    Everything is restored in place: numbers, tensors, containers, generators, and objects that hold them. What nobody
    can copy, such as process groups, is only referred to.

    Args:
        states: The objects that were registered with the hooks.

    Example::

        >>> state = {"error": torch.zeros(2), "count": 3}
        >>> kept = CommStates([state])
        >>> state["error"] += 1; state["count"] += 1
        >>> kept.restore()
        >>> state
        {'error': tensor([0., 0.]), 'count': 3}
    """

    def __init__(self, states: Iterable[object]) -> None:
        seen: dict[int, object] = {}
        self._restores = [_keep(state, seen) for state in states]

    def restore(self) -> None:
        """Give all of them the contents that they had. It may be called again."""
        for restore in self._restores:
            restore()


def _keep(value: Any, seen: dict[int, object]) -> Restore:
    """Return a function that gives ``value`` its present contents and returns it."""
    package = type(value).__module__.partition(".")[0]
    if id(value) in seen or isinstance(value, _NOT_ENTERED) or package in _NOT_ENTERED_PACKAGES:
        return lambda: value
    seen[id(value)] = value
    if isinstance(value, Tensor):
        return _keep_tensor(value)
    if isinstance(value, dict):
        return _keep_mapping(value, seen)
    if isinstance(value, (list, deque, set)):
        return _keep_items(value, seen)
    if isinstance(value, tuple):
        return _keep_tuple(value, seen)
    if isinstance(value, np.ndarray) and value.flags.writeable:
        return _keep_array(value)
    for kind, get_state, set_state in _GENERATORS:
        if isinstance(value, kind):
            return _keep_generator(value, get_state, set_state)
    return _keep_attributes(value, seen)


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


_GENERATORS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], object]], ...] = (
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    (np.random.Generator, lambda generator: generator.bit_generator.state, _set_bits),
    (random.Random, random.Random.getstate, random.Random.setstate),
)


def _keep_tensor(tensor: Tensor) -> Restore:
    kept = tensor.detach().clone()

    def restore() -> Tensor:
        with torch.no_grad():
            return tensor.copy_(kept)

    return restore


def _keep_mapping(mapping: dict[Any, Any], seen: dict[int, object]) -> Restore:
    kept = {key: _keep(value, seen) for key, value in mapping.items()}

    def restore() -> dict[Any, Any]:
        mapping.clear()
        mapping.update((key, each()) for key, each in kept.items())
        return mapping

    return restore


def _keep_items(values: Any, seen: dict[int, object]) -> Restore:
    kept = [_keep(value, seen) for value in values]
    extend = values.update if isinstance(values, set) else values.extend

    def restore() -> Any:
        values.clear()
        extend(each() for each in kept)
        return values

    return restore


def _keep_tuple(values: tuple[Any, ...], seen: dict[int, object]) -> Restore:
    kept = [_keep(value, seen) for value in values]

    def restore() -> tuple[Any, ...]:
        for each in kept:
            each()
        return values

    return restore


def _keep_array(array: "np.ndarray[Any, Any]") -> Restore:
    kept = array.copy()

    def restore() -> "np.ndarray[Any, Any]":
        if array.shape != kept.shape:
            array.resize(kept.shape, refcheck=False)
        np.copyto(array, kept)
        return array

    return restore


def _keep_generator(
    generator: Any, get_state: Callable[[Any], Any], set_state: Callable[[Any, Any], object]
) -> Restore:
    kept = get_state(generator)

    def restore() -> Any:
        set_state(generator, kept)
        return generator

    return restore


def _keep_attributes(owner: Any, seen: dict[int, object]) -> Restore:
    bodies = [vars(kind) for kind in type(owner).__mro__ if "__slots__" in vars(kind)]
    slots = [name for body in bodies for name, slot in body.items() if isinstance(slot, MemberDescriptorType)]
    names = [name for name in [*slots, *getattr(owner, "__dict__", {})] if hasattr(owner, name)]
    kept = {name: _keep(getattr(owner, name), seen) for name in names}

    def restore() -> Any:
        for name, each in kept.items():
            object.__setattr__(owner, name, each())
        return owner

    return restore
