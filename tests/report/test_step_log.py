"""Logging of values, and the range of each value."""

import csv
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from modules import TinyModule, fit

from lightning_gr.report.step_log import StepLog


class Logs(pl.Callback):
    """Logs the given values at each step."""

    def __init__(self, steps, *args):
        self.step_log, self.steps = StepLog(*args), steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.step_log.log(trainer, pl_module, {k: torch.tensor(v) for k, v in self.steps[batch_idx].items()})


def test_first_last_smallest_and_largest():
    logs = Logs([{"a": 2.0}, {"a": -1.0, "b": 5.0}, {"a": 1.0}], "x/")
    fit(TinyModule(), logs, log_every_n_steps=1)
    ranges = {name: tuple(value.item() for value in values) for name, values in logs.step_log.ranges.items()}
    assert ranges == {"a": (2.0, 1.0, -1.0, 2.0), "b": (5.0, 5.0, 5.0, 5.0)}


def test_nan_is_left_out_of_the_smallest_and_largest():
    logs = Logs([{"a": math.nan}, {"a": 2.0}, {"a": 1.0}], "x/")
    fit(TinyModule(), logs, log_every_n_steps=1)
    first, last, low, high = (value.item() for value in logs.step_log.ranges["a"])
    assert math.isnan(first)
    assert (last, low, high) == (1.0, 1.0, 2.0)


def test_missing_values_are_not_repeated(tmp_path):
    logs = Logs([{"a": 1.0, "b": 2.0}, {"b": 3.0}, {"a": 4.0}], "x/")
    fit(TinyModule(), logs, log_every_n_steps=1, logger=pl.loggers.CSVLogger(tmp_path))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [{k: float(v) for k, v in row.items() if v and k.startswith("x/")} for row in csv.DictReader(file)]
    assert rows == [{"x/a": 1.0, "x/b": 2.0}, {"x/b": 3.0}, {"x/a": 4.0}]


def test_chosen_names_are_in_the_progress_bar_for_each_optimizer():
    logs = Logs([{"grad_norm": 1.0, "optimizer_1/grad_norm": 2.0, "other": 3.0}] * 3, "x/", ("grad_norm",))
    trainer = fit(TinyModule(), logs)
    assert trainer.progress_bar_metrics.keys() == {"x/grad_norm", "x/optimizer_1/grad_norm"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_values_per_rank_are_averaged_and_all_at_once(monkeypatch, world_size):
    asked = []

    def doubled(values):
        asked.append(values.tolist())
        return 2 * values

    monkeypatch.setattr("lightning_gr.report.step_log.mean_over_ranks", doubled)
    monkeypatch.setattr("lightning_gr.report.step_log.forget_logged", lambda trainer, names: None)
    logged = {}
    module = SimpleNamespace(log=lambda name, value, **options: logged.update({name: value.item()}))
    values = {"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": torch.tensor(3.0)}
    StepLog("x/").log(SimpleNamespace(world_size=world_size), module, values, per_rank=("c", "a", "not there"))
    factor = 1 if world_size == 1 else 2
    assert logged == {"x/a": factor * 1.0, "x/b": 2.0, "x/c": factor * 3.0}
    assert asked == ([] if world_size == 1 else [[3.0, 1.0]])


def test_a_prefix_must_be_a_string():
    with pytest.raises(ValueError, match="`prefix` to be a string but got 3"):
        StepLog(3)
