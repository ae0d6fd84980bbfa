"""What all tests start from."""

import os
import signal
import subprocess

import pytest
import torch
from hypothesis import Phase, settings

# A job in the background (`pytest &`) ignores SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tiny tensors: threads only get into each other's way
torch.set_num_threads(1)

settings.register_profile("small", deadline=None, max_examples=25, derandomize=True)
# for mutmut, which runs the tests two thousand times and wants to know no smallest example
settings.register_profile("few", settings.get_profile("small"), max_examples=3, phases=[Phase.explicit, Phase.generate])
settings.load_profile("small")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _starts_no_process(request, monkeypatch):
    """Keep the quick tests quick: processes are for tests with the marker `launch`."""
    if request.node.get_closest_marker("launch") or request.node.get_closest_marker("integration"):
        return

    def refuse(*args, **kwargs):
        pytest.fail("this test starts a process: mark it with `pytest.mark.launch`")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse)


@pytest.fixture(autouse=True)
def _ctrl_c_stays():
    """Put back the handler of SIGINT, which a Trainer that has seen Ctrl-C leaves turned off."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def _ctrl_c(_ctrl_c_stays):
    """Ctrl-C raises KeyboardInterrupt, whatever the handler was."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
