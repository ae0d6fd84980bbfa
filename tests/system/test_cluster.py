"""The cluster example under torchrun and real SLURM: after a preemption, it ends with the same result."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import slurm_cluster
import torch
from launching import ROOT, end, free_port, start
from slurm_cluster import wait_until

pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")

LIMIT = 120
pytestmark = [pytest.mark.launch, pytest.mark.timeout(3 * LIMIT)]
NUMBERS = "NODES={nodes}\nPROCESSES_PER_NODE={processes}\nCPUS_PER_PROCESS=1\nTIME=00:10:00\nWARNING_SECONDS=90\n"
OPTIONS = ["--trainer.max_epochs", "10", "--model.width", "32"]


def copy_example(folder, **numbers):
    """Copy the example, which writes next to its scripts, and return the environment for it."""
    shutil.copytree(ROOT / "examples" / "cluster", folder)
    (folder / "test.env").write_text(NUMBERS.format(**numbers))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "CLUSTER_ENV": str(folder / "test.env"), "PYTHONWARNINGS": "ignore", "TMPDIR": str(folder)}


@contextlib.contextmanager
def two_nodes(folder, environment):
    """Run torchrun as on two nodes, both on this machine."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    try:
        for node in range(2):
            with open(folder / f"log{node}", "w") as log:
                own = {**environment, **address, "NODE_RANK": str(node)}
                command = ["bash", folder / "torchrun.sh", *OPTIONS]
                processes.append(start(command, environment=own, stdout=log, stderr=log))
        yield processes
        assert [process.wait(LIMIT) for process in processes] == [0, 0], (folder / "log0").read_text()[-3000:]
    finally:
        for process in processes:
            end(process)


def has_trained(folder):
    """Return whether some epochs have ended."""
    return any((folder / "runs" / "checkpoints").glob("epoch=2-*"))


def last(folder):
    return torch.load(folder / "runs" / "checkpoints" / "last.ckpt", weights_only=False)


def assert_preempted(folder, output):
    """Check that training was preempted, and return after which step."""
    step = last(folder)["global_step"]
    assert f"Preempted after step {step}" in output
    return step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "cluster"
    with two_nodes(folder, copy_example(folder, nodes=2, processes=1)):
        pass
    return last(folder)


def assert_ends_as(folder, uninterrupted):
    checkpoint = last(folder)
    assert checkpoint["global_step"] == uninterrupted["global_step"] == 280
    for name, weight in uninterrupted["state_dict"].items():
        torch.testing.assert_close(checkpoint["state_dict"][name], weight, rtol=0, atol=0)


def test_preempted_torchrun(uninterrupted, tmp_path):
    folder = tmp_path / "cluster"
    environment = copy_example(folder, nodes=2, processes=1)
    with two_nodes(folder, environment) as (_, second):
        wait_until(lambda: has_trained(folder), LIMIT, "training")
        subprocess.run(["pkill", "-USR1", "-P", str(second.pid)], check=True)  # only one rank gets the signal
    assert 0 < assert_preempted(folder, (folder / "log0").read_text()) < 280
    with two_nodes(folder, environment):
        pass
    assert_ends_as(folder, uninterrupted)


@pytest.mark.skipif(not slurm_cluster.available(), reason="needs root, slurm-wlm and munge")
def test_preempted_slurm_job(uninterrupted):
    scratch = Path(tempfile.mkdtemp())
    scratch.chmod(0o755)  # munged runs as another user
    folder = scratch / "cluster"
    example = copy_example(folder, nodes=1, processes=2)
    try:
        with slurm_cluster.cluster(scratch) as environment:
            environment = {**environment, **example, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

            def call(*command):
                done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=30)
                assert done.returncode == 0, done.stderr
                return done.stdout

            job = call("bash", folder / "submit.sh", *OPTIONS).split()[-1]
            wait_until(lambda: has_trained(folder), 60, "training")
            call("scancel", "--signal=USR1", job)
            output = folder / "runs" / f"lightning-gr-{job}.out"
            wait_until(lambda: "Preempted" in output.read_text(), LIMIT, "preemption")
            step = assert_preempted(folder, output.read_text())
            wait_until(lambda: "COMPLETED" in call("scontrol", "show", "job", job), LIMIT, "the rest")
            assert "Restarts=1" in call("scontrol", "show", "job", job)
        assert 0 < step < 280
        assert "Restored all states" in output.read_text()
        assert_ends_as(folder, uninterrupted)
    finally:
        shutil.rmtree(scratch)
