"""Whole studies on a small problem: the answer, resuming, sharing, and several ranks."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from launching import HERE, PYTHON, end, finish, free_port, start
from tuned import FLAGS, SIZE, Data, Problem, answer, study

from lightning_gr.tune import TuneError, tune
from lightning_gr.tune.study import GRACE

# whole studies take minutes: `pytest -m integration tests/tune`
pytestmark = pytest.mark.timeout(1800)

PROGRAM = [*PYTHON, HERE / "tuned.py"]


@pytest.mark.integration
def test_a_study_from_python(tmp_path, capsys):
    """Runs all stages; the user's own module stays unchanged, and the global generator has no influence."""
    mine = Problem()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    result = study(tmp_path / "a", test=True)
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in before.items())
    assert [row.method for row in result.rows] == ["plain", "SAM", "flooding"]
    assert all(len(row.values) == len(row.test) == SIZE["seeds"] for row in result.rows)
    assert len([t for t in result.trials if t["stage"] == "search"]) == 2 * SIZE["trials"]
    assert {"best.yaml", "trials.csv", "range.png", "search.png", "final.png"} <= set(os.listdir(tmp_path / "a"))
    assert not [folder for folder in os.listdir(tmp_path / "a" / "trials") if folder.startswith("check")]
    assert capsys.readouterr().out == ""  # nothing is printed without a terminal
    assert result.sentence.endswith(".")


@pytest.mark.integration
def test_an_interruption_within_the_process_changes_nothing(tmp_path):
    """The study is stopped by Ctrl-C in the middle, and started again."""

    class StopsOnce(Data):
        trainings = 0

        def setup(self, stage):
            StopsOnce.trainings += 1
            if StopsOnce.trainings == 9:
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tune(Problem, StopsOnce, monitor="val_loss", trainer=FLAGS, output=tmp_path / "stopped", **SIZE)
    assert signal.getsignal(signal.SIGINT) is handler
    done = StopsOnce.trainings
    again = tune(Problem, StopsOnce, monitor="val_loss", trainer=FLAGS, output=tmp_path / "stopped", **SIZE)
    whole = study(tmp_path / "whole")
    assert answer(again) == answer(whole)
    assert done == 9


@pytest.mark.integration
def test_a_failed_trial_is_kept_and_all_trials_failing_is_an_error(tmp_path):
    class FailsWithSAM(Problem):
        def on_train_epoch_end(self):
            if any(type(callback).__name__ == "SAM" for callback in self.trainer.callbacks):
                raise ValueError("not with SAM")

    result = tune(FailsWithSAM, Data, monitor="val_loss", trainer=FLAGS, output=tmp_path / "a", **SIZE)
    assert "not with SAM" in result.errors["SAM"]
    assert [row.method for row in result.rows] == ["plain", "flooding"]
    only = {**SIZE, "methods": ["SAM"]}
    with pytest.raises(TuneError, match="not with SAM"):
        tune(FailsWithSAM, Data, monitor="val_loss", trainer=FLAGS, output=tmp_path / "b", **only)


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneError, match="cannot write to the folder"):
        study(tmp_path / "file" / "folder")


def test_a_monitor_that_is_not_logged_is_noticed_after_one_step(tmp_path):
    with pytest.raises(TuneError, match="choose from val_acc, val_loss"):
        study(tmp_path, monitor="val_auc")


def launched(folder, *arguments):
    codes, output = finish(folder / "log", [*PROGRAM, *arguments], limit=900)
    assert codes == [0], output[-3000:]
    return output.splitlines()[-1]


@pytest.mark.launch
@pytest.mark.integration
def test_killed_at_random_moments_and_restarted(tmp_path):
    """The answer is the same as without interruptions, and finished trials are not repeated."""
    whole = launched(tmp_path, tmp_path / "whole")
    draw = random.Random(os.environ.get("TUNED_SEED", "0"))
    for _ in range(4):
        process = start([*PROGRAM, tmp_path / "killed"], stdout=subprocess.DEVNULL, environment={"TUNED_SLEEP": "0.05"})
        deadline = time.monotonic() + 200
        while not (tmp_path / "killed" / "study.db").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 5))
        end(process)
    assert launched(tmp_path, tmp_path / "killed") == whole


@pytest.mark.launch
@pytest.mark.integration
@pytest.mark.parametrize("storage", [[], ["journal.log"]], ids=["SQLite", "journal"])
def test_two_processes_share_a_study(tmp_path, storage):
    arguments = [tmp_path / "shared", *(tmp_path / name for name in storage)]
    codes, output = finish(tmp_path / "log", [*PROGRAM, *arguments], [*PROGRAM, *arguments], limit=900)
    assert codes == [0, 0], output[-3000:]
    first, second = output.splitlines()[-2:]
    assert first == second
    assert first.count("'search'") == 2 * SIZE["trials"]


def _as_postgres(command):
    """Switch to the user postgres if this is root, as whom PostgreSQL refuses to run."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command] if os.getuid() == 0 else command
    )


@pytest.fixture
def postgres(tmp_path):
    """A PostgreSQL server on the loopback interface, from Debian's package."""
    pytest.importorskip("psycopg2")
    found = shutil.which("initdb") or shutil.which("initdb", path="/usr/lib/postgresql/15/bin")
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    folder, port = tmp_path / "postgres", free_port()
    folder.mkdir()
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        for parent in list(folder.parents)[:-2]:
            parent.chmod(0o755)
    initdb = _as_postgres([found, "-D", folder / "data", "-U", "tune", "--auth=trust", "--no-sync"])
    subprocess.run(list(map(str, initdb)), check=True, capture_output=True, cwd="/")
    options = ["-k", folder, "-h", "127.0.0.1", "-p", port, "-F"]
    server = start(
        _as_postgres([str(found).replace("initdb", "postgres"), "-D", folder / "data", *options]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    yield f"postgresql+psycopg2://tune@127.0.0.1:{port}/postgres"
    end(server)


@pytest.mark.launch
@pytest.mark.integration
def test_two_machines_share_a_study_in_postgresql(tmp_path, postgres):
    """Each has its own output folder, so they only share the database."""
    commands = [[*PROGRAM, tmp_path / name, postgres] for name in ("first", "second")]
    codes, output = finish(tmp_path / "log", *commands, limit=900)
    assert codes == [0, 0], output[-3000:]
    first, second = output.splitlines()[-2:]
    assert first == second
    assert first.count("'search'") == 2 * SIZE["trials"]


@pytest.mark.launch
@pytest.mark.integration
def test_a_study_on_two_ranks(tmp_path):
    """Two CPU ranks, started by Lightning itself, which take part in each training."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys\nfrom tuned import *\n"
        "flags = {**FLAGS, 'strategy': 'ddp', 'devices': 2}\n"
        "result = study(sys.argv[1], trainer=flags)\n"
        "print(result.rows[1].label, len(result.trials))\n"
    )
    codes, output = finish(tmp_path / "log", [*PYTHON, script, tmp_path / "out"], limit=900)
    assert codes == [0], output[-3000:]
    lines = [line for line in output.splitlines() if line.startswith("SAM(rho=")]
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_the_grace_period_is_longer_than_several_heartbeats():
    from lightning_gr.tune.study import BEAT

    assert GRACE > 3 * BEAT
