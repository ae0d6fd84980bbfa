"""Callbacks that only monitor: correct norms under scaling and clipping, correct sharpness, and no side effects."""

import pytest
import pytorch_lightning as pl
import torch
from hessians import Noisy, dense_hessian
from modules import (
    Manual,
    TinyModule,
    assert_same,
    cross_entropy,
    fit,
    gradients,
    make_batches,
    make_loader,
    make_trainer,
    mlp,
    weights,
)
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr import SAM, GradientNormMonitor, SharpnessMonitor
from lightning_gr._compat import gradients_are_scaled

EVERY = {"log_every_n_steps": 1}


def values(trainer):
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def norm_of(grads):
    return torch.stack([g.double().norm() for g in grads]).norm().item()


def first_norms(net):
    """Return the norm of the first batch's gradient, in total and by layer."""
    cross_entropy(net, make_batches()[0]).backward()
    own = gradients(net)
    layers = {i: norm_of(g for n, g in own.items() if n.startswith(i)) for i in "02"}
    return {"grad_norm": norm_of(own.values()), **{f"grad_norm/net.{i}": norm for i, norm in layers.items()}}


def test_norm_before_clipping():
    module = TinyModule()
    trainer = fit(module, GradientNormMonitor(by_layer=True), limit_train_batches=1, gradient_clip_val=0.01, **EVERY)
    assert values(trainer) == pytest.approx(first_norms(mlp()), rel=1e-12)


# Lightning refuses to clip gradients of fused optimizers
@pytest.mark.parametrize(("fused", "clip"), [(False, None), (False, 0.01), (True, None)])
def test_norm_under_a_gradient_scaler(fused, clip):
    """A fused optimizer gets gradients that are still scaled."""
    module = TinyModule(mlp(dtype=torch.float32), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {"plugins": pl.plugins.MixedPrecision("16-mixed", "cpu", scaler), "gradient_clip_val": clip, **EVERY}
    loader = make_loader(dtype=torch.float32)
    trainer = fit(module, GradientNormMonitor(by_layer=True), loader=loader, limit_train_batches=1, **options)
    assert values(trainer) == pytest.approx(first_norms(mlp()), rel=0.01)
    assert gradients_are_scaled(trainer.optimizers[0]) == fused


def test_norm_in_manual_optimization_and_with_a_method():
    module = Manual()
    module.groups = 2
    found = values(fit(module, SAM(0.2), GradientNormMonitor(prefix="x/"), limit_train_batches=1, **EVERY))
    assert found["x/optimizer_0/grad_norm"] == pytest.approx(
        norm_of(module.gradients[0][n] for n in ("0.weight", "0.bias"))
    )
    assert found["gr/optimizer_0/grad_norm"] != found["x/optimizer_0/grad_norm"]
    module = TinyModule()
    found = values(fit(module, SAM(0.2), GradientNormMonitor(), **EVERY))
    assert found["grad_norm"] == pytest.approx(norm_of(module.gradients[-1].values()))


@pytest.mark.parametrize("options", [{"barebones": True}, {"log_every_n_steps": 0}])
def test_norm_is_not_measured_without_logging(options):
    default = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    assert (
        values(fit(TinyModule(), GradientNormMonitor(), **default if "barebones" in options else {}, **options)) == {}
    )


# --- sharpness


class EpochWeights(pl.Callback):
    """Keeps the weights after each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append({n: p.clone() for n, p in pl_module.net.named_parameters()})


def test_sharpness_is_that_of_the_dense_hessian():
    module, kept = TinyModule(), EpochWeights()
    monitor = SharpnessMonitor(every_n_epochs=2, tolerance=1e-5, samples=200)
    trainer = fit(module, monitor, kept, max_epochs=5)
    assert [epoch for epoch, _, _ in monitor.results] == [1, 3]
    net = mlp()
    net.load_state_dict(kept.seen[3])
    hessian = dense_hessian(net, make_batches()[0])
    found = values(trainer)
    assert found["hessian/eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-6)
    assert abs(found["hessian/trace"] - hessian.trace().item()) < 3 * found["hessian/trace_error"]
    assert 0 < found["hessian/trace_error"] < 0.3
    assert found["hessian/eigenvalue"] == pytest.approx(monitor.results[-1][1].value)


class Stateful(TinyModule):
    """Has Dropout, BatchNorm, counters and logs, and empties its batches."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(Noisy().double())
        self.net.layers[1].eval()
        self.calls = 0

    def training_step(self, batch):
        self.calls += 1
        x, y = batch.pop("x"), batch.pop("y")
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return {"loss": loss}

    def on_train_batch_start(self, batch, batch_idx):
        assert self.training
        assert not self.net.layers[1].training


def dictionaries():
    batches = [dict(zip("xy", batch, strict=True)) for batch in make_batches()]
    return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_measuring_leaves_no_trace(method):
    ends = []
    for callbacks in ([], [SharpnessMonitor(method=method, samples=3)]):
        module = Stateful()
        torch.manual_seed(1)
        trainer = fit(module, *callbacks, loader=dictionaries(), max_epochs=3)
        found = {k: v for k, v in values(trainer).items() if not k.startswith("hessian/")}
        state = {**weights(module.net), **dict(module.net.named_buffers())}
        ends.append((state, found, module.calls, module.net.calls, torch.get_rng_state().tolist(), module.gradients))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:5] == ends[1][1:5]
    for plain, watched in zip(ends[0][5], ends[1][5], strict=True):
        assert_same(plain, watched)


def test_only_requested_quantities_are_measured():
    assert values(fit(TinyModule(), SharpnessMonitor(trace=False, prefix="h_"), **EVERY)).keys() == {"h_eigenvalue"}
    found = values(fit(TinyModule(), SharpnessMonitor(eigenvalue=False, samples=2)))
    assert found.keys() == {"hessian/trace", "hessian/trace_error"}


def test_a_custom_loss_in_manual_optimization():
    class CustomLoss(SharpnessMonitor):
        def loss(self, pl_module, batch):
            return cross_entropy(pl_module.net, batch)

    found = values(fit(Manual(), CustomLoss(trace=False, tolerance=1e-6), max_epochs=1))
    assert found["hessian/eigenvalue"] > 0
    with pytest.raises(MisconfigurationException, match=r"Manual uses manual .* override `SharpnessMonitor.loss"):
        fit(Manual(), SharpnessMonitor())


def test_sharded_parameters_are_refused():
    trainer = make_trainer(strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"needs all parameters on each device.*strategy='ddp'"):
        SharpnessMonitor().setup(trainer, TinyModule(), "fit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer of at least 1 but got 0"),
        ({"samples": 1}, "`samples` to be an integer of at least 2 but got 1"),
        ({"method": "exact"}, "`method` to be one of 'auto'"),
        ({"trace": "no"}, "`trace` to be True or False but got 'no'"),
    ],
)
def test_wrong_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        SharpnessMonitor(**options)
