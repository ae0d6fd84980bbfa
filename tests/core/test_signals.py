"""Signals from another process at random moments of training: no checkpoint is perturbed, no signal is lost."""

import json
import os
import random
import select
import subprocess
import sys
import time

import faults
import pytest
from launching import HERE, ROOT

FAULTS = 210
LIMIT = 120.0  # seconds


def wait_for(pipe, deadline):
    """The next byte that the child writes."""
    ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
    assert ready, "the child did not answer in time: a signal was lost"
    return os.read(pipe.fileno(), 1)


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
