"""The examples run by their own commands."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *flags):
    command = [sys.executable, str(EXAMPLES / name), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=EXAMPLES.parent)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_quickstart():
    (accuracy,) = re.findall(r"validation accuracy: ([\d.]+)", run("quickstart.py"))
    assert float(accuracy) > 0.95


def test_selection_of_the_demonstration_s_constants():
    out = run("select_demo_constants.py", "--epochs", "1", "--seeds", "100", "--methods", "plain", "SAM")
    assert len(re.findall(r"ρ=[\d.]+", out)) == 4
    assert out.count("*") >= 2


def test_gan(tmp_path):
    """Samples come nearer to digits, and a picture is drawn."""
    out = run("gan.py", "--epochs", "8", "--picture", str(tmp_path / "samples.png"))
    before, after = (float(distance) for distance in re.findall(r"distance ([\d.]+)", out))
    assert after < 0.85 * before
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_gan_on_two_processes():
    """Both end with the same weights."""
    first, second = re.findall(r"sum up to ([\d.]+)", run("gan.py", "--epochs", "2", "--devices", "2"))
    assert first == second
