"""Defers signal handlers while weights are displaced."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from queue import SimpleQueue
from types import BuiltinMethodType, FrameType
from typing import Any

from lightning_gr._compat import signal_handler

__all__ = ["Deferral", "deferred_signals", "without_interrupts"]

# Ctrl-C and timers should interrupt a pass. They save no checkpoint, and the exception they raise restores the weights.
_INTERRUPTS = ("SIGINT", "SIGALRM", "SIGVTALRM", "SIGPROF")
_INTERRUPTING = [int(getattr(signal, name)) for name in _INTERRUPTS if hasattr(signal, name)]
_NEVER_DEFERRED = {getattr(signal, name, None) for name in (*_INTERRUPTS, "SIGKILL", "SIGSTOP")}
_DEFERRED = sorted(int(number) for number in signal.valid_signals() - _NEVER_DEFERRED)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold back the Python handlers of signals during the body and call them afterwards, in order of arrival.

    Lightning saves a checkpoint from inside such a handler (for SIGTERM, SIGUSR1 or the signal with which a cluster
    requeues), at any bytecode of the main thread, so it must not run while weights are perturbed. Blocking the signal
    with ``pthread_sigmask`` is not enough, because another thread receives it and the handler still runs in the main
    thread. Signals without a Python handler are not affected.
    """
    deferral = Deferral()
    try:
        try:
            deferral.begin()
            yield
        finally:
            deferral.end()
    finally:
        deferral.end()  # again, in case Ctrl-C came just before the first call


def without_interrupts() -> "Deferral":
    """Create a deferral of Ctrl-C and timers, to restore the state of a pass without interruption."""
    return Deferral(_INTERRUPTING)


class Deferral:
    """Holds back the Python handlers of signals from :meth:`begin` to :meth:`end`, in the main thread.

    Args:
        numbers: The signals to defer; by default all except those that should interrupt.
    """

    def __init__(self, numbers: Iterable[int] = _DEFERRED) -> None:
        self._numbers = numbers
        self._arrived = _Arrived()
        # accepts (number, frame), and Ctrl-C cannot interrupt a built-in operation
        self._hold: Any = self._arrived.put
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def begin(self) -> None:
        """Start deferring, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._replace(self._numbers)

    def end(self) -> None:
        """Restore the handlers and call those that are due.

        Ctrl-C is also deferred in here, because its exception would keep the other handlers from being restored. It can
        still come at the start or the end of this method, which can then be called again without losing signals.
        """
        if self._handlers:
            self._replace(_INTERRUPTING)
            self._put_back(self._numbers)
            self._put_back(_INTERRUPTING)
            self._deliver()
            self._handlers = {}

    def _replace(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            handler = signal_handler(number)
            # a nested second pass keeps the replacement made by the outer one
            if callable(handler) and not _is_held(handler):
                self._handlers[number] = handler
                signal.signal(number, self._hold)

    def _put_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            # keep a handler that user code installed in the meantime
            if number in self._handlers and signal_handler(number) == self._hold:
                signal.signal(number, self._handlers[number])

    def _deliver(self) -> None:
        """Call each handler that is due, even if one raises."""
        calls = {number: partial(handler, number, None) for number, handler in self._handlers.items()}
        numbers = iter(self._arrived.get_nowait, None)
        # take a number from the queue and call its handler in one operation, for the same reason
        due = map(methodcaller("__call__"), map(calls.__getitem__, numbers))
        try:
            while not self._arrived.empty():
                next(due)
        finally:
            if not self._arrived.empty():
                self._deliver()


class _Arrived(SimpleQueue[int]):
    """The numbers of the signals received."""


def _is_held(handler: object) -> bool:
    """Whether a handler is the replacement installed by a deferral."""
    return isinstance(handler, BuiltinMethodType) and isinstance(handler.__self__, _Arrived)
