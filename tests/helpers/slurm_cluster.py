"""A local SLURM cluster for a test: one node, two CPUs, without systemd.

Needs root, and on Debian ``apt-get install slurm-wlm munge``.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

from launching import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=5
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def available():
    """Whether a cluster can be started on this machine."""
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


def _munge(folder):
    """Start the authentication service, which requires its own user and private folders."""
    user = pwd.getpwnam("munge")
    home = folder / "munge"
    home.mkdir(mode=0o755)
    key = home / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (home, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    command = ["munged", "--foreground", "--force", "--key-file", key, "--socket", home / "socket"]
    command += ["--pid-file", home / "pid", "--log-file", home / "log", "--seed-file", home / "seed"]
    with open(folder / "munged.out", "w") as log:
        return subprocess.Popen(
            [*map(str, command)], user="munge", group="munge", extra_groups=[], stdout=log, stderr=log
        )


def wait_until(condition, limit, what):
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {limit} s")
        time.sleep(0.2)


@contextlib.contextmanager
def cluster(folder):
    """Start the cluster, yield the environment for its commands, and stop it afterwards."""
    folder = Path(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    configuration = folder / "slurm.conf"
    host = socket.gethostname()
    text = CONFIGURATION.format(host=host, folder=folder, controller=free_port(), daemon=free_port())
    configuration.write_text(text)
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    processes = [_munge(folder)]
    try:
        wait_until((folder / "munge" / "socket").exists, 20, "munged")
        for program in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with open(folder / f"{program[0]}.out", "w") as log:
                processes.append(subprocess.Popen(program, env=environment, stdout=log, stderr=log))

        def idle():
            done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
            return done.stdout.strip() == "idle"

        wait_until(idle, 40, "SLURM")
        yield environment
    finally:
        subprocess.run(["scancel", "--state=RUNNING"], env=environment, check=False, timeout=20)
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
