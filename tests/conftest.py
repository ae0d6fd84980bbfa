"""Fixtures and settings shared by all tests."""

import os
import signal
import subprocess

import pytest
import torch
from hypothesis import Phase, settings

# A background job (`pytest &`) ignores SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tensors are tiny, so threads would only add overhead
torch.set_num_threads(1)

settings.register_profile("small", deadline=None, max_examples=25, derandomize=True)
# for mutmut, which runs the tests two thousand times and has no use for shrunk examples
settings.register_profile("few", settings.get_profile("small"), max_examples=3, phases=[Phase.explicit, Phase.generate])
settings.load_profile("small")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_processes(request, monkeypatch):
    """Keep the quick tests quick: only tests marked `launch` may start processes."""
    if request.node.get_closest_marker("launch") or request.node.get_closest_marker("integration"):
        return

    def refuse(*args, **kwargs):
        pytest.fail("this test starts a process: mark it with `pytest.mark.launch`")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse)


@pytest.fixture(autouse=True)
def _restore_sigint_handler():
    """Restore the SIGINT handler: a Trainer that was interrupted by Ctrl-C leaves SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def _ctrl_c(_restore_sigint_handler):
    """Let Ctrl-C raise KeyboardInterrupt, whatever the handler was."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
