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
    """A function would be shared with a deep copy."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, grad):
        return grad.clamp(-self.limit, self.limit)


class Clamped(Situation):
    """The recipe for recurrent networks: each gradient is clipped where it arrives."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(Clamp(0.1))


class Partly(Situation):
    """On one of the parameters only, and doubled there."""

    def hook(self):
        self.net.weight.register_hook(Clamp(0.3))
        self.net.weight.register_hook(lambda grad: 2 * grad)


class Normalized(Situation):
    """Normalized gradient: only its direction counts."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(lambda grad: grad / (grad.norm() + 1e-12))


class Sign(Situation):
    def hook(self):
        self.net.weight.register_hook(torch.sign)


class Masked(Situation):
    """A linear one: some of the entries stay what they are."""

    def hook(self):
        mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).double()
        self.net.weight.register_hook(lambda grad: grad * mask)


class Noisy(Situation):
    """Draws noise in the backward pass: the same in both."""

    def hook(self):
        self.net.weight.register_hook(lambda grad: grad + 0.1 * torch.randn(2, 3).double())


class AfterAccumulation(Situation):
    """``register_post_accumulate_grad_hook``: what has been accumulated is clipped in place."""

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(self.clip)

    @staticmethod
    def clip(param):
        param.grad.clamp_(-0.2, 0.2)


class InPlace(Situation):
    """Returns nothing, and clips where the gradient is."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(self.clip)

    @staticmethod
    def clip(grad):
        grad.clamp_(-0.1, 0.1)


class PastCounter(Situation):
    """In place through ``.data``, which moves no version counter."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(self.clip)

    @staticmethod
    def clip(grad):
        torch.clamp(grad, -0.1, 0.1, out=grad.data)


class OnlyLarge(Situation):
    """Returns nothing for small gradients, which the first one may be and the second not."""

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
    """Clips at the mean of the norms that it has seen, which the module keeps."""

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
    """In variables of the hook itself, which nothing else can reach."""

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
    """By each step, one after the other, and never removed: a deep copy loses those of earlier steps."""

    has_oracle = False

    def step(self, batch):
        self.net.weight.register_hook(Clamp(0.5))
        self.net.weight.register_hook(lambda grad: 0.9 * grad)
        witness(len(self.net.weight._backward_hooks))
        return self.mse(batch)


class ScaledAfterAccumulation(Situation):
    """Not idempotent, and by a new tensor."""

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(self.scale)

    @staticmethod
    def scale(param):
        param.grad = 0.5 * param.grad + 0.01


class Reversal(torch.autograd.Function):
    """A layer whose backward pass is linear: gradient reversal."""

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
    """With a ratio that reversed the step if a hook clipped the sum of both gradients."""
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
def test_clipping_does_not_turn_the_step_round(form):
    """γ/ε = 10: −9 · 0.1 + 10 · 0.1, which was −9 · 0.1 + 0.1."""
    # each micro-batch arrives separately as a third of the window: 1/3 is also clipped at 0.1
    value = 0.1 * (WINDOW if form == "accumulation" else 1)
    found = train(Parabola, form, forward(1.0, 0.1))
    assert [float(g["net.weight"]) for g in found.gradients] == pytest.approx([value] * len(found.gradients))


def test_hooks_that_only_look_see_the_gradient_of_each_first_pass_once():
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
            # as wandb does: it looks, and returns nothing
            param.register_hook(lambda grad: HISTOGRAMS.append(grad.detach().clone()))


class WatchedByClass(Situation):
    """As wandb's: an object counts the calls, and says something each time that a counter says so."""

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
    """Before and after the one that clips; the first gives its argument back."""

    step = Situation.mse

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(lambda grad: (HISTOGRAMS.append(grad.clone()), grad)[1])
            param.register_hook(Clamp(0.1))
            param.register_hook(lambda grad: HISTOGRAMS.append(grad.clone()))

    histograms = 36


@over(Watched, WatchedByClass, WatchedAfterAccumulation, WatchedAndClipped)
def test_hooks_that_only_look_change_nothing(kind, form):
    check_gradient(kind, form)
    for method in (None, FGR):
        HISTOGRAMS.clear()
        train(kind, form, method)
        assert len(HISTOGRAMS) == getattr(kind, "histograms", 18)


def test_hooks_after_accumulation_are_refused_where_both_gradients_are_reduced_as_one(monkeypatch):
    """With ``ascent_sync=False``. Hooks that see a gradient on its way are right there: see test_hooks_over_ranks."""
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
    """L = w²/2 + 3 v²/2 at 1, whose v is left out and has a hook that must not run twice on its gradient."""

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
    """w = 1, F-GR: 0.5 · 0.6 + 0.4 · 0.5 (1 + 0.5 · 0.5), and then 0.6 + 0.4 (1 + 0.5)."""

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
def test_exact_scheme_beside_hooks(hook):
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


def test_the_hessian_is_that_of_the_loss_and_runs_no_hooks():
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
    """It was registered in the second pass as well, whose handle nobody has."""

    class Removes(Situation):
        def step(self, batch):
            self.handle = self.net.weight.register_hook(Clamp(0.5))
            return self.mse(batch)

        def on_after_backward(self):
            self.handle.remove()

    module = build(Removes, "automatic")
    make_trainer(FGR.callback()).fit(module, Batches(module.make_batches()))
    assert not module.net.weight._backward_hooks
