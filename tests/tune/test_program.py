"""Each training has a new module and Trainer, and leaves no files among the user's runs."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from tuned import Data, Problem

from lightning_gr import SAM
from lightning_gr.tune.program import Functions
from lightning_gr.tune.space import TuneError


def build(tmp_path, *methods, **flags):
    return Functions(Problem, Data, {"accelerator": "cpu", **flags}).build(methods, tmp_path / "trial")


def test_each_build_makes_a_new_module_and_data(tmp_path):
    program = Functions(Problem, Data, {"accelerator": "cpu"})
    first, second = program.build([], tmp_path / "a"), program.build([], tmp_path / "b")
    assert first.module is not second.module
    assert first.fit["datamodule"] is not second.fit["datamodule"]
    assert first.trainer is not second.trainer


def test_loggers_checkpoints_and_bars_of_the_user_are_left_out(tmp_path):
    users = [ModelCheckpoint(tmp_path / "mine"), RichProgressBar(), LearningRateMonitor(), EarlyStopping("val_loss")]
    method = SAM()
    built = build(tmp_path, method, callbacks=users, logger=CSVLogger(str(tmp_path / "logs")))
    kinds = [type(callback) for callback in built.trainer.callbacks]
    assert kinds[0] is SAM
    assert {LearningRateMonitor, EarlyStopping} <= set(kinds)
    assert not {ModelCheckpoint, RichProgressBar} & set(kinds)
    assert Path(built.trainer.log_dir) == tmp_path / "trial"
    assert built.trainer.default_root_dir == str(tmp_path / "trial")
    assert users[3] not in built.trainer.callbacks  # a copy for each training


def test_no_logger_if_the_user_has_none(tmp_path):
    assert build(tmp_path, logger=False).trainer.loggers == []


def test_the_namespace_is_that_of_the_module(tmp_path):
    import lightning.pytorch
    from lightning.pytorch.demos.boring_classes import BoringModel

    assert type(build(tmp_path).trainer) is pl.Trainer
    other = Functions(BoringModel, None, {"accelerator": "cpu"}).build([], tmp_path / "trial")
    assert type(other.trainer) is lightning.pytorch.Trainer
    assert other.fit == {}


def test_loaders_in_a_tuple(tmp_path):
    data = Data()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    built = Functions(Problem, lambda: loaders, {"accelerator": "cpu"}).build([], tmp_path / "trial")
    assert built.fit == {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}
    assert built.test == {"dataloaders": loaders[2]}


@pytest.mark.parametrize("wrong", [{"make_module": Problem()}, {"make_data": Data()}])
def test_instances_instead_of_functions_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(TuneError, match=f"`{name}` to be a function"):
        Functions(**{"make_module": Problem, "make_data": Data, **wrong})


def test_what_distinguishes_a_study():
    def settings(module=Problem, **flags):
        return Functions(module, Data, flags).settings

    assert settings(max_epochs=2) == settings(max_epochs=2)
    assert settings(max_epochs=2) != settings(max_epochs=3)
    assert settings(pl.LightningModule) != settings()
