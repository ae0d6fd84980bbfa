"""Callbacks from the environment variable LIGHTNING_GR, in unmodified Trainers of both namespaces."""

import importlib
import logging
import os
import subprocess
import sys

import pytest
import pytorch_lightning as pl
from lightning_utilities.core import rank_zero
from modules import TinyModule, assert_same, fit, make_loader, weights

import lightning_gr_startup
from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr.cli.environment import callbacks_from

SOME = ["*.bias", "net.0.*"]
NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def trained(*callbacks):
    module = TinyModule()
    fit(module, *callbacks)
    return weights(module.net)


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ("gamma=0.3,epsilon=0.2", lambda: [GradientRegularization(0.3, 0.2)]),
        ("gr normalize=true  exclude=*.bias|net.0.*", lambda: [GradientRegularization(normalize=True, exclude=SOME)]),
        ("sam,rho=0.1,start_step=1", lambda: [SAM(0.1, start_step=1)]),
        ("flooding,level=1.1 ; gamma=0.3", lambda: [Flooding(1.1), GradientRegularization(0.3)]),
        ("SAM,rho=0.1", lambda: [SAM(0.1)]),
        ("Asam,rho=0.1", lambda: [SAM(0.1, adaptive=True)]),
        ("F-GR,gamma=0.3", lambda: [GradientRegularization(0.3)]),
        ("b-gr", lambda: [GradientRegularization(scheme="backward")]),
        ("Penalty,gamma=0.1", lambda: [GradientRegularization(0.1, normalize=True)]),
        ("FLOODING,level=1.1", lambda: [Flooding(1.1)]),
        ("off", list),
        (" ", list),
    ],
)  # fmt: skip
def test_trains_as_with_callbacks_in_code(value, same, monkeypatch):
    expected = trained(*same())
    monkeypatch.setenv("LIGHTNING_GR", value)
    assert_same(trained(), expected)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_both_namespaces_use_it_and_log_it_once(namespace, monkeypatch, caplog):
    lightning = importlib.import_module(namespace)
    boring = importlib.import_module(f"{namespace}.demos.boring_classes").BoringModel
    monkeypatch.setenv("LIGHTNING_GR", "sam,rho=0.1")
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    # patch the logger itself: which one is used, and whether it is quiet, depends on earlier imports
    caplog.set_level(logging.INFO, rank_zero.log.name)
    for name, value in {"handlers": [caplog.handler], "propagate": False, "disabled": False}.items():
        monkeypatch.setattr(rank_zero.log, name, value)
    with caplog.at_level(logging.INFO):
        trainer.fit(boring())
        trainer.validate(boring(), verbose=False)
    assert [type(callback) for callback in trainer.callbacks].count(SAM) == 1
    assert caplog.text.count("LIGHTNING_GR is set: training with SAM(rho=0.1), g = ") == 1


def test_a_second_fit_does_not_add_it_again(monkeypatch):
    monkeypatch.setenv("LIGHTNING_GR", "gamma=0.1")
    trainer = fit(TinyModule())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(TinyModule(), make_loader())
    assert sum(isinstance(callback, GradientRegularization) for callback in trainer.callbacks) == 1


@pytest.mark.parametrize(
    ("value", "own", "stays"),
    [
        ("sam", GradientRegularization(), "GradientRegularization"),
        ("flooding,level=1", Flooding(2), "Flooding"),
    ],
)
def test_the_script_s_own_method_takes_precedence(value, own, stays, monkeypatch):
    expected = trained(own)
    monkeypatch.setenv("LIGHTNING_GR", value)
    with pytest.warns(UserWarning, match=f"LIGHTNING_GR requests .*, but the script's own {stays} takes precedence"):
        assert_same(trained(own), expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "gamma=-1",
            "In LIGHTNING_GR: Expected argument `gamma` to be a non-negative float but got -1.0, for example LIGHTN",
        ),
        ("gamma=much", "Expected argument `gamma` to be a non-negative float but got 'much'"),
        ("interval=0.5", "Expected argument `interval` to be an integer of at least 1 but got '0.5'"),
        ("normalize=perhaps", "Expected argument `normalize` to be True or False but got 'perhaps'"),
        ("scheme=sideways", "Expected argument `scheme` to be one of 'forward', 'backward'"),
        ("rho=0.1", "Expected LIGHTNING_GR to set only gamma, epsilon, .* for 'gr' but got 'rho=0.1', for example"),
        ("sam,0.1", "for 'sam' but got '0.1'"),
        (
            "adam",
            "Expected LIGHTNING_GR to name one of gr, sam, msam, flooding, f-gr, .*asam but got 'adam', for",
        ),
        ("b-gr,scheme=forward", "to set only gamma, epsilon, normalize, .* for 'b-gr' but got 'scheme=forward'"),
        ("sam; gamma=0.1", "at most one method besides flooding but got 'sam; gamma=0.1', for example"),
        ("flooding,level=1;flooding,level=2", "at most one flood level but got"),
        ("flooding", "In LIGHTNING_GR: .*missing 1 required positional argument: 'level'"),
    ],
)
def test_a_wrong_value_is_refused_by_the_constructor_of_the_trainer(value, said, monkeypatch):
    monkeypatch.setenv("LIGHTNING_GR", value)
    with pytest.raises(ValueError, match=said):
        pl.Trainer(accelerator="cpu", logger=False)


def test_nothing_is_imported_without_the_variable(monkeypatch):
    monkeypatch.delenv("LIGHTNING_GR", raising=False)
    monkeypatch.setattr("builtins.__import__", None)
    assert lightning_gr_startup.callbacks() == []


def test_callbacks_can_be_pickled_for_spawned_processes():
    import pickle

    [callback] = callbacks_from("gamma=0.1")
    assert pickle.loads(pickle.dumps(callback)).callback.rule == callback.callback.rule


@pytest.mark.parametrize("value", ["gamma=0.1,exclude=nothing", "sam,exclude=net.0.*|nothing"])
def test_errors_of_the_callback_name_the_variable(value, monkeypatch):
    monkeypatch.setenv("LIGHTNING_GR", value)
    with pytest.raises(SystemExit, match=r"^LIGHTNING_GR requests \w+\(.*\), but: Expected each pattern in `exclude`"):
        trained()


def test_a_trainer_that_cannot_be_regularized(monkeypatch):
    monkeypatch.setenv("LIGHTNING_GR", "sam")
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(SystemExit, match=r"^LIGHTNING_GR requests SAM\(rho=0.05\), but: "):
        fit(module)


PROGRAM = """
import pytorch_lightning as pl
pl.Trainer(accelerator="cpu", logger=False)
"""


@pytest.mark.launch
def test_a_program_ends_with_one_line(tmp_path):
    environment = os.environ | {"LIGHTNING_GR": "sam,rho=-1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        "In LIGHTNING_GR: Expected argument `rho` to be a non-negative float but got -1.0, for example"
    )
