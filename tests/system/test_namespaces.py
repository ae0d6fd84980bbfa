"""One set of classes for `pytorch_lightning` and `lightning.pytorch`, and what gets imported."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modules import TinyModule, assert_same, fit, make_loader, mlp, weights

import lightning_gr
from lightning_gr import SAM, Flooding, GradientRegularization

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def module_of(namespace):
    """Create a module of ``namespace`` that trains like TinyModule."""

    class Module(importlib.import_module(namespace).LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("make", [lambda: GradientRegularization(0.3, 0.2), lambda: SAM(0.2), lambda: Flooding(1.05)])
def test_trains_the_same_in_a_list_and_bare(namespace, bare, make):
    expected = TinyModule()
    fit(expected, make())
    module = module_of(namespace)
    callbacks = make() if bare else [make()]
    trainer = importlib.import_module(namespace).Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
    trainer.fit(module, make_loader())
    assert_same(weights(module.net), weights(expected.net))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_is_a_callback_of_each(namespace):
    base = importlib.import_module(namespace).Callback
    assert all(issubclass(kind, base) for kind in (GradientRegularization, SAM, Flooding))


WITHOUT_LIGHTNING = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning":
            raise ModuleNotFoundError(name)

sys.modules.pop("lightning", None)
sys.meta_path.insert(0, Blocker())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "lightning" else real(name, *rest)

import os
os.environ["LIGHTNING_GR"] = "flooding,level=0.1"
import lightning_gr
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

assert pl.Callback in lightning_gr.SAM.__mro__
trainer = pl.Trainer(
    max_steps=2, callbacks=lightning_gr.SAM(), accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(BoringModel())
assert any(isinstance(callback, lightning_gr.Flooding) for callback in trainer.callbacks)
from lightning_gr.cli import main as cli
assert cli.main(["fit", "--model=pytorch_lightning.demos.boring_classes.BoringModel", "--gr.gamma=0.1",
                 "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 0
print("steps", trainer.global_step, [name for name in sys.modules if name.split(".")[0] == "lightning"])
"""


@pytest.mark.launch
def test_works_if_only_pytorch_lightning_is_installed(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_LIGHTNING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1] == "steps 2 []"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--help"], 0, "commands:"),
        (["demo", "--help"], 0, "--seeds"),
        (["--version"], 0, f"lightning-gr {lightning_gr.__version__}"),
        (["demo", "--seeds=0"], 2, "expected a positive whole number but got '0'"),
        (["nothing"], 2, "invalid choice: 'nothing'"),
    ],
)
def test_help_version_and_errors_of_the_command_import_no_package(flags, code, said, tmp_path):
    script = tmp_path / "lightning-gr"  # the script that pip writes for an entry point
    module, function = entry_point().split(":")
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    command = [sys.executable, "-X", "importtime", str(script), *flags]
    # in ASCII, as without a locale
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert ended.returncode == code
    assert said in ended.stdout + ended.stderr
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "lightning_gr_startup" in imported
    assert not imported & {"torch", "numpy", "pytorch_lightning", "lightning", "rich", "lightning_gr"}


def entry_point():
    (line,) = [line for line in PYPROJECT.read_text().splitlines() if line.startswith("lightning-gr = ")]
    return line.split('"')[1]


NAMES = """
import pytorch_lightning
import lightning_gr
from lightning_gr import *
from lightning_utilities.core import rank_zero
# each namespace, when imported, takes all log lines; they stay with the one that the user imported
assert "lightning.pytorch" not in __import__("sys").modules
assert rank_zero.log.name.startswith("pytorch_lightning."), rank_zero.log.name
print(*(name for name in lightning_gr.__all__ if name in globals()))
"""


@pytest.mark.launch
def test_log_lines_stay_in_the_namespace_of_the_user():
    ended = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == lightning_gr.__all__
