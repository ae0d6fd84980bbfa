"""The examples run with their own commands."""

import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modules import assert_same, weights

from lightning_gr import GRRule

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *flags):
    command = [sys.executable, str(EXAMPLES / name), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=EXAMPLES.parent)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.launch
def test_quickstart():
    plain, regularized = map(float, re.findall(r"(0\.\d+) with", run("quickstart.py")))
    assert plain > 0.75
    assert regularized > plain + 0.05


@pytest.mark.launch
def test_selection_of_the_demonstration_s_constants():
    out = run("select_demo_constants.py", "--epochs", "1", "--seeds", "100", "--methods", "plain", "SAM")
    assert len(re.findall(r"ρ=[\d.]+", out)) == 4
    assert out.count("*") >= 2


@pytest.mark.launch
def test_gan(tmp_path):
    """Samples get closer to digits, and a picture is drawn."""
    out = run("gan.py", "--epochs", "8", "--picture", str(tmp_path / "samples.png"))
    before, after = (float(distance) for distance in re.findall(r"distance ([\d.]+)", out))
    assert after < 0.85 * before
    assert (tmp_path / "samples.png").stat().st_size > 10_000


@pytest.mark.launch
def test_gan_on_two_processes():
    """Both processes end with the same weights."""
    first, second = re.findall(r"sum up to ([\d.]+)", run("gan.py", "--epochs", "2", "--devices", "2"))
    assert first == second


@pytest.mark.launch
@pytest.mark.parametrize("name", ["plain_loop.py", "fabric_loop.py", "accelerate_loop.py", "alternating_optimizers.py"])
def test_loops(name):
    accuracies = re.findall(r"test accuracy ([\d.]+)", run(name, "--epochs", "15"))
    assert len(accuracies) == 2
    assert all(float(accuracy) > 0.7 for accuracy in accuracies)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run `python examples/NAME FLAGS` in this process, which has already imported everything."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    loggers += [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(EXAMPLES.parent)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *flags])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.slow
def test_cli_by_yaml_and_flags(run_here, tmp_path):
    flags = ["fit", "--config=examples/cli.yaml", f"--trainer.default_root_dir={tmp_path}"]
    (accuracy,) = re.findall(r"validation accuracy ([\d.]+)", run_here("cli.py", *flags, "--trainer.max_epochs=10"))
    assert float(accuracy) > 0.9
    saved = (tmp_path / "config.yaml").read_text()
    assert "class_path: lightning_gr.GradientRegularization" in saved
    assert "warmup_steps: 100" in saved


@pytest.mark.slow
def test_language_model(run_here):
    """Both runs learn, and start with the same loss."""
    out = run_here("language_model.py", "--epochs", "1", "--characters", "20000")
    bits = [float(number) for number in re.findall(r"(?:before|after) ([\d.]+)", out)]
    assert len(bits) == 4
    assert bits[0] == bits[2]
    assert bits[1] < bits[0]
    assert bits[3] < bits[2]
    assert bits[1] != bits[3]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers warns
def test_finetuning_of_gpt2(run_here):
    out = run_here("finetune_gpt2.py", "--epochs", "2", "--characters", "20000")
    plain, regularized = (float(number) for number in re.findall(r"bits per character ([\d.]+)", out))
    assert plain < 5.5  # 80 equally likely characters have 6.3 bits
    assert regularized == pytest.approx(plain, rel=0.05)


@pytest.mark.slow
def test_batchnorm_counts_each_batch_once(run_here):
    out = run_here("batchnorm_cnn.py", "--epochs", "6")
    found = re.findall(r"accuracy ([\d.]+)   steps (\d+)   batches counted (\d+)", out)
    assert len(found) == 4
    assert {steps for _, steps, _ in found} == {counted for _, _, counted in found} == {"60"}
    assert float(found[0][0]) > 0.5


@pytest.mark.slow
def test_finetuning(run_here):
    found = re.findall(r"([\d.]+) ± [\d.]+", run_here("finetuning.py", "--epochs", "10"))
    assert len(found) == 3
    assert all(float(accuracy) > 0.5 for accuracy in found)


@pytest.mark.slow
def test_compiled_equals_eager(run_here):
    out = run_here("compiled.py", "--epochs", "2", "--backend", "aot_eager")
    (difference,) = re.findall(r"relative difference of the weights (\S+)", out)
    assert float(difference) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Optuna warns
def test_optuna_search(run_here):
    pytest.importorskip("optuna_integration")
    out = run_here("optuna_search.py", "--trials", "6", "--epochs", "4")
    (stopped,) = re.findall(r"6 trials, (\d+) stopped early; best gamma [\d.]+ epsilon [\d.]+", out)
    assert int(stopped) < 6
    assert len(re.findall(r"test accuracy 0\.\d+", out)) == 2


def test_fabric_equals_the_plain_loop(monkeypatch):
    """The weights are identical bit for bit."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import fabric_loop
    import plain_loop

    rule, plain = GRRule(gamma=0.1, epsilon=0.05), plain_loop.network()
    plain_loop.train(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), rule, epochs=2)
    with_fabric, _ = fabric_loop.run(rule, epochs=2)
    assert_same(weights(with_fabric), weights(plain))
