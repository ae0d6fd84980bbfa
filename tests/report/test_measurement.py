"""Metrics of steps, against the float64 reference implementation."""

import csv

import jsonargparse
import pytest
import pytorch_lightning as pl
import reference
import torch
from metrics_by_hand import by_hand
from modules import (
    METHODS,
    Manual,
    TinyModule,
    cross_entropy,
    fit,
    make_batches,
    make_loader,
    make_trainer,
    mlp,
    weights,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_gr import (
    SAM,
    Flooding,
    GradientNormMonitor,
    GradientRegularization,
    SharpnessMonitor,
)
from lightning_gr.report.measurement import BY_LAYER

EVERY = {"log_every_n_steps": 1}


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


def test_default_metrics_and_prefix():
    for metrics, names in [
        ("default", {"grad_norm", "sharpness", "penalty"}),
        (["alignment"], {"alignment"}),
        ("curvature", {"curvature"}),
        ((), set()),
    ]:
        trainer = fit(TinyModule(), SAM(0.1, metrics=metrics, prefix="sam_"), **EVERY)
        assert logged(trainer, "sam_").keys() == names
        assert all(key.startswith("sam_") for key in trainer.callback_metrics)


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


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_a_gradient_scaler_does_not_change_metrics(scale):
    """The scaler of 16-mixed, which also works on the CPU; float16 itself changes the third digit."""
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
    """With a displacement near the resolution of the weights and a small γ/ε, compared with float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        module = TinyModule(mlp(32, dtype=dtype), loss=lambda net, batch: 1e-3 * cross_entropy(net, batch))
        callback = GradientRegularization(1e-4, 1e-2, metrics="all")
        found.append(logged(fit(module, callback, loader=make_loader(dtype=dtype), limit_train_batches=1, **EVERY)))
    single, double = found
    for name, rel in {"grad_norm": 1e-6, "penalty": 1e-6, "grad_norm_perturbed": 1e-5, "alignment": 1e-5}.items():
        assert single[name] == pytest.approx(double[name], rel=rel), name


def test_sixteen_bit_gradients_only_have_norms():
    module = TinyModule(mlp(dtype=torch.bfloat16))
    callback = SAM(0.5, metrics="all")
    trainer = fit(module, callback, loader=make_loader(dtype=torch.bfloat16), limit_train_batches=1, **EVERY)
    assert logged(trainer).keys() == {"grad_norm", "penalty", "loss_perturbed", "sharpness"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_logged(bad):
    module = TinyModule(loss=lambda net, batch: cross_entropy(net, batch) + net[0].weight[0, 0] * bad)
    with pytest.warns(UserWarning, match="regularized no optimizer step"):
        trainer = fit(module, SAM(0.1), limit_train_batches=1, **EVERY)
    assert not torch.isfinite(trainer.callback_metrics["gr/grad_norm"])
    assert trainer.callback_metrics["gr/sharpness"].isnan()


# --- manual optimization


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_by_hand(name, before):
    method, module = METHODS[name], Manual()
    module.before = before
    expected = by_hand(method, reference.loss_of(module.net, cross_entropy, make_batches()[:1]), weights(module.net))
    if before:  # `.grad` also contains other gradients
        expected = {n: v for n, v in expected.items() if n in ("grad_norm", "penalty", "loss_perturbed", "sharpness")}
    assert logged(fit(module, method.callback(metrics="all"), limit_train_batches=1, **EVERY)) == near(expected)


# --- wrong arguments


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SAM(metrics=["norm"]), "`metrics` to contain only 'default', 'all', 'grad_norm'.* but got 'norm'"),
        (lambda: SAM(metrics=3), "`metrics` to contain only .* but got 3"),
        (lambda: Flooding(1.0, metrics="grad_norm"), "`metrics` to contain only 'default', 'all', 'flooded' but got"),
        (lambda: SAM(adaptive=True, metrics=["penalty"]), "not to contain 'penalty' here, because ASAM's direction"),
        (
            lambda: GradientRegularization(scheme="exact", metrics=["sharpness"]),
            "'sharpness' here, because this scheme",
        ),
        (
            lambda: GradientRegularization(scheme="central", metrics=["all", "alignment"]),
            "not to contain 'alignment' here",
        ),
        (lambda: SAM(prog_bar="yes"), "`prog_bar` to be True or False but got 'yes'"),
        (lambda: SAM(prog_bar=True, metrics=()), "`metrics` to contain 'grad_norm', which `prog_bar=True` shows"),
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
            "contains 'alignment', .*'micro_batch'` adds",
        ),
        ({"ascent_sync": False}, {"strategy": "ddp", "devices": 2}, "contains 'alignment', .* use `ascent_sync=True`"),
    ],
)
def test_unavailable_metrics_are_refused_by_name_and_left_out_of_all(options, trainer, said):
    trainer = make_trainer(**trainer)
    SAM(metrics="all", **options).setup(trainer, TinyModule(), "fit")
    with pytest.raises(MisconfigurationException, match=said):
        SAM(metrics=["default", "alignment"], **options).setup(trainer, TinyModule(), "fit")


# jsonargparse renames methods between versions
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [SAM, GradientRegularization, Flooding, GradientNormMonitor, SharpnessMonitor])
def test_arguments_can_come_from_a_command_line(kind):
    """In the way in which LightningCLI reads and writes them."""
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
