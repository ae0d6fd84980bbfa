"""The contract for changes of gradients by Lightning's hooks and by later micro-batches, which apply in both passes."""

import pytest
import pytorch_lightning as pl
import torch
from contract import (
    Batches,
    Situation,
    as_dict,
    build,
    check_gradient,
    gradients,
    make_trainer,
    over,
    report,
    same,
    seed,
    train,
)
from oracle import FGR, HUGE, by_hand, central, forward, sam
from torch import nn

from lightning_gr import GradientRegularizationMixin


class Plain(Situation):
    step = Situation.mse


class Cancels(Plain):
    """Cancels the gradients of a layer in ``on_after_backward``, like lightly's DINO, so it is not in the direction."""

    has_oracle = False
    forms = ("automatic", "accumulation", "mixin")

    def prepare(self):
        self.last = nn.Linear(2, 2).double()
        self.hooked = 0

    def step(self, batch):
        return (self.last(self.net(batch[0])) - batch[1]).square().mean()

    def on_after_backward(self):
        self.hooked += 1
        self.change()

    def change(self):
        for param in self.last.parameters():
            param.grad = None


class CancelsInPlace(Cancels):
    def change(self):
        for param in self.last.parameters():
            param.grad.data.zero_()


class CancelsLate(Cancels):
    """Starts to cancel gradients between two learning steps."""

    def change(self):
        if self.hooked > 5:
            super().change()


class ClipsByValue(Cancels):
    def change(self):
        nn.utils.clip_grad_value_(self.parameters(), 0.05)


class ClipsByNorm(Cancels):
    def change(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Scales(Cancels):
    """Scales the gradients of one layer, as for a smaller learning rate."""

    def change(self):
        for param in self.last.parameters():
            param.grad *= 0.5


class Replaces(Cancels):
    """Replaces gradients by new tensors with their signs."""

    def change(self):
        for param in self.parameters():
            param.grad = param.grad.sign()


HOOKED = [Cancels, CancelsInPlace, CancelsLate, ClipsByValue, ClipsByNorm, Scales, Replaces]


def gradient_of(module, batches):
    """Return the gradient of a window after the hooks, as in plain training, at the current weights."""
    module.zero_grad()
    for batch in batches:
        (module.step(batch) / len(batches)).backward()
        module.change()
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def by_hand_with_hooks(kind, form, method):
    """Apply ``method`` to the gradient after the hooks; parameters without a gradient are not moved."""
    module = build(kind, form)
    seed()
    batches, found = module.make_batches(), []
    size = 3 if form == "accumulation" else 1
    for start in range(0, len(batches), size):
        window = batches[start : start + size]
        # the number of calls of the hook before this window, in first passes only
        counted = type(module).change is CancelsLate.change
        module.hooked = start + 1 if counted and size == 1 else 9 if counted and start >= 5 else start
        clean = gradient_of(module, window)
        present = {n: g for n, g in clean.items() if g is not None}
        final = {n: method.keep * g for n, g in present.items()}
        direction, params = method.direction(present), dict(module.named_parameters())
        for distance, weight in method.probes:
            before = {n: params[n].detach().clone() for n in present}
            for name, value in direction.items():
                params[name].data += distance * value
            for name, value in gradient_of(module, window).items():
                if name in final:
                    final[name] = final[name] + weight * value
            for name, value in before.items():
                params[name].data.copy_(value)
        found.append({n: g for n, g in final.items() if g.any()})
    return found


@pytest.mark.parametrize("method", [forward(0.2, 0.5), central(0.2, 0.5), sam(0.3)], ids=["fgr", "central", "sam"])
@over(*HOOKED)
def test_changes_by_hooks_of_the_module_apply_in_both_passes(kind, form, method):
    if kind is CancelsLate and form == "accumulation":
        pytest.skip("starts in the middle of a window")
    found = train(kind, form, method)
    expected = by_hand_with_hooks(kind, form, method)
    same("gradients", as_dict(found.gradients), as_dict(expected), 1e-9)
    plain = train(kind, form)
    same("what is left", found.state, plain.state)
    assert report(found.trainer.callbacks[0]) == (len(expected), len(expected))


class CancelsByCallback(pl.Callback):
    """Cancels the same gradients in another callback."""

    def __init__(self):
        self.calls = 0

    def on_after_backward(self, trainer, pl_module):
        self.calls += 1
        pl_module.change()


class Quiet(Cancels):
    on_after_backward = Plain.on_after_backward


@pytest.mark.parametrize("first", [True, False])
@over(Quiet)
def test_changes_by_other_callbacks_apply_in_both_passes(kind, form, first):
    method, other = forward(0.2, 0.5), CancelsByCallback()
    module = build(kind, form, mixin=form == "mixin")
    seed()
    batches, found = module.make_batches(), []
    module.on_before_optimizer_step = lambda optimizer: found.append(gradients(module))
    ours = [method.callback()]
    trainer = make_trainer(
        *([other] if first else []),
        *ours,
        *([] if first else [other]),
        accumulate_grad_batches=3 if form == "accumulation" else 1,
    )
    trainer.fit(module, Batches(batches))
    same("gradients", as_dict(found), as_dict(by_hand_with_hooks(kind, form, method)), 1e-9)
    assert other.calls == 9


class Looks(Cancels):
    """Records the norm of the gradient in its hook."""

    def change(self):
        CALLS.append(float(torch.stack([p.grad.norm() for p in self.parameters()]).norm()))


CALLS = []


@over(Looks)
def test_a_hook_that_only_reads_gradients_runs_once(kind, form):
    seen = []
    for method in (None, HUGE):
        CALLS.clear()
        train(kind, form, method)
        seen.append(list(CALLS))
    assert seen[0] == seen[1]
    assert len(CALLS) == 9


class Partly(Plain):
    """Zeroes the gradients of one of two layers in each step, and so those of earlier micro-batches."""

    def prepare(self):
        self.last = nn.Linear(2, 2).double()

    def step(self, batch):
        self.last.zero_grad()
        return (self.last(self.net(batch[0])) - batch[1]).square().mean()


class PartlyByData(Partly):
    def step(self, batch):
        for param in self.last.parameters():
            if param.grad is not None:
                param.grad.data.mul_(0.5)
        return (self.last(self.net(batch[0])) - batch[1]).square().mean()


class Normalizes(Partly):
    """Reads and changes all gradients of earlier micro-batches."""

    def step(self, batch):
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        for grad in grads:
            grad /= 1 + grad.norm()
        return (self.last(self.net(batch[0])) - batch[1]).square().mean()


@over(Partly, PartlyByData, Normalizes, forms=("accumulation",))
def test_steps_that_change_gradients_of_earlier_micro_batches(kind, form):
    for method in (FGR, central(0.2, 0.5), sam(0.3)):
        check_gradient(kind, form, method)


@pytest.mark.parametrize("kind", [Partly, Normalizes])
def test_closures_that_change_gradients_of_earlier_ones(kind):
    """A list of closures with the mixin is treated like a window."""

    class Micro(GradientRegularizationMixin, kind):
        def training_step(self, window, batch_idx):
            self.regularized_step(self.optimizers(), [lambda b=b: self.evaluate(b) for b in window])

    module = build(Micro, "mixin", 0.05)
    seed()
    batches, found = module.make_batches(), []
    module.on_before_optimizer_step = lambda optimizer: found.append(gradients(module))
    windows = [batches[i : i + 3] for i in range(0, 9, 3)]
    make_trainer(FGR.callback()).fit(module, Batches(windows))
    expected = by_hand(kind, "accumulation", FGR, 0.05)
    same("gradients", as_dict(found), as_dict(expected.gradients), 1e-9)


class Routed(Plain):
    """A layer that only gets a gradient at displaced weights, such as an expert in a mixture, stays unchanged."""

    def prepare(self):
        self.expert = nn.Linear(2, 2).double()
        self.net.weight.data.fill_(0.0)
        self.net.bias.data.fill_(0.0)

    def step(self, batch):
        found = self.net(batch[0])
        return (found - batch[1]).square().mean() + (self.expert(found).square().mean() if found.any() else 0.0)


@over(Routed)
def test_a_parameter_without_a_first_gradient_gets_no_second_gradient(kind, form):
    for method in (FGR, HUGE):
        found = train(kind, form, method)
        assert found.gradients
        assert all(param.grad is None for param in found.module.expert.parameters())
        assert not [name for names in found.gradients for name in names if name.startswith("expert")]
