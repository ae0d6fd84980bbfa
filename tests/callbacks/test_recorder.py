"""Side effects of training steps: a second pass must neither repeat nor undo them.

Most of these tests train with a learning rate of zero and compare with a run without the callback.
"""

import copy
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import reference
import torch
from modules import (
    METHODS,
    SOME,
    TinyModule,
    assert_near,
    assert_same,
    cross_entropy,
    fit,
    make_batches,
    make_trainer,
    mlp,
    weights,
)
from torch import nn

from lightning_gr import SAM, GradientRegularizationMixin, in_second_pass
from lightning_gr.callbacks.recorder import surroundings_of
from lightning_gr.replay.parameters import Parameters


class ZeroLR(TinyModule):
    """Trains with a learning rate of zero, and keeps the result of ``seen`` after each batch."""

    def __init__(self, net=None, optimizer=lambda params: torch.optim.SGD(params, lr=0.0)):
        super().__init__(net, optimizer=optimizer)
        self.after = []

    def seen(self):
        return {}

    def on_train_batch_end(self, *args):
        self.after.append({name: value.detach().clone() for name, value in self.seen().items()})


def assert_same_as_without(kind, name, **options):
    """Check that training has the same effects with the callback as without it."""
    runs = []
    for callbacks in ([], [METHODS[name].callback()]):
        torch.manual_seed(0)
        module = kind()
        trainer = fit(module, *callbacks, max_epochs=2, **options)
        runs.append([*module.after, dict(trainer.callback_metrics)])
    assert len(runs[0]) == len(runs[1]) > 1
    for expected, actual in zip(*runs, strict=True):
        assert_same(actual, expected)


# --- tensors that are written to in place


def lerp_(slow, fast):
    slow.lerp_(fast, 0.1)


def assign_data(slow, fast):
    slow.data = 0.9 * slow.data + 0.1 * fast.data


class MomentumEncoder(ZeroLR):
    """Moves a frozen copy of its network towards the network in each step, as in MoCo, BYOL and DINO."""

    def __init__(self, update=lerp_):
        super().__init__()
        self.slow, self.update = mlp(seed=1).requires_grad_(False), update

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            STARTS[in_second_pass()].append(self.slow[0].weight.clone())
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                self.update(slow, fast)
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - self.slow(batch[0])).square().mean()

    def seen(self):
        return weights(self.slow)


STARTS = {}


@pytest.mark.parametrize("update", [lerp_, assign_data])
@pytest.mark.parametrize("name", SOME)
def test_momentum_encoders_are_updated_once(name, update):
    STARTS.update({False: [], True: []})
    assert_same_as_without(partial(MomentumEncoder, update), name)
    first, second = STARTS[False][len(STARTS[False]) // 2 :], STARTS[True]
    passes = len(second) // len(first)
    # the writes are detected in the first step
    assert all(torch.equal(second[passes * i], first[i]) for i in range(1, len(first)))


class ByHand(GradientRegularizationMixin, MomentumEncoder):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.regularized_step(self.optimizers(), lambda: MomentumEncoder.training_step(self, batch, batch_idx))


@pytest.mark.parametrize("name", SOME)
def test_momentum_encoders_in_manual_optimization(name):
    STARTS.update({False: [], True: []})
    assert_same_as_without(ByHand, name)


class Centered(ZeroLR):
    """Keeps a running mean that is not a buffer."""

    def __init__(self):
        super().__init__()
        self.center = torch.zeros(5, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        self.center.mul_(0.9).add_(batch[0].mean(0), alpha=0.1)
        return super().training_step((batch[0] - self.center, batch[1]), batch_idx)

    def seen(self):
        return {"center": self.center}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", SOME)
def test_tensors_in_attributes_are_written_to_once(name, accumulate):
    assert_same_as_without(Centered, name, accumulate_grad_batches=accumulate)


class HalfFrozen(ZeroLR):
    """Writes to a frozen layer, unfreezes it later and trains it."""

    def __init__(self):
        super().__init__(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        self.net[0].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 0:
            with torch.no_grad():
                self.net[0].weight.mul_(1.0)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.net[0].requires_grad_(True)


def test_a_layer_that_is_unfrozen_later_is_perturbed_like_others():
    module = HalfFrozen()
    fit(module, SAM(0.2), max_epochs=2)
    net = mlp()
    losses = [reference.loss_of(net, cross_entropy, [batch]) for batch in make_batches()]
    for trains in (False, True):
        net[0].requires_grad_(trains)
        trained = reference.train(net, losses, reference.SGD(momentum=0.0), lambda _, *at: METHODS["SAM"].gradient(*at))
        net.load_state_dict(trained, strict=False)
    assert_near(weights(module.net), weights(net))


class OldWeightNorm(ZeroLR):
    """Has a weight that a hook computes from two parameters."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 3)).double()))

    def seen(self):
        return {"weight": self.net[0].weight}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", SOME)
def test_derived_weights_are_not_left_perturbed(name):
    assert_same_as_without(OldWeightNorm, name)


# --- logs and lists in unusual ways


class LogsByReference(ZeroLR):
    def __init__(self):
        super().__init__()
        self.log_mean = partial(self.log, on_step=False, on_epoch=True, reduce_fx="sum")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log_mean("by reference", loss)
        pl.LightningModule.log(self, "by class", loss, on_epoch=True)
        return loss


@pytest.mark.parametrize("name", SOME)
def test_logging_by_an_earlier_reference(name):
    assert_same_as_without(LogsByReference, name)


class ClassList(ZeroLR):
    losses: ClassVar = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def seen(self):
        return dict(enumerate(self.losses))


@pytest.mark.parametrize("name", SOME)
def test_a_list_of_the_class_gets_one_item_per_step(name):
    def fresh():
        ClassList.losses.clear()
        return ClassList()

    assert_same_as_without(fresh, name)


# --- gradients that are not the optimizer's


class InputGradient(ZeroLR):
    """Computes the gradient of the input."""

    def training_step(self, batch, batch_idx):
        self.x = batch[0].requires_grad_()
        return super().training_step(batch, batch_idx)

    def seen(self):
        return {"x.grad": self.x.grad}


class OutsideOptimizer(ZeroLR):
    """Has parameters outside the optimizer, whose clean gradients keep accumulating."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.0)

    def seen(self):
        return {name: param.grad for name, param in self.net[0].named_parameters()}


@pytest.mark.parametrize("kind", [InputGradient, OutsideOptimizer])
@pytest.mark.parametrize("name", SOME)
def test_other_gradients_stay_clean(name, kind):
    assert_same_as_without(kind, name)


class AccumulatesByHand(TinyModule):
    """Zeroes gradients only at every third batch."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


@pytest.mark.parametrize("name", SOME)
def test_gradients_that_are_not_zeroed_accumulate(name):
    module = AccumulatesByHand()
    fit(module, METHODS[name].callback(), max_epochs=1)
    net, total = mlp(), []

    def gradient(step, loss, theta):
        total.append(METHODS[name].gradient(loss, theta))
        return {key: sum(g[key] for g in total) for key in theta}

    losses = [reference.loss_of(net, cross_entropy, [batch]) for batch in make_batches()]
    assert_near(weights(module.net), reference.train(net, losses, reference.SGD(), gradient))


class OwnBackward(TinyModule):
    def backward(self, loss, *args, **kwargs):
        (2 * loss).backward(*args, **kwargs)


@pytest.mark.parametrize("name", SOME)
def test_a_custom_backward_is_used_in_the_second_pass(name):
    module, net = OwnBackward(), mlp()
    fit(module, METHODS[name].callback())
    doubled = [reference.loss_of(net, lambda n, b: 2 * cross_entropy(n, b), [batch]) for batch in make_batches()]
    gradient = METHODS[name].gradient
    assert_near(weights(module.net), reference.train(net, doubled, reference.SGD(), lambda _, *at: gradient(*at)))


def test_a_copy_of_the_module_has_no_additional_attributes():
    module = MomentumEncoder()
    fit(module, SAM(0.2))
    assert set(vars(copy.deepcopy(module))) == set(vars(module))


def test_random_numbers_are_repeated_on_each_device_of_a_module(monkeypatch):
    """A module may use several devices in one process, each with its own generator."""
    names = ("cuda:1", "cuda:0", "cpu", "cuda:1", "meta")
    monkeypatch.setattr(Parameters, "of", lambda *_: [SimpleNamespace(device=torch.device(name)) for name in names])
    surroundings = surroundings_of(make_trainer(), TinyModule())
    assert list(map(str, surroundings.devices)) == ["cuda:0", "cuda:1"]
