"""The contract for hooks on parameters: they see the gradient of the unweighted loss."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from contract import (
    FORMS,
    WINDOW,
    Batches,
    Situation,
    build,
    check_gradient,
    contract,
    make_trainer,
    over,
    refused,
    same,
    train,
    witness,
)
from oracle import CENTRAL, FGR, forward, sam
from outside import Record
from torch import nn

from lightning_gr import GradientRegularization, GRRule, hessian_eigenvalue, regularized_backward


class Clamp:
    """A hook as an object, since deep copies would share a function."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, grad):
        return grad.clamp(-self.limit, self.limit)


class Clamped(Situation):
    """Clips each gradient as it arrives, as is common for recurrent networks."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(Clamp(0.1))


class Partly(Situation):
    """Clips and then doubles the gradient of only one parameter."""

    def hook(self):
        self.net.weight.register_hook(Clamp(0.3))
        self.net.weight.register_hook(lambda grad: 2 * grad)


class Normalized(Situation):
    """Normalizes gradients, so that only their direction counts."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(lambda grad: grad / (grad.norm() + 1e-12))


class Sign(Situation):
    def hook(self):
        self.net.weight.register_hook(torch.sign)


class Masked(Situation):
    """A linear hook that only lets some entries pass."""

    def hook(self):
        mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).double()
        self.net.weight.register_hook(lambda grad: grad * mask)


class Noisy(Situation):
    """Adds noise in the backward pass, which must be the same in both passes."""

    def hook(self):
        self.net.weight.register_hook(lambda grad: grad + 0.1 * torch.randn(2, 3).double())


class AfterAccumulation(Situation):
    """Clips the accumulated gradient in place."""

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(self.clip)

    @staticmethod
    def clip(param):
        param.grad.clamp_(-0.2, 0.2)


class InPlace(Situation):
    """Clips gradients in place and returns nothing."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(self.clip)

    @staticmethod
    def clip(grad):
        grad.clamp_(-0.1, 0.1)


class PastCounter(Situation):
    """Clips through ``.data``, which does not increase the version counter."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(self.clip)

    @staticmethod
    def clip(grad):
        torch.clamp(grad, -0.1, 0.1, out=grad.data)


class OnlyLarge(Situation):
    """Returns nothing for small gradients, which may only be the case in one of the passes."""

    def hook(self):
        limit = 0.9
        for param in self.net.parameters():
            param.register_hook(lambda grad: grad * (limit / grad.norm()) if grad.norm() > limit else None)


class OnlyLargeInPlace(OnlyLarge):
    def hook(self):
        for param in self.net.parameters():
            param.register_hook(self.clip)

    @staticmethod
    def clip(grad):
        norm = grad.norm()
        if norm > 0.9:
            grad.mul_(0.9 / norm)


class Adaptive(Situation):
    """Clips at the mean of all earlier norms, which the module keeps."""

    def prepare(self):
        self.norms = {}

    def hook(self):
        for name, param in self.net.named_parameters():
            param.register_hook(partial(self.clip, name))

    def clip(self, name, grad):
        norms = self.norms.setdefault(name, [])
        norms.append(grad.norm().item())
        return grad * min(1.0, sum(norms) / len(norms) / (norms[-1] + 1e-12)) + 0.01 * len(norms)


class Counts(Situation):
    """Keeps state in variables of the hook itself, which are reachable in no other way."""

    has_oracle = False
    step = Situation.mse

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(self.make())

    @staticmethod
    def make():
        norms, calls = [], 0

        def scale(grad):
            nonlocal calls
            calls += 1
            norms.append(grad.norm().item())
            witness(calls)
            witness(norms[:-1])
            return grad / calls

        return scale


class RegisteredInStep(Situation):
    """Each step registers more hooks and never removes them; deep copies lose those of earlier steps."""

    has_oracle = False

    def step(self, batch):
        self.net.weight.register_hook(Clamp(0.5))
        self.net.weight.register_hook(lambda grad: 0.9 * grad)
        witness(len(self.net.weight._backward_hooks))
        return self.mse(batch)


class ScaledAfterAccumulation(Situation):
    """Replaces the accumulated gradient by a new tensor, and is not idempotent."""

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(self.scale)

    @staticmethod
    def scale(param):
        param.grad = 0.5 * param.grad + 0.01


class Reversal(torch.autograd.Function):
    """Gradient reversal, a layer with a linear backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Adversary(Situation):
    def prepare(self):
        self.head = nn.Linear(2, 1).double()

    def step(self, batch):
        features = self.net(batch[0])
        return self.mse(batch) + self.head(Reversal.apply(features)).square().mean()


HOOKED = [
    Clamped,
    Partly,
    Normalized,
    Sign,
    Masked,
    Noisy,
    InPlace,
    PastCounter,
    OnlyLarge,
    OnlyLargeInPlace,
    Adaptive,
    AfterAccumulation,
    ScaledAfterAccumulation,
]
for _kind in HOOKED:
    _kind.step = Situation.mse

test_leaves_no_trace, test_gradient = contract(*HOOKED, Counts, RegisteredInStep, Adversary)


@over(*HOOKED)
def test_with_other_methods(kind, form):
    """Including a ratio γ/ε at which clipping the combined gradient would reverse the step."""
    for method in (forward(5.0, 0.5), CENTRAL, sam(0.3)):
        check_gradient(kind, form, method, lr=0.01)


class Parabola(Situation):
    """L = w²/2 at w = 1, clipped at 0.1."""

    def prepare(self):
        self.net = nn.Linear(1, 1, bias=False).double()
        self.net.weight.data.fill_(1.0)

    def hook(self):
        self.net.weight.register_hook(Clamp(0.1))

    def step(self, batch):
        return self.net.weight.square().sum() / 2


@pytest.mark.parametrize("form", FORMS)
def test_clipping_does_not_reverse_the_step(form):
    """With γ/ε = 10 the result is −9 · 0.1 + 10 · 0.1, and not −9 · 0.1 + 0.1."""
    # each micro-batch arrives separately as a third of the window: 1/3 is also clipped at 0.1
    value = 0.1 * (WINDOW if form == "accumulation" else 1)
    found = train(Parabola, form, forward(1.0, 0.1))
    assert [float(g["net.weight"]) for g in found.gradients] == pytest.approx([value] * len(found.gradients))


def test_hooks_that_only_read_see_each_first_gradient_once():
    """``wandb.watch(model, log="gradients")``: one histogram per step and parameter."""
    seen = []
    for method in (None, FGR, sam(0.5)):
        HISTOGRAMS.clear()
        train(Watched, "automatic", method)
        seen.append(list(HISTOGRAMS))
    assert len(seen[0]) == 18
    same("FGR", *({str(i): value for i, value in enumerate(values)} for values in (seen[1], seen[0])))
    same("SAM", *({str(i): value for i, value in enumerate(values)} for values in (seen[2], seen[0])))


HISTOGRAMS = Record()


class Watched(Situation):
    step = Situation.mse

    def hook(self):
        for param in self.net.parameters():
            # like wandb, which reads gradients and returns nothing
            param.register_hook(lambda grad: HISTOGRAMS.append(grad.detach().clone()))


class WatchedByClass(Situation):
    """An object with a counter that decides which calls to record, as in wandb."""

    step = Situation.mse

    def hook(self):
        watcher = Watcher()
        for param in self.net.parameters():
            watcher.watch(param)


class Watcher:
    def __init__(self):
        self.seen = 0

    def watch(self, param):
        counter = [0, 1]

        def callback(grad, counter):
            counter[0] += 1
            if counter[0] % counter[1]:
                return
            self.tell(grad.data)

        param.register_hook(lambda grad: callback(grad, counter))

    def tell(self, grad):
        self.seen += 1
        HISTOGRAMS.append(grad.clone())


class WatchedAfterAccumulation(Situation):
    step = Situation.mse

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(lambda param: HISTOGRAMS.append(param.grad.clone()))


class WatchedAndClipped(Situation):
    """Reads gradients before and after another hook clips them; the first reader returns its argument."""

    step = Situation.mse

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(lambda grad: (HISTOGRAMS.append(grad.clone()), grad)[1])
            param.register_hook(Clamp(0.1))
            param.register_hook(lambda grad: HISTOGRAMS.append(grad.clone()))

    histograms = 36


@over(Watched, WatchedByClass, WatchedAfterAccumulation, WatchedAndClipped)
def test_hooks_that_only_read_change_nothing(kind, form):
    check_gradient(kind, form)
    for method in (None, FGR):
        HISTOGRAMS.clear()
        train(kind, form, method)
        assert len(HISTOGRAMS) == getattr(kind, "histograms", 18)


def test_hooks_after_accumulation_are_refused_if_gradients_are_reduced_together(monkeypatch):
    """With ``ascent_sync=False``; hooks that run before accumulation are correct there: see test_hooks_over_ranks."""
    module = build(AfterAccumulation, "automatic")
    callback = GradientRegularization(0.1, 0.5, ascent_sync=False)
    trainer = make_trainer(callback)
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 2))
    with refused("hook.*ascent_sync|ascent_sync.*hook"):
        trainer.fit(module, Batches(module.make_batches()))


def test_ascent_sync_does_not_matter_on_one_device():
    class Local:
        rule = GRRule(0.2, 0.5)
        probes, keep, normalized = FGR.probes, FGR.keep, FGR.normalized
        direction = FGR.direction

        def callback(self):
            return GradientRegularization(0.2, 0.5, ascent_sync=False)

    check_gradient(Clamped, "automatic", Local())


class Scaled(Parabola):
    """L = w²/2 + 3 v²/2 at 1, where v is excluded and has a hook that must not run twice on its gradient."""

    def prepare(self):
        super().prepare()
        self.other = nn.Linear(1, 1, bias=False).double()
        self.other.weight.data.fill_(1.0)

    def hook(self):
        self.other.weight.register_post_accumulate_grad_hook(self.halve)

    @staticmethod
    def halve(param):
        param.grad.mul_(0.5)

    def step(self, batch):
        return self.net.weight.square().sum() / 2 + 3 * self.other.weight.square().sum() / 2


def test_a_hook_that_removes_itself_runs_in_both_passes_of_its_step():
    """F-GR at w = 1 gives 0.5 · 0.6 + 0.4 · 0.5 (1 + 0.5 · 0.5), and then 0.6 + 0.4 (1 + 0.5)."""

    class Once(Parabola):
        def hook(self):
            handle = self.net.weight.register_hook(lambda grad: (handle.remove(), 0.5 * grad)[1])

    found = train(Once, "automatic", FGR)
    assert [float(g["net.weight"]) for g in found.gradients] == pytest.approx([0.55] + [1.2] * 8)


def test_hooks_after_accumulation_on_excluded_parameters_run_once():
    module = build(Scaled, "automatic")
    found = Record()
    module.on_before_optimizer_step = lambda optimizer: found.append(
        (module.net.weight.grad.item(), module.other.weight.grad.item())
    )
    callback = GradientRegularization(0.2, 0.5, exclude=["other.*"])
    make_trainer(callback, max_steps=2).fit(module, Batches(module.make_batches()))
    assert found == [(pytest.approx(1.2), pytest.approx(1.5))] * 2


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_exact_scheme_with_hooks(hook):
    """The gradient of the penalty, γ H ∇L, is separate: L = w²/2, g = clip(1) + clip(γ · 1 · clip(1))."""
    weight = nn.Parameter(torch.ones(1).double())

    def clip(grad):
        return grad.clamp(-0.3, 0.3)

    def clip_accumulated(param):
        param.grad.clamp_(-0.3, 0.3)

    getattr(weight, hook)(clip if hook == "register_hook" else clip_accumulated)
    regularized_backward(lambda: weight.square().sum() / 2, [weight], GRRule(2.0, scheme="exact"))
    assert float(weight.grad) == pytest.approx(0.3 + 0.3)
    regularized_backward(lambda: weight.square().sum() / 2, [weight], GRRule(0.5, scheme="exact"))


def test_the_hessian_ignores_hooks():
    weight, seen = nn.Parameter(torch.ones(3).double()), Record()
    weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    weight.register_hook(lambda grad: seen.append(grad))
    for method in ("double_backward", "finite_difference"):
        found = hessian_eigenvalue(lambda: weight.square().sum() * 2, [weight], method=method)
        assert float(found) == pytest.approx(4.0)
    assert len(seen) == 0
    (weight.sum() * 3).backward()
    assert weight.grad.tolist() == pytest.approx([0.1] * 3)
    assert len(seen) == 1


def test_a_hook_that_is_removed_after_each_backward_pass_is_gone():
    """The second pass registers the hook as well, and its handle is lost."""

    class Removes(Situation):
        def step(self, batch):
            self.handle = self.net.weight.register_hook(Clamp(0.5))
            return self.mse(batch)

        def on_after_backward(self):
            self.handle.remove()

    module = build(Removes, "automatic")
    make_trainer(FGR.callback()).fit(module, Batches(module.make_batches()))
    assert not module.net.weight._backward_hooks
