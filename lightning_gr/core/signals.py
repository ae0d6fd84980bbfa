"""Signals while weights are displaced."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from types import FrameType
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
        self._arrived: deque[int] = deque()
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
            if callable(handler) and getattr(handler, "__func__", None) is not Deferral._hold:
                self._handlers[number] = handler
                signal.signal(number, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(number)

    def _put_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            # a handler that user code installed meanwhile stays
            if number in self._handlers and signal.getsignal(number) == self._hold:
                signal.signal(number, self._handlers[number])

    def _deliver(self) -> None:
        """Call each handler that is due, even if another one raises."""
        try:
            while self._arrived:
                handler = self._handlers[self._arrived[0]]
                # taken from the queue and called in one operation of the interpreter, which Ctrl-C cannot divide
                next(map(handler, iter(self._arrived.popleft, None), repeat(None)))
        finally:
            if self._arrived:
                self._deliver()
