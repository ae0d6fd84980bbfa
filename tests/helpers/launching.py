"""Starts training processes, waits for them with a timeout, and cleans up."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = [sys.executable, "-W", "ignore"]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(command, *, environment=None, **options):
    """Start a process in a new process group, with the package and the tests importable."""
    path = os.pathsep.join([str(ROOT), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen([*map(str, command)], env=environment, start_new_session=True, **options)


def end(process):
    """Kill the process and its children, if they are still running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(log, *commands, limit):
    """Run commands in parallel; return their exit statuses and combined output."""
    temporary = {"TMPDIR": str(Path(log).parent)}  # torchrun leaves folders there
    with open(log, "w", encoding="utf-8") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "environment": temporary}
        processes = [start(command, **options) for command in commands]
    try:
        codes = [process.wait(limit) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not finished after {limit} s: {Path(log).read_text()[-3000:]}") from error
    finally:
        for process in processes:
            end(process)
    return codes, Path(log).read_text()


def torchrun(script, folder, *args, ranks, limit):
    """Run a script in this folder on several ranks, and check that it succeeds."""
    command = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    codes, output = finish(folder / "log", [*command, HERE / script, folder, *args], limit=limit)
    assert codes == [0], output[-3000:]
