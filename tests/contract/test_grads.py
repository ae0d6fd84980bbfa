"""The contract for ``.grad``: changes made by a step have the same effect as in plain training."""

import pytest
import torch
from contract import FORMS, Batches, Situation, contract, make_trainer, train, witness
from oracle import forward, sam
from torch import nn

from lightning_gr import GradientRegularizationMixin, GRRule, SAMRule, regularized_backward


class Parabola(Situation):
    """L = w²/2 at w = 2."""

    def prepare(self):
        self.net = nn.Linear(1, 1, bias=False).double()
        self.net.weight.data.fill_(2.0)

    def loss(self):
        return self.net.weight.square().sum() / 2

    def step(self, batch):
        return self.loss()


class InnerBackward(Parabola):
    """An inner backward pass, as for adversarial examples, also adds to the weights' gradients."""

    def step(self, batch):
        (5 * self.net.weight).sum().backward()
        return self.loss()


class ZeroGrad(Parabola):
    def step(self, batch):
        self.zero_grad()
        return self.loss()


class ZeroGradInPlace(Parabola):
    def step(self, batch):
        for param in self.parameters():
            if param.grad is not None:
                param.grad.zero_()
        return self.loss()


class SetNone(Parabola):
    """Sets gradients to None after computing the loss."""

    def step(self, batch):
        loss = self.loss()
        for param in self.net.parameters():
            param.grad = None
        return loss


class InnerThenZero(Parabola):
    """Zeroes gradients after its inner backward pass."""

    def step(self, batch):
        (5 * self.net.weight).sum().backward()
        self.zero_grad()
        return self.loss()


FGR, SAM_ = forward(0.1, 1.0), sam(0.5)
# for the parabola itself: 0.9 · 2 + 0.1 · 4, and 2 + 0.5
CLEAN = {"fgr": 2.2, "sam": 2.5}
# for the last micro-batch alone, weighted by a third: g₀ = 2/3, θ + g₀ = 8/3
THIRD = {"fgr": 0.9 * 2 / 3 + 0.1 * 8 / 9, "sam": 2.5 / 3}
CASES = [
    (InnerBackward, "automatic", CLEAN),
    # gradients are not zeroed before micro-batches 2 and 3: g₀ = 2 + 10, θ + g₀ = 14
    (InnerBackward, "accumulation", {"fgr": 0.9 * 12 + 0.1 * 24, "sam": 12.5}),
    # gradients are not zeroed in a closure: G = L' + 5
    (InnerBackward, "mixin", {"fgr": 0.9 * 7 + 0.1 * 14, "sam": 7.5}),
    (InnerBackward, "functional", {"fgr": 0.9 * 7 + 0.1 * 14, "sam": 7.5}),
    *[(kind, form, CLEAN) for kind in (ZeroGrad, ZeroGradInPlace, SetNone, InnerThenZero) for form in FORMS[:1]],
    *[(kind, form, CLEAN) for kind in (ZeroGrad, ZeroGradInPlace, SetNone, InnerThenZero) for form in FORMS[2:]],
    *[(kind, "accumulation", THIRD) for kind in (ZeroGrad, ZeroGradInPlace, SetNone, InnerThenZero)],
]


@pytest.mark.parametrize("name", ["fgr", "sam"])
@pytest.mark.parametrize(("kind", "form", "expected"), [pytest.param(*c, id=f"{c[0].__name__}-{c[1]}") for c in CASES])
def test_values_by_hand(kind, form, expected, name):
    found = train(kind, form, {"fgr": FGR, "sam": SAM_}[name])
    assert [float(g["net.weight"]) for g in found.gradients] == pytest.approx([expected[name]] * len(found.gradients))


# --- typical programs


class Adversarial(Situation):
    """FGSM: an inner backward pass for the gradient of the input also adds to the weights' gradients."""

    def step(self, batch):
        x = batch[0].clone().requires_grad_()
        self.mse((x, batch[1])).backward()
        witness(x.grad.shape)
        return self.mse((batch[0] + 0.1 * x.grad.sign(), batch[1]))


class AdversarialZeroed(Adversarial):
    """With ``zero_grad``, as in most implementations."""

    def step(self, batch):
        x = batch[0].clone().requires_grad_()
        self.mse((x, batch[1])).backward()
        self.zero_grad()
        return self.mse((batch[0] + 0.1 * x.grad.sign(), batch[1]))


class Virtual(Situation):
    """VAT: power iteration with inner backward passes."""

    def prepare(self):
        self.gen = torch.Generator().manual_seed(0)

    def step(self, batch):
        x, direction = batch[0], torch.randn(batch[0].shape, generator=self.gen, dtype=torch.float64)
        witness(direction)
        for _ in range(2):
            direction = (direction / direction.norm()).detach().requires_grad_()
            distance = (self.net(x + 0.1 * direction) - self.net(x).detach()).square().sum()
            distance.backward()
            direction = direction.grad
            self.net.zero_grad()
        return self.mse((x + 0.1 * direction, batch[1]))


class OnAttribute(Situation):
    """Free adversarial training: the perturbation is a leaf on the module and keeps its ``.grad``."""

    def prepare(self):
        self.delta = torch.zeros(4, 3).double().requires_grad_()

    def step(self, batch):
        witness(self.delta)
        loss = self.mse((batch[0] + self.delta, batch[1]))
        (gradient,) = torch.autograd.grad(loss, self.delta, retain_graph=True)
        with torch.no_grad():
            self.delta.add_(0.01 * gradient.sign())
        self.delta.grad = gradient
        return self.mse((batch[0] + self.delta.detach(), batch[1]))


class LooksAtTheLast(Situation):
    """Looks for gradients left by the previous step, which Lightning zeroes after ``training_step``."""

    has_oracle = False
    forms = FORMS[:2]

    def prepare(self):
        self.norms = []

    def step(self, batch):
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        self.norms.append(len(grads))
        return self.mse(batch)


class Clips(Situation):
    """Adds the clipped gradient of an auxiliary loss."""

    def step(self, batch):
        self.mse(batch).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
        return self.mse(batch) * 2


test_leaves_no_trace, test_gradient = contract(
    InnerBackward,
    ZeroGrad,
    ZeroGradInPlace,
    SetNone,
    InnerThenZero,
    Adversarial,
    AdversarialZeroed,
    Virtual,
    OnAttribute,
    LooksAtTheLast,
    Clips,
)


# --- graphs created before the second pass


def shared(rule, pre):
    """Return the sum of the gradients of a closure and of another loss, whose graph may precede the second pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3).double()
    older = net(x).square().mean() if pre else None
    regularized_backward(lambda: net(x + 1).square().mean(), net, rule)
    (net(x).square().mean() if older is None else older).backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    "rule", [SAMRule(0.5), GRRule(0.1, 0.5), GRRule(0.1, 0.5, scheme="central"), GRRule(0.1, scheme="exact")]
)
def test_a_graph_created_before_the_second_pass_stays_valid(rule):
    for found, expected in zip(shared(rule, True), shared(rule, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


class _Retains(Situation):
    """Uses ``retain_graph`` and differentiates the loss again after the second pass."""

    forms = FORMS[:1]

    def step(self, batch):
        loss = self.mse(batch) + self.net(batch[0]).tanh().square().mean()
        KEPT.append(loss)
        return loss

    def backward(self, loss):
        loss.backward(retain_graph=True)

    def on_before_optimizer_step(self, optimizer):
        params = list(self.net.parameters())
        AGAIN.append([g.clone() for g in torch.autograd.grad(KEPT[0], params)])
        KEPT.clear()


KEPT, AGAIN = [], []


def test_a_retained_graph_can_be_differentiated_again():
    found = []
    for method in (None, sam(0.5)):
        AGAIN.clear()
        KEPT.clear()
        train(_Retains, "automatic", method)
        found.append(list(AGAIN))
    assert len(found[0]) == len(found[1]) == 9
    assert all(torch.equal(a, b) for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True))


class SharedEncoder(GradientRegularizationMixin, Situation):
    """Two losses share an encoding, so the graph of the second precedes the second pass of the first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.a, self.b = (nn.Linear(3, 3).double() for _ in range(3))

    def training_step(self, batch, batch_idx):
        of_a, of_b = self.optimizers()
        z = self.encoder(batch[0])
        of_a.zero_grad()
        of_b.zero_grad()
        self.regularized_backward(lambda: self.a(z.detach()).square().mean(), of_a)
        # through the encoder, and from the second batch on also through weights that the second pass moved
        self.manual_backward(self.b(z).square().mean() + self.a(z).square().mean() if batch_idx else self.b(z).sum())
        of_a.step()
        of_b.step()

    def configure_optimizers(self):
        rest = [*self.encoder.parameters(), *self.b.parameters()]
        return torch.optim.SGD(self.a.parameters(), lr=0.1), torch.optim.SGD(rest, lr=0.1)


def test_a_shared_encoder_in_manual_optimization():
    module = SharedEncoder()
    make_trainer(sam(0.5).callback()).fit(module, Batches(module.make_batches()))
    assert module.trainer.global_step == 18


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_an_older_graph_of_moved_weights_with_the_mixin(scheme):
    """The older graph uses the same weights that the second pass moves."""

    class Older(GradientRegularizationMixin, Situation):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            older = self.net(batch[0]).square().mean()
            self.regularized_backward(lambda: self.mse(batch), optimizer)
            self.manual_backward(older)
            optimizer.step()

    module = Older(0.1)
    module.automatic_optimization = False
    make_trainer(forward(0.1, 0.5).callback()).fit(module, Batches(module.make_batches()))
    assert module.trainer.global_step == 9
