"""The callback that floods the loss: against the explicit formula, with other callbacks, and what it logs."""

import csv

import pytest
import pytorch_lightning as pl
from modules import METHODS, SOME, Manual, TinyModule, assert_same, cross_entropy, fit, make_batches, mlp, weights

from lightning_gr import SAM, Flooding, flood

LEVEL = 1.09  # lies between the losses, see core/test_two_pass.py
EPOCHS = 3
EVERY = {"log_every_n_steps": 1}


def logged(trainer, prefix="gr/"):
    found = {k: v.item() for k, v in trainer.callback_metrics.items()}
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def rows(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_flooding_alone_equals_the_explicit_formula_bit_for_bit(accumulate):
    flooded = TinyModule(loss=lambda net, batch: flood(cross_entropy(net, batch), LEVEL))
    hooked = TinyModule()
    fit(flooded, max_epochs=EPOCHS, accumulate_grad_batches=accumulate)
    fit(hooked, Flooding(LEVEL), max_epochs=EPOCHS, accumulate_grad_batches=accumulate)
    assert_same(weights(hooked.net), weights(flooded.net))


@pytest.mark.parametrize("name", SOME)
def test_the_order_of_the_callbacks_does_not_matter(name):
    first, last = TinyModule(), TinyModule()
    fit(first, Flooding(LEVEL), METHODS[name].callback(), max_epochs=EPOCHS)
    fit(last, METHODS[name].callback(), Flooding(LEVEL), max_epochs=EPOCHS)
    assert_same(weights(first.net), weights(last.net))


def test_flooding_needs_no_second_pass_and_logs_the_original_loss():
    calls = []

    class Logging(TinyModule):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    trainer = fit(Logging(), Flooding(100.0), limit_train_batches=1)
    assert calls == [0]
    assert trainer.callback_metrics["loss"] == cross_entropy(mlp(), make_batches()[0])


# --- the share of flooded losses


def test_share_of_flooded_losses(tmp_path):
    """The share since it was last logged, over first passes only."""
    losses = []

    class Notes(TinyModule):
        def on_before_backward(self, loss):
            losses.append(loss.item())

    for callbacks in ([], [SAM(0.01)]):
        losses.clear()
        folder = tmp_path / str(len(callbacks))
        options = {"logger": pl.loggers.CSVLogger(folder), "log_every_n_steps": 4, "max_epochs": 4}
        fit(Notes(), *callbacks, Flooding(1.05), **options)
        shares = [row["gr/flooded"] for row in rows(folder)]
        below = [loss < 1.05 for loss in losses]
        assert shares == [sum(below[i : i + 4]) / 4 for i in (0, 4, 8)]
        assert 0 < sum(below) < 12


def test_flooding_by_hand_and_in_windows():
    module = Manual()
    assert logged(fit(module, Flooding(100.0, prefix="f/"), **EVERY), "f/") == {"flooded": 1.0}
    trainer = fit(TinyModule(), Flooding(1.2), accumulate_grad_batches=3, **EVERY)
    below = [cross_entropy(mlp(), batch).item() < 1.2 for batch in make_batches()]
    assert logged(trainer) == {"flooded": pytest.approx(sum(below) / 3)}
    assert logged(fit(TinyModule(), Flooding(1.0, metrics=()), **EVERY)) == {}
