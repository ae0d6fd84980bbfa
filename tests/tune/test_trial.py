"""A single training: what is measured, and how it ends."""

import logging
import math

import pytest
import torch
from tuned import Data, Problem

from lightning_gr.tune.program import Functions
from lightning_gr.tune.space import TuneError
from lightning_gr.tune.trial import Goal, Interrupted, check, train

LOSS = Goal("val_loss", "min")


def trained(tmp_path, module=Problem, goal=LOSS, callbacks=(), seed=0, flags=None, **options):
    program = Functions(module, Data, {"max_epochs": 3, "accelerator": "cpu", **(flags or {})})
    return train(program, callbacks, seed, tmp_path / "trial", goal, **options)


def test_the_metric_of_each_validation_and_the_cost_are_recorded(tmp_path):
    outcome = trained(tmp_path)
    assert len(outcome.values) == 3
    assert outcome.value == outcome.values[-1] < outcome.values[0]
    assert outcome.steps == 9
    assert 0 < outcome.step_seconds < outcome.seconds
    assert (outcome.pruned, outcome.error, outcome.test) == (False, None, {})


def test_a_trial_is_determined_by_its_seed(tmp_path):
    assert trained(tmp_path, seed=1).values == trained(tmp_path, seed=1).values
    assert trained(tmp_path, seed=1).values != trained(tmp_path, seed=2).values


def test_a_poor_trial_is_ended_early(tmp_path):
    asked = []

    def prune(number, value, share):
        asked.append((number, value, share))
        return number == 1

    outcome = trained(tmp_path, prune=prune)
    assert outcome.pruned
    assert [number for number, _, _ in asked] == [0, 1]
    assert [value for _, value, _ in asked] == outcome.values
    assert [share for _, _, share in asked] == pytest.approx([1 / 3, 2 / 3])


def test_progress_reaches_the_end(tmp_path):
    shares = []
    trained(tmp_path, tick=shares.append)
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == pytest.approx(1.0)


def test_the_test_set_is_evaluated_at_the_end(tmp_path):
    assert set(trained(tmp_path, test=True).test) == {"test_acc"}


class Fails(Problem):
    def on_train_epoch_end(self):
        raise ValueError("no such luck\nand more")


def test_an_error_is_kept_on_one_line(tmp_path):
    assert trained(tmp_path, Fails).error == "ValueError: no such luck"
    with pytest.raises(TuneError, match="plain training fails: ValueError: no such luck"):
        check(Functions(Fails, Data, {"accelerator": "cpu"}), tmp_path / "trial", LOSS)


class Stopped(Problem):
    stop: type[BaseException] = KeyboardInterrupt

    def on_train_epoch_end(self):
        raise self.stop


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_is_distinguished_from_errors(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, Stopped)


def test_the_error_for_a_monitor_that_is_not_logged_lists_logged_ones(tmp_path):
    with pytest.raises(TuneError, match=r"'val_auc' was not logged .*: choose from val_acc, val_loss"):
        trained(tmp_path, goal=Goal("val_auc", "max"))


class WithoutValidation(Problem):
    validation_step = None


@pytest.mark.filterwarnings("ignore:.*validation_step")
@pytest.mark.parametrize("flags", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 100}])
def test_a_training_without_validation(tmp_path, flags):
    with pytest.raises(TuneError, match="no validation ran"):
        trained(tmp_path, flags=flags)


def test_a_strategy_that_spawns_its_ranks_is_refused(tmp_path):
    with pytest.raises(TuneError, match="use strategy='ddp'"):
        trained(tmp_path, flags={"strategy": "ddp_spawn", "devices": 2})


def test_the_check_takes_one_step(tmp_path):
    outcome = check(Functions(Problem, Data, {"max_epochs": 50, "accelerator": "cpu"}), tmp_path / "trial", LOSS)
    assert (outcome.steps, len(outcome.values)) == (1, 1)


def test_lightning_is_quiet_during_a_trial_and_restored_afterwards(tmp_path, capfd):
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    trained(tmp_path)
    assert logger.level == before
    assert "GPU available" not in capfd.readouterr().err


class Diverges(Problem):
    def training_step(self, batch):
        return super().training_step(batch) * torch.inf


def test_divergence_is_not_an_error(tmp_path):
    outcome = trained(tmp_path, Diverges)
    assert math.isnan(outcome.value)
    assert outcome.error is None
