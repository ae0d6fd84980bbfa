"""All ways to start ranks give the same result, and an error on one rank ends all of them and shows the cause."""

import re
import time

import pytest
import replicas
import torch
from launching import HERE, PYTHON, finish, free_port
from modules import assert_near, assert_same

LIMIT = 90
pytestmark = [pytest.mark.launch, pytest.mark.timeout(LIMIT + 30)]
SCRIPT = HERE / "launched.py"


def two_nodes(*args):
    """Return the torchrun commands for two nodes with one process each, both on this machine."""
    port = free_port()
    common = [*PYTHON, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    common += ["--master-addr", "127.0.0.1", "--master-port", port]
    return [[*common, "--node-rank", node, SCRIPT, *args] for node in range(2)]


def commands(launcher, folder, method, fails="runs"):
    if launcher == "torchrun on two nodes":
        return two_nodes(folder, "ddp", 1, 2, method, fails)
    return [[*PYTHON, SCRIPT, folder, launcher, 2, 1, method, fails]]


LAUNCHERS = ["ddp", "ddp_spawn", "ddp_notebook", "torchrun on two nodes"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_result_of_the_joint_batch(launcher, tmp_path):
    codes, output = finish(tmp_path / "log", *commands(launcher, tmp_path, "synced"), limit=LIMIT)
    assert set(codes) == {0}, output[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    assert_near(first, replicas.fit(replicas.Case("SAM"))["weights"], 1e-10)


@pytest.mark.parametrize(
    ("launcher", "method"),
    [("ddp", "synced"), ("ddp", "local"), ("ddp_spawn", "local"), ("torchrun on two nodes", "synced")],
)
def test_an_error_in_the_second_pass_of_one_rank_ends_all_ranks(launcher, method, tmp_path):
    """All ranks end within a time limit, although the other one waits for gradients, and the cause is shown."""
    began = time.monotonic()
    codes, output = finish(tmp_path / "log", *commands(launcher, tmp_path, method, "fails"), limit=LIMIT)
    assert 0 not in codes
    assert re.search(r"ValueError:\s+broken on rank 1", output)
    assert not list(tmp_path.glob("*.pt"))
    assert time.monotonic() - began < LIMIT
