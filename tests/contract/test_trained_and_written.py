"""The contract for trained weights that the step writes to: second passes start where the first one did."""

import torch
from contract import Situation, contract, witness
from torch import nn


class Clamped(Situation):
    """Clips weights at the start of the step, as in a critic."""

    def step(self, batch):
        witness(torch.get_rng_state().sum())
        self.write()
        return self.mse(batch)

    def write(self):
        with torch.no_grad():
            for param in self.net.parameters():
                param.clamp_(-0.3, 0.3)


class Shrunk(Clamped):
    """Writes through ``.data``, and is not idempotent."""

    def write(self):
        for param in self.net.parameters():
            param.data.mul_(0.9)


class Normalized(Clamped):
    """Prototypes (SwAV): replaces ``.data`` by another tensor."""

    def write(self):
        self.net.weight.data = nn.functional.normalize(self.net.weight.data, dim=-1)


class Late(Shrunk):
    """Writes for the first time in the fourth step, which is a learning step."""

    def prepare(self):
        self.calls = 0

    def write(self):
        self.calls += 1
        if self.calls > 3:
            super().write()


class InnerOptimizer(Situation):
    """A codebook with its own Adam, which steps before the loss is computed, as in vector quantization."""

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
