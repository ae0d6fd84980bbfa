"""Signals while weights are displaced."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

__all__ = ["deferred_signals"]

# Ctrl-C and timers are there to interrupt a pass, and save no checkpoint: what they raise restores the weights.
_NEVER_DEFERRED = ("SIGINT", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGVTALRM", "SIGPROF")
_SIGNALS = sorted(int(n) for n in signal.valid_signals() - {getattr(signal, name, None) for name in _NEVER_DEFERRED})


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold back the Python handlers of signals during the body and call them afterwards, in order of arrival.

    Lightning saves a checkpoint from inside such a handler (SIGTERM, SIGUSR1 or whichever signal a cluster requeues
    by), at whatever bytecode the main thread is, so it must not run while weights are perturbed. Blocking the signal
    (``pthread_sigmask``) is not enough: another thread takes it and the handler still runs in the main thread. A
    signal without a Python handler keeps its disposition.
    """
    deferral = _Deferral()
    try:
        try:
            deferral.begin()
            yield
        finally:
            deferral.end()
    finally:
        deferral.end()  # again, should Ctrl-C have come in the middle of the first time


class _Deferral:
    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def begin(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # a nested second pass finds the outer one's and leaves it there
            if callable(handler) and getattr(handler, "__func__", None) is not _Deferral._hold:
                self._handlers[number] = handler
                signal.signal(number, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(number)

    def end(self) -> None:
        """Put the handlers back and call those that are due. May be interrupted and called again: nothing is lost."""
        for number, handler in self._handlers.items():
            # a handler that user code installed meanwhile stays
            if signal.getsignal(number) == self._hold:
                signal.signal(number, handler)
        with ExitStack() as stack:  # calls each, even if one of them raises
            for number in reversed(self._arrived):
                stack.callback(self._handlers[number], number, None)
            self._arrived = []
