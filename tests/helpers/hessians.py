"""A dense reference Hessian, and losses to compare it on."""

import random

import numpy as np
import torch
from modules import cross_entropy, make_data, mlp
from torch import nn
from torch.func import functional_call

DATA = make_data()
NETS = {
    "one layer": lambda: mlp(6),
    "two layers": lambda: mlp(8, 4, seed=3),
    "softplus": lambda: mlp(6, activation=nn.Softplus),
}


def loss_of(net, data=DATA):
    return lambda: cross_entropy(net, data)


def dense_hessian(net, data=DATA):
    """Compute the dense Hessian column by column."""
    named = {n: p.detach() for n, p in net.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def loss(flat):
        theta = {n: x.view_as(p) for (n, p), x in zip(named.items(), flat.split(sizes), strict=True)}
        return cross_entropy(lambda x: functional_call(net, theta, (x,)), data)

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in named.values()]))


class Noisy(nn.Module):
    """A module that draws random numbers, counts calls and keeps statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append((np.random.rand(), random.random()))
        return self.layers(x)
