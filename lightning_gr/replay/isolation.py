"""Isolates a second pass: its flag, the global random state, and muted methods."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from lightning_gr._compat import is_python_thread

__all__ = ["RandomState", "flagged", "in_second_pass", "muted", "noted_exceptions"]


# the number of nested second passes in this thread (or asynchronous task); None if it has never evaluated a loss
_depth: ContextVar[int | None] = ContextVar("lightning_gr_depth", default=None)
# one entry per second pass of the program, changed by single operations: Ctrl-C could leave a lock closed
_active: set[object] = set()


def in_second_pass() -> bool:
    """Whether the calling code runs inside a second pass. Use it to guard side effects that cannot be undone.

    Logging, random numbers, the Trainer and everything reachable from the module are handled automatically. Files,
    network connections and iterators that a ``training_step`` uses are not.

    The result refers to the calling thread's own passes, or, in autograd's threads, to those of the program. In a
    thread that a ``training_step`` starts, it is False unless the thread runs in the context of the step:
    ``pool.submit(contextvars.copy_context().run, function)``.

    Example::

        >>> def training_step(self, batch):
        ...     loss = self.loss(batch)
        ...     if not in_second_pass():
        ...         self.history_file.write(f"{loss}")
        ...     return loss
        >>> in_second_pass()
        False
    """
    depth = _depth.get()
    if depth is not None:
        return depth > 0
    # autograd's own threads, which run backward hooks on an accelerator, belong to the active pass
    return bool(_active) and not is_python_thread()


@contextmanager
def flagged(second: bool = True) -> Iterator[None]:
    """Make :func:`in_second_pass` return ``second`` in this thread during the body."""
    before, entry = _depth.get() or 0, object()
    try:
        _depth.set(before + second)
        if second:
            _active.add(entry)
        yield
    finally:
        _depth.set(before)
        _active.discard(entry)


class RandomState:
    """The state of the global generators: torch (CPU, ``devices``), NumPy, Python.

    Args:
        devices: Accelerators whose default generators are in use. Reading their state does not synchronize.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._numpy = np.random.get_state(legacy=False)  # of any kind of generator
        self._python = random.getstate()
        self._devices = [(d, torch.get_device_module(d).get_rng_state(*_index(d))) for d in devices]

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    # the functions of torch.mps take no device
    return () if device.type == "mps" else (device,)


def _mute(*args: Any, **kwargs: Any) -> None:
    """Replace methods such as ``self.log``."""


@contextmanager
def muted(methods: Sequence[tuple[Any, Sequence[str]]]) -> Iterator[None]:
    """Shadow methods of objects with one that does nothing, and restore any earlier shadows afterwards."""
    shadowed: list[tuple[dict[str, Any], dict[str, Any], Sequence[str]]] = []
    try:
        for owner, names in methods:
            attributes = getattr(owner, "__dict__", None)
            if isinstance(attributes, dict):
                shadowed.append((attributes, {n: attributes[n] for n in names if n in attributes}, names))
                attributes.update(dict.fromkeys(names, _mute))
        yield
    finally:
        for attributes, before, names in reversed(shadowed):
            for name in names:
                attributes.pop(name, None)
            attributes.update(before)


@contextmanager
def noted_exceptions() -> Iterator[None]:
    """Add a note to exceptions that they come from a second pass, where the loss may overflow at displaced weights."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11) and type(error).__name__ != "NoLossError":
            error.add_note(
                "This was raised in the second pass of gradient regularization (lightning_gr), at displaced weights:"
                " if a value is not finite, use a smaller `epsilon` or `rho`"
            )
        raise
