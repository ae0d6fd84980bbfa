"""`lightning-gr tune`: flags, files and messages."""

import importlib.util

import pytest
import yaml

from lightning_gr.cli import main as cli

BASE = [
    "tune", "--model=tuned.Problem", "--data=tuned.Data", "--trainer.accelerator=cpu", "--trainer.max_epochs=2",
    "--range_steps=4", "--trials=2", "--seeds=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _without_flags_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-gr"])


@pytest.mark.slow
def test_the_command_writes_a_configuration_for_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    flags = ["--monitor=val_loss", "--methods", "SAM", "flooding", "--test", f"--output={output}", "--sam.interval=2"]
    assert cli.main([*BASE, *flags]) == 0
    printed = capsys.readouterr()
    assert "− plain" in printed.out
    assert "on the test set" in printed.out
    assert "range test" not in printed.out  # no progress bar without a terminal
    assert not (tmp_path / "lightning_logs").exists()
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert "monitor" not in best
    assert "methods" not in best
    # with a method in it as well, whether or not one helped here
    best["sam"] = {"rho": 0.1, "interval": 2}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best))
    for config in (output / "best.yaml", tmp_path / "best.yaml"):
        assert cli.main(["fit", "--config", str(config)]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--monitor is required"),
        (["--monitor=val_score"], "add --mode max or --mode min"),
        (["--monitor=val_loss", "--mode=up"], "--mode to be max or min but got 'up'"),
        (["--monitor=val_loss", "--methods", "Adam"], "unknown method 'Adam': choose from plain, F-GR"),
        (["--monitor=val_loss", "--trials=0"], "--trials to be a whole number of at least 1 but got 0"),
        (["--monitor=val_loss", "--max_time=soon"], "--max_time to be HH:MM:SS"),
        (["--monitor=val_loss", "--methods", "SAM", "--gr.gamma=0.1"], "--gr is set, but none of --methods uses it"),
        (["--monitor=val_loss", "--sam.rho=-1"], "--sam: Expected argument `rho`"),
        (["--monitor=val_loss", "--storage=postgresql://127.0.0.1:1/x"], "cannot open the storage"),
        (["--monitor=val_auc"], "'val_auc' was not logged by a validation: choose from val_acc, val_loss"),
    ],
)
def test_wrong_use_is_one_line(flags, said, tmp_path, capsys):
    try:
        code = cli.main([*BASE, *flags, f"--output={tmp_path / 'out'}"])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2
    assert said in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("lightning-gr")


def test_several_methods_may_have_settings(tmp_path, capsys):
    """Unlike in `fit`, which trains only one method."""
    flags = ["--monitor=nothing_loss", "--sam.interval=2", "--gr.interval=2", f"--output={tmp_path}"]
    assert cli.main([*BASE, *flags]) == 2
    assert "'nothing_loss' was not logged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optuna", "matplotlib", "jsonargparse"])
def test_a_missing_extra_is_named(name, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    assert cli.main(["tune"]) == 2
    assert f"tuning needs {name}: pip install 'lightning_gr[tune]'" in capsys.readouterr().err
