"""DESIGN §3, row "hooks on modules and tensors": those on parameters see what they'd see of a loss by itself."""

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
)
from oracle import CENTRAL, FGR, forward, sam
from torch import nn

from lightning_gr import GradientRegularization, GRRule


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


HOOKED = [Clamped, Partly, Normalized, Sign, Masked, Noisy, AfterAccumulation]
for _kind in HOOKED:
    _kind.step = Situation.mse

test_leaves_no_trace, test_gradient = contract(*HOOKED, Adversary)


@over(*HOOKED)
def test_with_other_methods(kind, form):
    """With a ratio that turned the step round, where one hook clips both gradients as one."""
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
    # each micro-batch of a window comes by itself, a third of it: 1/3 is clipped at 0.1 too
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


HISTOGRAMS = []


class Watched(Situation):
    step = Situation.mse

    def hook(self):
        for param in self.net.parameters():
            # as wandb does: it looks, and returns nothing
            param.register_hook(lambda grad: HISTOGRAMS.append(grad.detach().clone()))


@over(Watched)
def test_hooks_that_only_look_change_nothing(kind, form):
    check_gradient(kind, form)
    for method in (None, FGR):
        HISTOGRAMS.clear()
        train(kind, form, method)
        assert len(HISTOGRAMS) == 18


def test_each_rank_clipping_by_itself_is_refused(monkeypatch):
    """With ``ascent_sync=False`` both gradients are reduced as one."""
    module = build(Clamped, "automatic")
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
