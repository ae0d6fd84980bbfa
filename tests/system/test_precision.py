"""All precisions: correct gradients, overflows, and no reads from the device."""

import contextlib

import pytest
import reference
import torch
from modules import (
    FIRST_ORDER,
    METHODS,
    TinyModule,
    assert_near,
    assert_same,
    cross_entropy,
    fit,
    gradients,
    make_batches,
    make_loader,
    mlp,
    weights,
)
from outside import Record
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_gr import SAM, Flooding, GradientRegularization, in_second_pass, regularized_backward
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import add_second_pass_

FP32 = torch.float32


def half(scale, scaler=torch.amp.GradScaler):
    """Return Lightning's 16-mixed plugin with a gradient scaler on the CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler("cpu", init_scale=scale, growth_interval=10_000))


def train(name, *callbacks, module=None, dtype=FP32, **options):
    """Train a module with a method."""
    module = TinyModule(mlp(dtype=dtype)) if module is None else module
    fit(module, METHODS[name].callback(), *callbacks, loader=make_loader(dtype=dtype), **options)
    return module


def last_gradient_by_hand(name, context=contextlib.nullcontext):
    """Return the last gradient and the weights of the same training in a plain loop with the functional form."""
    net = mlp(dtype=FP32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for batch in make_batches(dtype=FP32):

        def closure(batch=batch):
            with context():
                return cross_entropy(net, batch)

        optimizer.zero_grad()
        regularized_backward(closure, net, METHODS[name].rule)
        optimizer.step()
    return gradients(net), weights(net)


# --- true precision


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-10), ("32-true", 1e-4)])
@pytest.mark.parametrize("name", METHODS)
def test_true_precision(name, precision, tolerance):
    """Weights agree with the float64 reference as closely as the precision allows."""
    module = train(name, precision=precision)
    assert {p.dtype for p in module.parameters()} == {torch.float64 if precision == "64-true" else FP32}
    net = mlp(dtype=FP32).double()
    losses = [reference.loss_of(net, cross_entropy, [(x.double(), y)]) for x, y in make_batches(dtype=FP32)]
    expected = reference.train(net, losses, reference.SGD(), lambda step, *at: METHODS[name].gradient(*at))
    actual = weights(module.net)
    start = weights(net)
    assert_near({n: actual[n] - start[n] for n in start}, {n: expected[n] - start[n] for n in start}, tolerance)


@pytest.mark.parametrize("callback", [GradientRegularization(1e-6, 1e-6), SAM(1e-6)])
def test_warns_of_weights_too_coarse_to_move(callback):
    """With bf16-true and a perturbation below the resolution of the weights, there is one warning per training."""
    with pytest.warns(UserWarning, match=r"weights move: .* precision='bf16-mixed'") as record:
        fit(TinyModule(mlp(dtype=FP32)), callback, loader=make_loader(dtype=FP32), precision="bf16-true", max_epochs=2)
    assert len([w for w in record if "weights move" in str(w.message)]) == 1


def test_no_warning_if_weights_move():
    """Any warning would be an error here."""
    fit(TinyModule(mlp(dtype=FP32)), SAM(0.5), loader=make_loader(dtype=FP32), precision="bf16-true")


# --- bf16-mixed


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", METHODS)
def test_bf16_mixed(name):
    """The result equals a plain loop with autocast bit for bit, and both passes run under autocast."""
    seen = Record()

    class Watched(TinyModule):
        def training_step(self, batch, batch_idx):
            output = self.net(batch[0])
            seen.append((in_second_pass(), output.dtype))
            return nn.functional.cross_entropy(output, batch[1])

    module = train(name, module=Watched(mlp(dtype=FP32)), precision="bf16-mixed")
    expected, after = last_gradient_by_hand(name, bf16)
    assert_same(module.gradients[-1], expected)
    assert_same(weights(module.net), after)
    assert set(seen) == {(False, torch.bfloat16), (True, torch.bfloat16)}
    assert_near(expected, last_gradient_by_hand(name)[0], 0.2)  # close to float32


# --- 16-mixed with a gradient scaler


@pytest.mark.parametrize("name", METHODS)
def test_16_mixed(name):
    """Scales of 2⁶ and 2¹² give the same gradients, close to those of float32."""
    low, high = (train(name, plugins=[half(scale)]) for scale in (2.0**6, 2.0**12))
    assert_near(low.gradients[-1], high.gradients[-1], 1e-3)
    assert_near(low.gradients[0], train(name).gradients[0], 0.02)
    assert_near(weights(low.net), weights(high.net), 1e-4)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_16_mixed_from_a_scale_that_overflows(name):
    """At a scale of 2²⁴ steps are skipped until the scale is low enough; weights stay finite, and training begins."""
    plugin = half(2.0**24)
    module = train(name, plugins=[plugin], max_epochs=6)
    finite = [all(g.isfinite().all() for g in step.values()) for step in module.gradients]
    assert not finite[0]
    assert finite[-1]
    assert plugin.scaler.get_scale() == 2.0 ** (24 - finite.count(False))
    now, start = weights(module.net), weights(mlp(dtype=FP32))
    assert all(p.isfinite().all() for p in now.values())
    assert not torch.equal(now["0.weight"], start["0.weight"])


class Overflows(TinyModule):
    """Overflows in its second step, in the first or in the second pass."""

    at_second = True

    def on_train_batch_start(self, batch, batch_idx):
        self.before = weights(self.net)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e38 if batch_idx == 1 and in_second_pass() == self.at_second else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        now = weights(self.net)
        self.stepped = [*getattr(self, "stepped", []), not torch.equal(now["0.weight"], self.before["0.weight"])]
        assert all(p.isfinite().all() for p in now.values())
        if not self.stepped[-1]:
            assert_same(now, self.before)


@pytest.mark.parametrize("at_second", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_an_overflow_in_either_pass_skips_the_step(name, at_second):
    module, plugin = Overflows(mlp(dtype=FP32)), half(2.0**8)
    module.at_second = at_second
    train(name, module=module, plugins=[plugin])
    assert module.stepped == [True, False, True]
    assert plugin.scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_accumulation_flooding_and_clipping_under_a_scaler(name):
    """All of them use unscaled values, so gradients equal those of float32 up to rounding."""
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "max_epochs": 2}
    scaled = train(name, Flooding(5.0), plugins=[half(2.0**10)], **options)
    single = train(name, Flooding(5.0), **options)
    plain = train(name, plugins=[half(2.0**10)], **options)
    assert len(scaled.gradients) == 2
    assert_near(scaled.gradients[-1], single.gradients[-1], 0.02)
    # the loss is far below the level, so this is ascent
    assert sum((scaled.gradients[0][n] * plain.gradients[0][n]).sum() for n in plain.gradients[0]) < 0
    norm = torch.stack([(w - v).norm() for w, v in zip(weights(scaled.net).values(), mlp().parameters(), strict=True)])
    assert norm.norm() < 0.1 * 0.05 * (1 + 1.9) * 1.01  # two clipped steps of SGD with momentum


# --- nothing is read from the device


class Unread(torch.amp.GradScaler):
    """A scaler whose scale must not be read, since that would wait for the device."""

    def get_scale(self):
        raise AssertionError("the scale was read")


def test_the_scale_is_not_read():
    module = train("forward GR", plugins=[half(2.0**8, Unread)])
    assert len(module.gradients) == 3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("loss_scale", [None, 8.0])
def test_nothing_is_read_from_the_device(name, loss_scale):
    """Tensors on the meta device have no values, so reading one is an error, as shown for `.item()`."""
    net = mlp(dtype=FP32).to("meta")
    x, y = torch.empty(4, 5, device="meta"), torch.empty(4, 3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    nn.functional.mse_loss(net(x), y).backward()
    passes = []

    def replay(transform, last=True):
        passes.append(1)
        transform(nn.functional.mse_loss(net(x), y)).backward()

    scale = None if loss_scale is None else torch.tensor(loss_scale, device="meta")
    excluded = [net[0].bias]
    params = [p for p in net.parameters() if p is not net[0].bias]
    add_second_pass_(METHODS[name].rule.update(), params, replay, WeightStorage(), excluded=excluded, loss_scale=scale)
    assert len(passes) == (2 if "central" in name else 1)
