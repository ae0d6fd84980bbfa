"""Signals while weights are displaced."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from queue import SimpleQueue
from types import BuiltinMethodType, FrameType
from typing import Any

__all__ = ["Deferral", "deferred_signals", "without_interrupts"]

# Ctrl-C and timers are there to interrupt a pass, and save no checkpoint: what they raise restores the weights.
_INTERRUPTS = ("SIGINT", "SIGALRM", "SIGVTALRM", "SIGPROF")
_INTERRUPTING = [int(getattr(signal, name)) for name in _INTERRUPTS if hasattr(signal, name)]
_NEVER_DEFERRED = {getattr(signal, name, None) for name in (*_INTERRUPTS, "SIGKILL", "SIGSTOP")}
_DEFERRED = sorted(int(number) for number in signal.valid_signals() - _NEVER_DEFERRED)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold back the Python handlers of signals during the body and call them afterwards, in order of arrival.

    Lightning saves a checkpoint from inside such a handler (SIGTERM, SIGUSR1 or whichever signal a cluster requeues
    by), at whatever bytecode the main thread is, so it must not run while weights are perturbed. Blocking the signal
    (``pthread_sigmask``) is not enough: another thread takes it and the handler still runs in the main thread. A
    signal without a Python handler keeps its disposition.
    """
    deferral = Deferral()
    try:
        try:
            deferral.begin()
            yield
        finally:
            deferral.end()
    finally:
        deferral.end()  # again, should Ctrl-C have come on the way into the first time


def without_interrupts() -> "Deferral":
    """A deferral of Ctrl-C and timers, to put back in one piece what a pass has changed."""
    return Deferral(_INTERRUPTING)


class Deferral:
    """Holds back the Python handlers of signals from :meth:`begin` to :meth:`end`, in the main thread.

    Args:
        numbers: The signals; by default all but those that are there to interrupt.
    """

    def __init__(self, numbers: Iterable[int] = _DEFERRED) -> None:
        self._numbers = numbers
        self._arrived = _Arrived()
        # takes (number, frame), and an operation of the interpreter's own cannot be divided by Ctrl-C
        self._hold: Any = self._arrived.put
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def begin(self) -> None:
        """Hold them back."""
        if threading.current_thread() is threading.main_thread():
            self._replace(self._numbers)

    def end(self) -> None:
        """Put the handlers back and call those that are due.

        Meanwhile Ctrl-C waits as well: what it raises would leave the other handlers where they are. It may come on the
        way into here, and out of here, so this may be interrupted and called again: nothing is lost.
        """
        if self._handlers:
            self._replace(_INTERRUPTING)
            self._put_back(self._numbers)
            self._put_back(_INTERRUPTING)
            self._deliver()
            self._handlers = {}

    def _replace(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            handler = signal.getsignal(number)
            # a nested second pass finds the outer one's and leaves it there
            if callable(handler) and not _is_held(handler):
                self._handlers[number] = handler
                signal.signal(number, self._hold)

    def _put_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            # a handler that user code installed meanwhile stays
            if number in self._handlers and signal.getsignal(number) == self._hold:
                signal.signal(number, self._handlers[number])

    def _deliver(self) -> None:
        """Call each handler that is due, even if another one raises."""
        calls = {number: partial(handler, number, None) for number, handler in self._handlers.items()}
        numbers = iter(self._arrived.get_nowait, None)
        # taken from the queue and called in one operation, for the same reason
        due = map(methodcaller("__call__"), map(calls.__getitem__, numbers))
        try:
            while not self._arrived.empty():
                next(due)
        finally:
            if not self._arrived.empty():
                self._deliver()


class _Arrived(SimpleQueue[int]):
    """The numbers of the signals that have come."""


def _is_held(handler: object) -> bool:
    """Whether this is what a deferral has put in the place of a handler."""
    return isinstance(handler, BuiltinMethodType) and isinstance(handler.__self__, _Arrived)
