"""One set of classes for `pytorch_lightning` and `lightning.pytorch`, and what importing them costs."""

import importlib
import subprocess
import sys

import pytest
import torch
from modules import TinyModule, assert_same, fit, make_loader, mlp, weights

import lightning_gr
from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr._compat import namespace_of

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def module_of(namespace):
    """TinyModule's training as a module of ``namespace``."""

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
def test_trains_alike_in_a_list_and_bare(namespace, bare, make):
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


def test_the_namespace_of_a_class():
    import lightning.pytorch
    import pytorch_lightning

    assert namespace_of() == namespace_of(pytorch_lightning.LightningModule, torch.nn.Module) == "pytorch_lightning"
    assert namespace_of(type("Own", (lightning.pytorch.LightningModule,), {})) == "lightning.pytorch"


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


def test_works_where_only_pytorch_lightning_is_installed(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_LIGHTNING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1] == "steps 2 []"


@pytest.mark.parametrize("program", [["-m", "lightning_gr"], ["lightning-gr"]])
def test_help_and_version_do_not_import_torch(program, tmp_path):
    if program == ["lightning-gr"]:  # as pip writes it
        (tmp_path / "lightning-gr").write_text("import sys\nfrom lightning_gr.cli.main import main\nsys.exit(main())\n")
        program = [str(tmp_path / "lightning-gr")]
    for flag in ("--help", "--version"):
        command = [sys.executable, "-X", "importtime", *program, flag]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert "lightning" in ended.stdout
        imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
        assert "lightning_gr.cli" in imported or "-m" in program
        assert not imported & {"torch", "numpy", "pytorch_lightning", "lightning", "rich"}


LAZY = """
import sys
sys.argv = ["/some/where/lightning-gr.exe"]
import lightning_gr
assert "torch" not in sys.modules
import pytorch_lightning
from lightning_gr import *
from lightning_utilities.core import rank_zero
# each namespace, when imported, takes all log lines; they stay with the one that the user imported
assert "lightning.pytorch" in sys.modules
assert rank_zero.log.name.startswith("pytorch_lightning."), rank_zero.log.name
assert SAM is lightning_gr.callbacks.base.SAM
try:
    lightning_gr.nothing
except AttributeError as error:
    print(error)
print(*(name for name in lightning_gr.__all__ if name in globals()))
"""


def test_the_command_has_every_name_when_it_asks():
    ended = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    error, names = ended.stdout.splitlines()
    assert error == "module 'lightning_gr' has no attribute 'nothing'"
    assert names.split() == lightning_gr.__all__
