"""Arguments are checked before anything is trained."""

import pytest

from lightning_gr.tune.plan import Plan, Task, goal_of, seconds_of
from lightning_gr.tune.space import TuneError


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val_acc", "max"), ("val/accuracy", "max"), ("valid_f1", "max"), ("val_auroc", "max"), ("R2", "max"),
        ("val_loss", "min"), ("loss/val", "min"), ("val_rmse", "min"), ("valid_error", "min"), ("perplexity", "min"),
    ],
)  # fmt: skip
def test_the_mode_of_common_names_is_known(monitor, mode):
    assert goal_of(monitor).mode == mode


@pytest.mark.parametrize("monitor", ["val_score", "gap", "loss_accuracy", "remap_rate"])
def test_other_names_need_a_mode(monitor):
    with pytest.raises(TuneError, match="--mode max or --mode min"):
        goal_of(monitor)
    assert goal_of(monitor, "min").sign == -1.0


@pytest.mark.parametrize(("monitor", "mode"), [("", None), (None, None), (3, None), ("val_acc", "up")])
def test_wrong_goals_are_refused(monitor, mode):
    with pytest.raises(TuneError):
        goal_of(monitor, mode)


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:30:00", 1800), ("01:00:00:01", 86401), ("90", 90), (2.5, 2.5), (None, None)]
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "10:30", "-5", "0", "00:00:00", "1:2:3:4:5"])
def test_wrong_durations_are_refused(text):
    with pytest.raises(TuneError, match="HH:MM:SS"):
        seconds_of(text)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"seeds": 0}, {"seeds": 1.5}, {"trials": True}, {"range_steps": -1}])
def test_numbers_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(TuneError, match=f"--{name} to be a whole number"):
        Plan.checked(monitor="val_loss", **wrong)


def test_settings_of_a_method_that_is_not_compared_are_refused():
    with pytest.raises(TuneError, match="--gr is set, but none of --methods uses it"):
        Plan.checked(monitor="val_loss", methods=["SAM"], settings={"gr": {"gamma": 0.1}})


def test_the_identity_excludes_settings_that_may_grow():
    small = Plan.checked(monitor="val_loss", methods=["SAM"], trials=2, seeds=2)
    large = Plan.checked(monitor="val_loss", methods=["SAM", "F-GR"], trials=20, seeds=5, max_time="01:00:00")
    assert small.identity() == large.identity()
    assert small.identity() != Plan.checked(monitor="val_acc", methods=["SAM"]).identity()


def test_each_task_has_its_own_folder():
    tasks = [Task(stage, name, index=i) for stage in ("search", "final") for name in ("SAM", "F-GR") for i in (0, 1)]
    assert len({task.folder for task in tasks}) == len(tasks)
