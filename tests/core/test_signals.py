"""Signals wait while weights are perturbed: raised in this process, and sent from another one at random moments."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import faults
import pytest
from interrupter import Interrupter
from launching import HERE, ROOT

from lightning_gr.core.signals import deferred_signals, without_interrupts

FAULTS = 210


LIMIT = 120.0  # seconds


@pytest.fixture
def handled():
    """The signals seen by Python handlers, each with a flag that the test sets while weights count as perturbed."""
    seen = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: seen.append((n, inside))) for number in numbers}
    inside = False

    def enter(value):
        nonlocal inside
        inside = value

    yield seen, enter
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_wait_and_are_called_in_order(handled):
    seen, enter = handled
    with deferred_signals():
        enter(True)
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(number)
        assert seen == []
        enter(False)
    order = [signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    assert seen == [(number, False) for number in order]
    signal.raise_signal(signal.SIGUSR1)
    assert len(seen) == 5


def test_no_signal_is_lost_if_a_handler_or_the_body_raises(handled):
    seen, _ = handled

    def refuse(number, frame):
        raise SystemExit("first")

    @deferred_signals()
    def body():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        raise ValueError("body")

    signal.signal(signal.SIGTERM, refuse)
    with pytest.raises(SystemExit, match="first"):
        body()
    assert [number for number, _ in seen] == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) is refuse


def test_a_handler_installed_meanwhile_stays(handled):
    with deferred_signals():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_nesting_changes_nothing(handled):
    seen, enter = handled
    with deferred_signals():
        enter(True)
        with deferred_signals():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
        assert seen == []
        enter(False)
    assert seen == [(signal.SIGUSR1, False), (signal.SIGUSR2, False)]


def test_another_thread_leaves_handlers_alone(handled):
    """Only the main thread may set signal handlers."""

    def run():
        with deferred_signals():
            return [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]

    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    with ThreadPoolExecutor() as pool:
        assert pool.submit(run).result() == before


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_is_not_deferred():
    @deferred_signals()
    def body():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the body continued after Ctrl-C")

    with pytest.raises(KeyboardInterrupt):
        body()


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_waits_during_a_restore():
    guard = without_interrupts()
    before = signal.getsignal(signal.SIGINT)
    guard.begin()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        guard.end()
    assert signal.getsignal(signal.SIGINT) is before
    guard.begin()  # can be reused
    guard.end()
    assert signal.getsignal(signal.SIGINT) is before


class Sender(Interrupter):
    """Sends SIGINT, which can be deferred, unlike the exception that the base class raises."""

    def interrupt(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("kind", [Sender, Interrupter])
@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_before_any_bytecode(handled, kind, stride):
    """Wherever it hits, all handlers are restored, and each signal that arrived meanwhile is delivered once."""
    seen, _ = handled
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    count, hit = 1, True
    while hit:
        seen.clear()
        interrupter, sent = kind(count, "lightning_gr.core.signals"), []
        with suppress(KeyboardInterrupt), interrupter, deferred_signals():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                sent.append((number, False))
                signal.raise_signal(number)
        hit, count = interrupter.left <= 0, count + stride
        assert {number: signal.getsignal(number) for number in before} == before, f"before bytecode {count}"
        assert seen == sent, f"before bytecode {count}"
    assert count > 1000


# --- from another process


def wait_for(pipe, deadline):
    """Wait for the next byte that the child writes."""
    ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
    assert ready, "the child did not answer in time: a signal was lost"
    return os.read(pipe.fileno(), 1)


@pytest.mark.launch
@pytest.mark.timeout(LIMIT + 30)
def test_no_handler_saves_perturbed_weights(tmp_path, capsys):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    command = [sys.executable, "-W", "ignore", str(HERE / "faults.py"), str(FAULTS), str(tmp_path)]
    deadline, draw = time.monotonic() + LIMIT, random.Random(0)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    try:
        assert wait_for(child.stdout, deadline) == b"!"
        for _ in range(FAULTS):
            time.sleep(draw.uniform(0, 0.01))
            number = draw.choice(faults.NUMBERS)
            child.send_signal(number)
            assert wait_for(child.stdout, deadline) == bytes([number])
        assert child.wait(max(1.0, deadline - time.monotonic())) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    report = json.loads((tmp_path / "report.json").read_text())
    with capsys.disabled():
        print(
            f"\n{FAULTS} signals injected, {report['in second pass']} of them in a second pass: {report['saved']}"
            f" checkpoints saved from their handlers, {report['perturbed']} with perturbed weights"
        )
    assert report["saved"] == FAULTS
    assert report["perturbed"] == 0
    assert report["in second pass"] >= 20
