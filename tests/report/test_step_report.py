"""When steps are measured: only if Lightning logs them, at no cost otherwise."""

import csv

import pytest
import pytorch_lightning as pl
import reference
import torch
from metrics_by_hand import by_hand
from modules import (
    METHODS,
    Manual,
    TinyModule,
    adam,
    assert_same,
    cross_entropy,
    fit,
    make_batches,
    make_loader,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr import SAM, GradientRegularization
from lightning_gr._compat import will_log
from lightning_gr.report.measurement import BY_LAYER

EVERY = {"log_every_n_steps": 1}


def logged(trainer, prefix="gr/"):
    found = {k: v.item() for k, v in trainer.callback_metrics.items()}
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def rows(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def near(values, rel=1e-9):
    return pytest.approx(values, rel=rel, abs=1e-14)


def test_separate_micro_batches():
    """Metrics are means over the window; those that need the second gradient alone are left out."""
    method, module = METHODS["forward GR"], TinyModule()
    theta = weights(module.net)
    batches = make_batches()[:2]
    each = [by_hand(method, reference.loss_of(module.net, cross_entropy, [batch]), theta) for batch in batches]
    names = ("grad_norm", "penalty", "loss_perturbed", "sharpness")
    callback = method.callback(metrics="all", accumulation="micro_batch")
    trainer = fit(module, callback, limit_train_batches=2, accumulate_grad_batches=2, **EVERY)
    assert logged(trainer) == near({n: sum(values[n] for values in each) / 2 for n in names})


def test_only_at_logged_steps_and_without_stale_values(tmp_path):
    """Lightning repeats the last value at steps without one; ours are left out there."""
    callback = SAM(0.1, start_step=1, interval=2, warmup_steps=4, metrics="all")
    seen = []

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(will_log(trainer))

    class Logs(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Logs(), callback, Asks(), logger=logger, log_every_n_steps=2, max_epochs=5)
    table = rows(tmp_path)
    assert [row["step"] for row in table] == [1, 3, 5, 7, 9, 11, 13]
    assert [step for step, due in enumerate(seen) if due] == [1, 3, 5, 7, 9, 11, 13]
    # step 1 is due, but its strength is 0
    assert ["gr/sharpness" in row for row in table] == [False] + [True] * 6
    assert all("gr/grad_norm" in row and "loss" in row for row in table)
    (tmp_path / "other").mkdir()
    fit(Logs(), SAM(0.1, interval=2), logger=pl.loggers.CSVLogger(tmp_path / "other"), log_every_n_steps=1)
    assert ["gr/sharpness" in row for row in rows(tmp_path / "other")] == [True, False, True]


class Reads(TorchDispatchMode):
    """Counts operators, and among them those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.reads = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def counts(callback, steps=4, **options):
    """Return the counts for each training step, without loggers, which would add reads of their own."""
    found = []

    class Counts(pl.Callback):
        def on_train_batch_start(self, *args):
            self.mode = Reads()
            self.mode.__enter__()

        def on_train_batch_end(self, *args):
            self.mode.__exit__(None, None, None)
            found.append((self.mode.reads, self.mode.calls))

    before, after = Counts(), Counts()
    before.on_train_batch_end = lambda *args: None
    after.on_train_batch_start = lambda *args: None
    after.on_train_batch_end = lambda *args: Counts.on_train_batch_end(before)
    fit(TinyModule(), before, callback, after, limit_train_batches=steps, loader=make_loader(8 * steps), **options)
    return found


@pytest.mark.parametrize("kind", [SAM, GradientRegularization])
def test_no_reads_and_no_work_at_other_steps(kind):
    """We never read from the device, not even at logged steps, and add no operators at other steps."""
    without, with_all = (counts(kind(metrics=m), log_every_n_steps=2) for m in ((), ["all", BY_LAYER]))
    assert [reads for reads, _ in with_all] == [reads for reads, _ in without]
    extra = [b - a for (_, a), (_, b) in zip(without, with_all, strict=True)]
    assert extra[0] == extra[2] == 0
    assert extra[1] > 0
    assert extra[3] > 0


@pytest.mark.parametrize("options", [{"log_every_n_steps": 1}, {"barebones": True}, {"fast_dev_run": True}])
def test_training_is_the_same_with_and_without_metrics(options):
    quiet = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    options = {**(quiet if "barebones" in options else {}), **options}
    ends = []
    for metrics in ("all", ()):
        module = TinyModule(optimizer=adam)
        trainer = fit(module, GradientRegularization(0.1, 0.1, metrics=metrics), max_epochs=2, **options)
        ends.append(weights(module.net))
        assert bool(logged(trainer)) == (metrics == "all" and "barebones" not in options)
    assert_same(*ends)


def test_several_optimizers_have_separate_keys():
    module = Manual()
    module.groups = 2
    found = logged(fit(module, SAM(0.1), limit_train_batches=1, **EVERY))
    g = reference.plain(reference.loss_of(module.net, cross_entropy, make_batches()[:1]), weights(module.net))
    for i, layer in enumerate("02"):
        norm = reference.norm({n: v for n, v in g.items() if n.startswith(layer)})
        assert found[f"optimizer_{i}/grad_norm"] == pytest.approx(norm)
    assert len(found) == 6
