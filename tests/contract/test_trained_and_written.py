"""Weights that the optimizer trains and that the step itself writes as well: a second pass starts where it started."""

import torch
from contract import Situation, contract, witness
from torch import nn


class Clamped(Situation):
    """Weights are clipped at the start of the step, as those of a critic."""

    def step(self, batch):
        witness(torch.get_rng_state().sum())
        self.write()
        return self.mse(batch)

    def write(self):
        with torch.no_grad():
            for param in self.net.parameters():
                param.clamp_(-0.3, 0.3)


class Shrunk(Clamped):
    """By something that is not idempotent, through ``.data``."""

    def write(self):
        for param in self.net.parameters():
            param.data.mul_(0.9)


class Normalized(Clamped):
    """Prototypes (SwAV): ``.data`` is another tensor afterwards."""

    def write(self):
        self.net.weight.data = nn.functional.normalize(self.net.weight.data, dim=-1)


class Late(Shrunk):
    """First in the fourth call, which is one to learn from."""

    def prepare(self):
        self.calls = 0

    def write(self):
        self.calls += 1
        if self.calls > 3:
            super().write()


class InnerOptimizer(Situation):
    """A codebook with its own Adam, which steps before the loss is computed."""

    forms = ("automatic", "mixin", "functional")

    def prepare(self):
        self.code = nn.Parameter(torch.zeros(2).double())
        self.inner = torch.optim.Adam([self.code], lr=0.1)

    def step(self, batch):
        out = self.net(batch[0])
        self.inner.zero_grad()
        (out.detach().mean(0) - self.code).square().sum().backward()
        self.inner.step()
        self.inner.zero_grad()
        return self.mse(batch) + (out - self.code).square().mean()


test_leaves_no_trace, test_gradient = contract(Clamped, Shrunk, Normalized, Late, InnerOptimizer)
