"""Reference implementations of all methods in float64, from the papers' equations, without lightning_gr.

Weights θ and gradients are dictionaries of tensors, a loss is a function of θ, and nothing is done in place: θ + s·d is
a new dictionary.
"""

import torch
from torch.func import functional_call


def plain(loss, theta):
    """∇L(θ)."""
    theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    gradients = torch.autograd.grad(loss(theta), list(theta.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(theta, gradients, strict=True))


def norm(vector):
    total = 0.0
    for value in vector.values():
        for entry in value.flatten().tolist():
            total += entry * entry
    return total**0.5


def unit(vector):
    length = norm(vector)
    return {name: value / length if length > 0 else value for name, value in vector.items()}


def combine(a, x, b, y):
    """a·x + b·y."""
    return {name: a * x[name] + b * y[name] for name in x}


def moved(loss, theta, step, direction):
    """∇L(θ + step·direction)."""
    return plain(loss, combine(1.0, theta, step, direction))


def hessian_times(loss, theta, vector):
    """H·vector by double backward."""
    theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    values = list(theta.values())
    first = torch.autograd.grad(loss(theta), values, create_graph=True, allow_unused=True, materialize_grads=True)
    product = sum((g * vector[name].detach()).sum() for name, g in zip(theta, first, strict=True))
    second = torch.autograd.grad(product, values, allow_unused=True, materialize_grads=True)
    return dict(zip(theta, second, strict=True))


def penalty(loss, theta, gamma, epsilon, scheme, direction):
    """∇L + γ·H d, by finite differences (Karakida et al. 2023) or exactly."""
    g = plain(loss, theta)
    if scheme == "exact":
        return combine(1.0, g, gamma, hessian_times(loss, theta, direction))
    ahead, behind = moved(loss, theta, epsilon, direction), moved(loss, theta, -epsilon, direction)
    if scheme == "forward":
        return combine(1 - gamma / epsilon, g, gamma / epsilon, ahead)
    if scheme == "backward":
        return combine(1 + gamma / epsilon, g, -gamma / epsilon, behind)
    return combine(1.0, g, gamma / (2 * epsilon), combine(1.0, ahead, -1.0, behind))


def gradient_regularization(loss, theta, gamma, epsilon, scheme="forward"):
    """The penalty (γ/2)‖∇L‖²: d = ∇L."""
    return penalty(loss, theta, gamma, epsilon, scheme, plain(loss, theta))


def norm_penalty(loss, theta, gamma, epsilon, scheme="forward"):
    """The penalty γ‖∇L‖ (Zhao et al. 2022): d = ∇L/‖∇L‖."""
    return penalty(loss, theta, gamma, epsilon, scheme, unit(plain(loss, theta)))


def sam(loss, theta, rho):
    """∇L(θ + ρ ∇L/‖∇L‖) (Foret et al. 2021)."""
    return moved(loss, theta, rho, unit(plain(loss, theta)))


def asam(loss, theta, rho, eta=0.0):
    """∇L(θ + ρ T²∇L/‖T∇L‖) with T = |θ| + η (Kwon et al. 2021)."""
    g = plain(loss, theta)
    t = {name: value.detach().abs() + eta for name, value in theta.items()}
    scaled = unit({name: t[name] * g[name] for name in g})
    return moved(loss, theta, rho, {name: t[name] * scaled[name] for name in g})


def unnormalized_sam(loss, theta, rho):
    """∇L(θ + ρ ∇L)."""
    return moved(loss, theta, rho, plain(loss, theta))


def inner(x, y):
    return sum(float((x[name] * y[name]).sum()) for name in x)


class MomentumSAM:
    """∇L(θ − ρ v/‖v‖) with v the optimizer's momentum (Becker et al. 2024); ∇L(θ) before there is one."""

    def __init__(self, rho):
        self.rho = rho

    def gradient(self, step, loss, theta, optimizer):
        v = optimizer.momentum_vector
        return moved(loss, theta, -self.rho, unit(v)) if v else plain(loss, theta)


class GSAM:
    """g₁ minus α times the part of g₀ that is perpendicular to it (Zhuang et al. 2022)."""

    def __init__(self, rho, alpha):
        self.rho, self.alpha = rho, alpha

    def gradient(self, step, loss, theta, optimizer):
        g0 = plain(loss, theta)
        g1 = moved(loss, theta, self.rho, unit(g0))
        parallel = {name: inner(g0, g1) / inner(g1, g1) * g1[name] for name in g1}
        perpendicular = combine(1.0, g0, -1.0, parallel)
        return combine(1.0, g1, -self.alpha, perpendicular)


class FriendlySAM:
    """SAM along g₀ − σ m, with m an average of earlier gradients (Li et al. 2024)."""

    def __init__(self, rho, sigma, decay):
        self.rho, self.sigma, self.decay, self.average = rho, sigma, decay, None

    def gradient(self, step, loss, theta, optimizer):
        g0, m = plain(loss, theta), self.average
        direction = g0 if m is None else combine(1.0, g0, -self.sigma, m)
        self.average = g0 if m is None else combine(self.decay, m, 1 - self.decay, g0)
        return moved(loss, theta, self.rho, unit(direction))


class LookSAM:
    """SAM every k steps; the steps between reuse the part of its gradient perpendicular to g₀ (Liu et al. 2022)."""

    def __init__(self, rho, alpha, interval):
        self.rho, self.alpha, self.interval, self.kept = rho, alpha, interval, None

    def gradient(self, step, loss, theta, optimizer):
        g0 = plain(loss, theta)
        if step % self.interval == 0:
            g1 = moved(loss, theta, self.rho, unit(g0))
            self.kept = combine(1.0, g1, -inner(g1, g0) / inner(g0, g0), g0)
            return g1
        return combine(1.0, g0, self.alpha * norm(g0) / norm(self.kept), self.kept)


def clipped(gradient, limit):
    """Scale ``gradient`` down to the norm ``limit`` if its norm is larger."""
    factor = min(1.0, limit / norm(gradient))
    return {name: factor * value for name, value in gradient.items()}


def excluding(method, names):
    """Apply ``method`` to the parameters that are not in ``names``; those in ``names`` keep ∇L(θ)."""

    def gradient(loss, theta):
        fixed = {name: value for name, value in theta.items() if name in names}
        free = {name: value for name, value in theta.items() if name not in names}
        clean = plain(loss, theta)
        return {**{n: clean[n] for n in fixed}, **method(lambda part: loss({**fixed, **part}), free)}

    return gradient


def flooded(loss, level):
    """|L − b| + b as a function of θ."""
    return lambda theta: (loss(theta) - level).abs() + level


def loss_of(net, loss, window, parts=1, level=None):
    """Σ L(batch)/parts over a window of micro-batches as a function of θ, each flooded at ``level``."""

    def total(theta):
        losses = [loss(lambda *inputs: functional_call(net, theta, inputs), batch) for batch in window]
        if level is not None:
            losses = [(value - level).abs() + level for value in losses]
        return sum(losses) / parts

    return total


class SGD:
    """v ← μv + g, θ ← θ − ηv."""

    def __init__(self, lr=0.1, momentum=0.9):
        self.lr, self.momentum, self.velocity = lr, momentum, None

    @property
    def momentum_vector(self):
        return self.velocity

    def step(self, theta, g):
        self.velocity = g if self.velocity is None else combine(self.momentum, self.velocity, 1.0, g)
        return combine(1.0, theta, -self.lr, self.velocity)


class Adam:
    """Kingma & Ba (2015), algorithm 1; with ``decay``, AdamW (Loshchilov & Hutter 2019), algorithm 2."""

    def __init__(self, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.0):
        self.lr, self.beta1, self.beta2, self.eps, self.decay = lr, beta1, beta2, eps, decay
        self.m, self.v, self.t = {}, {}, 0

    @property
    def momentum_vector(self):
        return self.m

    def step(self, theta, g):
        self.t += 1
        new = {}
        for name, value in theta.items():
            self.m[name] = self.beta1 * self.m.get(name, 0.0) + (1 - self.beta1) * g[name]
            self.v[name] = self.beta2 * self.v.get(name, 0.0) + (1 - self.beta2) * g[name] ** 2
            m, v = self.m[name] / (1 - self.beta1**self.t), self.v[name] / (1 - self.beta2**self.t)
            new[name] = (1 - self.lr * self.decay) * value - self.lr * m / (v.sqrt() + self.eps)
        return new


def train(net, losses, optimizer, gradient):
    """Take one optimizer step with ``gradient(step, loss, θ)`` for each of ``losses``; return θ."""
    theta = {name: value.detach().clone() for name, value in net.named_parameters() if value.requires_grad}
    for step, loss in enumerate(losses):
        theta = optimizer.step(theta, gradient(step, loss, theta))
    return theta


def train_with(net, losses, optimizer, method):
    """Like :func:`train`, for a method that keeps state between steps."""
    return train(net, losses, optimizer, lambda step, loss, theta: method.gradient(step, loss, theta, optimizer))
