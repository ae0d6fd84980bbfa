"""Metrics of the steps: against the float64 reference, on the steps that Lightning logs, at no cost on the others."""

import csv

import jsonargparse
import pytest
import pytorch_lightning as pl
import reference
import torch
from modules import (
    METHODS,
    TinyModule,
    adam,
    assert_same,
    cross_entropy,
    fit,
    make_batches,
    make_loader,
    make_trainer,
    mlp,
    weights,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr import (
    SAM,
    Flooding,
    GradientNormMonitor,
    GradientRegularization,
    GradientRegularizationMixin,
    SharpnessMonitor,
)
from lightning_gr._compat import will_log
from lightning_gr.report.measurement import BY_LAYER

EVERY = {"log_every_n_steps": 1}


def dot(x, y):
    return sum(float((x[n] * y[n]).sum()) for n in x)


def by_hand(method, loss, theta, strength=1.0):
    """All metrics that are defined for a row of the table, the slow way."""
    g, c = reference.plain(loss, theta), method.constants
    norm = reference.norm(g)
    size = strength * c.get("gamma", c.get("rho"))
    values = {"grad_norm": norm}
    kind = method.by_hand
    normalized = kind in (reference.norm_penalty, reference.sam)
    if kind is not reference.asam:
        values["penalty"] = size * norm if normalized else size / 2 * norm**2
    scheme = c.get("scheme", "forward")
    if kind is reference.asam:
        t = {n: p.detach().abs() + c.get("eta", 0.0) for n, p in theta.items()}
        scaled = reference.unit({n: t[n] * g[n] for n in g})
        d = {n: t[n] * scaled[n] for n in g}
    else:
        d = reference.unit(g) if normalized else g
    step = c.get("epsilon", size) * (-1 if scheme == "backward" else 1)
    there = reference.combine(1.0, theta, step, d)
    g1 = reference.plain(loss, there)
    if scheme != "exact":
        values["loss_perturbed"] = float(loss(there))
        values["sharpness"] = float(loss(there) - loss(theta))
    if scheme in ("forward", "backward"):
        values["grad_norm_perturbed"] = reference.norm(g1)
        values["alignment"] = dot(g, g1) / norm / reference.norm(g1)
    if scheme == "exact":
        values["curvature"] = dot(g, reference.hessian_times(loss, theta, g)) / norm**2
    elif kind is not reference.asam:
        length = abs(step) if normalized else abs(step) * norm
        other = reference.plain(loss, reference.combine(1.0, theta, -step, d)) if scheme == "central" else g
        values["curvature"] = dot(g, reference.combine(1.0, g1, -1.0, other)) / norm / length
        values["curvature"] *= (0.5 if scheme == "central" else 1.0) * (1 if step > 0 else -1)
    return values


def logged(trainer, prefix="gr/"):
    found = {k: v.item() for k, v in trainer.callback_metrics.items()}
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def near(values, rel=1e-9):
    return pytest.approx(values, rel=rel, abs=1e-14)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_equal_the_reference(name, accumulate):
    method, module = METHODS[name], TinyModule()
    batches = make_batches()[:accumulate]
    expected = by_hand(method, reference.loss_of(module.net, cross_entropy, batches, accumulate), weights(module.net))
    options = {"limit_train_batches": accumulate, "accumulate_grad_batches": accumulate, **EVERY}
    trainer = fit(module, method.callback(metrics="all"), **options)
    assert logged(trainer) == near(expected)


def test_default_is_a_part_of_them_and_the_prefix_is_mine():
    for metrics, names in [
        ("default", {"grad_norm", "sharpness", "penalty"}),
        (["alignment"], {"alignment"}),
        ("curvature", {"curvature"}),
        ((), set()),
    ]:
        trainer = fit(TinyModule(), SAM(0.1, metrics=metrics, prefix="sam_"), **EVERY)
        assert logged(trainer, "sam_").keys() == names
        assert all(key.startswith("sam_") for key in trainer.callback_metrics)


def test_each_micro_batch_by_itself():
    """The mean over the window; what would need the second gradient alone is left out."""
    method, module = METHODS["forward GR"], TinyModule()
    theta = weights(module.net)
    batches = make_batches()[:2]
    each = [by_hand(method, reference.loss_of(module.net, cross_entropy, [batch]), theta) for batch in batches]
    names = ("grad_norm", "penalty", "loss_perturbed", "sharpness")
    callback = method.callback(metrics="all", accumulation="micro_batch")
    trainer = fit(module, callback, limit_train_batches=2, accumulate_grad_batches=2, **EVERY)
    assert logged(trainer) == near({n: sum(values[n] for values in each) / 2 for n in names})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_norms_by_layer(accumulate):
    module = TinyModule()
    module.net[2].bias.requires_grad_(False)
    batches = make_batches()[:accumulate]
    theta = {n: p for n, p in weights(module.net).items() if n != "2.bias"}
    g = reference.plain(reference.loss_of(module.net, cross_entropy, batches, accumulate), theta)
    options = {"limit_train_batches": accumulate, "accumulate_grad_batches": accumulate, **EVERY}
    trainer = fit(module, SAM(0.1, metrics=["grad_norm", BY_LAYER]), **options)
    layers = {
        "net.0": reference.norm({n: g[n] for n in ("0.weight", "0.bias")}),
        "net.2": reference.norm({"": g["2.weight"]}),
    }
    expected = {f"grad_norm/{n}": norm for n, norm in layers.items()}
    assert logged(trainer) == near({**expected, "grad_norm": sum(v**2 for v in layers.values()) ** 0.5})


def rows(folder):
    with next(folder.rglob("metrics.csv")).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_only_on_logged_steps_and_no_stale_value(tmp_path):
    """Lightning writes the last value again on a step without one; ours are left out there."""
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
    # step 1 is due but has no strength yet
    assert ["gr/sharpness" in row for row in table] == [False] + [True] * 6
    assert all("gr/grad_norm" in row and "loss" in row for row in table)
    (tmp_path / "other").mkdir()
    fit(Logs(), SAM(0.1, interval=2), logger=pl.loggers.CSVLogger(tmp_path / "other"), log_every_n_steps=1)
    assert ["gr/sharpness" in row for row in rows(tmp_path / "other")] == [True, False, True]


class Reads(TorchDispatchMode):
    """Counts operators, and those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.reads = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def counts(callback, steps=4, **options):
    """Of each training step, the reads of Lightning's own loggers left out (there is none)."""
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
def test_nothing_is_read_and_nothing_is_done_on_other_steps(kind):
    """Not even on a logged step is anything read from the device by us; on the others not one operator is added."""
    without, with_all = (counts(kind(metrics=m), log_every_n_steps=2) for m in ((), ["all", BY_LAYER]))
    assert [reads for reads, _ in with_all] == [reads for reads, _ in without]
    extra = [b - a for (_, a), (_, b) in zip(without, with_all, strict=True)]
    assert extra[0] == extra[2] == 0
    assert extra[1] > 0
    assert extra[3] > 0


@pytest.mark.parametrize("options", [{"log_every_n_steps": 1}, {"barebones": True}, {"fast_dev_run": True}])
def test_training_is_the_same_with_and_without(options):
    quiet = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    options = {**(quiet if "barebones" in options else {}), **options}
    ends = []
    for metrics in ("all", ()):
        module = TinyModule(optimizer=adam)
        trainer = fit(module, GradientRegularization(0.1, 0.1, metrics=metrics), max_epochs=2, **options)
        ends.append(weights(module.net))
        assert bool(logged(trainer)) == (metrics == "all" and "barebones" not in options)
    assert_same(*ends)


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_a_gradient_scaler_does_not_show(scale):
    """The scaler of 16-mixed, which works on the CPU too; float16 itself does, in the third digit."""
    expected = None
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        module = TinyModule(mlp(dtype=torch.float32), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler) if scaler else None
        data = make_loader(dtype=torch.float32)
        callback = GradientRegularization(0.1, 0.1, metrics=["all", BY_LAYER])
        trainer = fit(module, callback, loader=data, limit_train_batches=1, plugins=precision, **EVERY)
        found = logged(trainer)
        expected = expected or found
        assert found == pytest.approx(expected, rel=0.03)


def test_small_gradients_in_float32_keep_their_digits():
    """A displacement that the weights could hardly resolve, and a small γ/ε, against float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        module = TinyModule(mlp(32, dtype=dtype), loss=lambda net, batch: 1e-3 * cross_entropy(net, batch))
        callback = GradientRegularization(1e-4, 1e-2, metrics="all")
        found.append(logged(fit(module, callback, loader=make_loader(dtype=dtype), limit_train_batches=1, **EVERY)))
    single, double = found
    for name, rel in {"grad_norm": 1e-6, "penalty": 1e-6, "grad_norm_perturbed": 1e-5, "alignment": 1e-5}.items():
        assert single[name] == pytest.approx(double[name], rel=rel), name


def test_sixteen_bit_gradients_tell_norms_only():
    module = TinyModule(mlp(dtype=torch.bfloat16))
    callback = SAM(0.5, metrics="all")
    trainer = fit(module, callback, loader=make_loader(dtype=torch.bfloat16), limit_train_batches=1, **EVERY)
    assert logged(trainer).keys() == {"grad_norm", "penalty", "loss_perturbed", "sharpness"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told(bad):
    module = TinyModule(loss=lambda net, batch: cross_entropy(net, batch) + net[0].weight[0, 0] * bad)
    trainer = fit(module, SAM(0.1), limit_train_batches=1, **EVERY)
    assert not torch.isfinite(trainer.callback_metrics["gr/grad_norm"])
    assert trainer.callback_metrics["gr/sharpness"].isnan()


# --- manual optimization


class Manual(GradientRegularizationMixin, TinyModule):
    """One step over the halves of a batch, by hand."""

    parts, groups, before = 2, 1, False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        halves = zip(*(t.chunk(self.parts) for t in batch), strict=True)
        losses = [lambda half=half: cross_entropy(self.net, half) for half in halves]
        for optimizer in optimizers if self.groups > 1 else [optimizers]:
            if self.before:
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.net, batch))
                self.regularized_backward(losses, optimizer)
                optimizer.step()
            else:
                self.regularized_step(optimizer, losses)

    def configure_optimizers(self):
        if self.groups == 1:
            return super().configure_optimizers()
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.0) for i in (0, 2)]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["forward GR", "SAM", "central GR", "exact GR"])
def test_by_hand(name, before):
    method, module = METHODS[name], Manual()
    module.before = before
    expected = by_hand(method, reference.loss_of(module.net, cross_entropy, make_batches()[:1]), weights(module.net))
    if before:  # `.grad` holds something else, too
        expected = {n: v for n, v in expected.items() if n in ("grad_norm", "penalty", "loss_perturbed", "sharpness")}
    assert logged(fit(module, method.callback(metrics="all"), limit_train_batches=1, **EVERY)) == near(expected)


def test_several_optimizers_have_keys_of_their_own():
    module = Manual()
    module.groups = 2
    found = logged(fit(module, SAM(0.1), limit_train_batches=1, **EVERY))
    g = reference.plain(reference.loss_of(module.net, cross_entropy, make_batches()[:1]), weights(module.net))
    for i, layer in enumerate("02"):
        norm = reference.norm({n: v for n, v in g.items() if n.startswith(layer)})
        assert found[f"optimizer_{i}/grad_norm"] == pytest.approx(norm)
    assert len(found) == 6


# --- flooding


def test_share_of_flooded_losses(tmp_path):
    """Since the last time that it was logged; of first passes only."""
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


# --- wrong arguments


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SAM(metrics=["norm"]), "`metrics` to hold some of 'default', 'all', 'grad_norm'.* but got 'norm'"),
        (lambda: SAM(metrics=3), "`metrics` to hold some of .* but got 3"),
        (lambda: Flooding(1.0, metrics="grad_norm"), "`metrics` to hold some of 'default', 'all', 'flooded' but got"),
        (lambda: SAM(adaptive=True, metrics=["penalty"]), "without 'penalty' here, because ASAM's direction"),
        (
            lambda: GradientRegularization(scheme="exact", metrics=["sharpness"]),
            "'sharpness' here, because this scheme",
        ),
        (lambda: GradientRegularization(scheme="central", metrics=["all", "alignment"]), "without 'alignment' here"),
        (lambda: SAM(prog_bar="yes"), "`prog_bar` to be True or False but got 'yes'"),
        (lambda: SAM(prog_bar=True, metrics=()), "`metrics` to hold 'grad_norm' with `prog_bar=True`"),
        (lambda: SAM(prefix=3), "`prefix` to be a string but got 3"),
    ],
)
def test_wrong_arguments(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("options", "trainer", "said"),
    [
        (
            {"accumulation": "micro_batch"},
            {"accumulate_grad_batches": 2},
            "asks for 'alignment', .*'micro_batch'` adds",
        ),
        ({"ascent_sync": False}, {"strategy": "ddp", "devices": 2}, "for 'alignment', .* use `ascent_sync=True`"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_and_left_out_of_all(options, trainer, said):
    trainer = make_trainer(**trainer)
    SAM(metrics="all", **options).setup(trainer, TinyModule(), "fit")
    with pytest.raises(MisconfigurationException, match=said):
        SAM(metrics=["default", "alignment"], **options).setup(trainer, TinyModule(), "fit")


# jsonargparse renames its methods from version to version
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [SAM, GradientRegularization, Flooding, GradientNormMonitor, SharpnessMonitor])
def test_arguments_come_from_a_command_line(kind):
    """As LightningCLI reads and writes them."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(kind, "callback")
    flags = ["--callback.prefix=x/"]
    if kind in (SAM, GradientRegularization):
        flags += ["--callback.metrics=[all,grad_norm_by_layer]", "--callback.verbose=false", "--callback.prog_bar=true"]
    elif kind is Flooding:
        flags += ["--callback.level=0.1", "--callback.metrics=all"]
    found = parser.parse_args(flags)
    written = parser.dump(found)
    assert parser.dump(parser.parse_string(written)) == written
    assert isinstance(parser.instantiate_classes(found).callback, kind)
