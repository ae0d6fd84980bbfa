"""The demonstration as a command: its output, its files, and Ctrl-C."""

import csv
import io
import os
import subprocess
import sys

import pytest

from lightning_gr.cli import main as cli
from lightning_gr.cli.demo import task as demo


@pytest.mark.slow
def test_demo_shows_table_figure_and_values(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "new" / "folder"
    code = cli.main(["demo", "--seeds", "2", "--epochs", "2", "--methods", "plain", "F-GR", "--output", str(folder)])
    out = capsys.readouterr().out
    assert code == 0
    assert "test accuracy" in out
    assert "γ=" in out
    assert max(map(len, out.splitlines())) <= 80 + len(str(folder))
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "demo.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [
        (method, str(seed), str(epoch)) for seed in (0, 1) for method in ("plain", "F-GR") for epoch in (1, 2)
    ]


@pytest.mark.slow
def test_files_are_written_if_nothing_can_be_printed(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.warns(UserWarning, match="could not print"):
        code = cli.main(["demo", "--seeds=1", "--epochs=1", "--methods", "plain", "--output", str(tmp_path)])
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"demo.csv", "demo.png"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo.csv", "demo.png"])
def test_results_are_printed_if_no_file_can_be_written(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert cli.main(["demo", "--seeds=1", "--epochs=1", "--methods", "plain", "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "test accuracy" in printed.out
    assert "Figure" not in printed.out
    (line,) = [line for line in printed.err.splitlines() if "error" in line]
    assert line.startswith("lightning-gr: error: cannot write to the folder ")


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_demo_in_any_encoding(encoding, tmp_path):
    command = [sys.executable, "-m", "lightning_gr", "demo", "--seeds=1", "--epochs=1", "--methods", "plain", "F-GR"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    ended = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, capture_output=True, timeout=200, check=False
    )
    out = ended.stdout.decode(encoding)
    assert ended.returncode == 0, ended.stderr
    assert ("γ=1 ε=0.5" if encoding == "utf-8" else "gamma=1") in out
    assert "?" not in out
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"demo.csv", "demo.png"}


def test_ctrl_c_keeps_results(tmp_path, capsys, monkeypatch):
    real, calls = demo._Curves.on_train_epoch_end, []

    def interrupt(self, trainer, pl_module):
        calls.append(self.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, trainer, pl_module)

    monkeypatch.setattr(demo._Curves, "on_train_epoch_end", interrupt)
    code = cli.main(["demo", "--seeds", "1", "--epochs", "2", "--methods", "plain", "SAM", "--output", str(tmp_path)])
    assert code == 130
    assert "Interrupted" in capsys.readouterr().out
    assert len((tmp_path / "demo.csv").read_text().splitlines()) == 1 + 2
