"""mypy and pyright accept our classes in programs for each namespace, and find wrong arguments."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from launching import ROOT

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = """\
import torch
from NAMESPACE import Callback, LightningModule, Trainer
from NAMESPACE.cli import LightningCLI
from NAMESPACE.demos.boring_classes import BoringDataModule, BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gr import (
    SAM,
    Flooding,
    GradientNormMonitor,
    GradientRegularization,
    GradientRegularizationCLI,
    GradientRegularizationMixin,
    MomentumSAM,
    SAMRule,
    SharpnessMonitor,
    TwoPass,
    hessian_eigenvalue,
    regularized_backward,
)
from lightning_gr.rules import GSAMRule


class Late(SAM):
    def should_regularize(self, step: int) -> bool:
        return step > 2

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.started = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("rho", self.schedule.start_step)


class Monitor(SharpnessMonitor):
    def loss(self, pl_module: LightningModule, batch: Tensor) -> Tensor:
        return batch.sum()


class GAN(GradientRegularizationMixin, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Tensor) -> None:
        optimizer = self.optimizers()
        loss: Tensor = self.regularized_step(optimizer, lambda: self.layer(batch).sum(), rule=SAMRule(0.1))
        self.log("loss", loss)
        self.regularized_backward(lambda: self.layer(batch).sum(), self.layer.parameters(), rule=None, level=None)

    def on_train_start(self) -> None:
        self.log("started", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class CLI(GradientRegularizationCLI, LightningCLI):
    def before_fit(self) -> None:
        print(self.trainer.global_step)


def main(loader: "DataLoader[Tensor]") -> None:
    callbacks: list[Callback] = [Late(0.1), Flooding(0.2), MomentumSAM(), GradientNormMonitor()]
    trainer = Trainer(callbacks=[*callbacks, GradientRegularization(0.1), Monitor(), TwoPass(GSAMRule(rho=0.05))])
    trainer.fit(GAN(), loader)
    Trainer(callbacks=SAM())
    GradientRegularizationCLI(BoringModel, BoringDataModule, run=False)
    model = BoringModel()
    regularized_backward(lambda: model.layer.weight.sum(), model, SAMRule(0.1))
    value: float = hessian_eigenvalue(lambda: model.layer.weight.sum(), model).value
    print(value)
"""

WRONG = """\
from lightning_gr import SAM, Flooding, GradientRegularization

SAM(rho="wide")
Flooding()
GradientRegularization(0.1, scheme="sideways")
SAM(0.1).should_regularize(1, 2)
"""
LINES_OF_ERRORS = [("wrong.py", line) for line in (3, 4, 5, 6)]


@pytest.fixture
def programs(tmp_path):
    """A folder with a program for each namespace, and one with an error in each call."""
    for namespace in ("pytorch_lightning", "lightning.pytorch"):
        (tmp_path / f"uses_{namespace.replace('.', '_')}.py").write_text(PROGRAM.replace("NAMESPACE", namespace))
    (tmp_path / "wrong.py").write_text(WRONG)
    return tmp_path


def run(command, folder):
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return ended.stdout


def test_mypy(programs):
    pytest.importorskip("mypy")
    said = run([sys.executable, "-m", "mypy", "--strict", "--cache-dir=cache", "."], programs)
    errors = [line.split(":")[:2] for line in said.splitlines() if ": error:" in line]
    assert [(name, int(line)) for name, line in errors] == LINES_OF_ERRORS, said


def test_pyright(programs):
    if shutil.which("pyright") is None or shutil.which("node") is None:
        pytest.skip("needs pyright and node")
    (programs / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    said = run(["pyright", "--outputjson", "--pythonpath", sys.executable], programs)
    errors = [each for each in json.loads(said)["generalDiagnostics"] if each["severity"] == "error"]
    found = [(os.path.basename(each["file"]), each["range"]["start"]["line"] + 1) for each in errors]
    assert sorted(found) == LINES_OF_ERRORS, said
