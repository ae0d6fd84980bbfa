"""The contract for hooks on modules and tensors, and for attributes that they set on layers of torch.nn."""

import torch
from contract import Situation, contract, witness
from torch import nn


class Hooked(Situation):
    """Hooks are objects, so that deep copies get copies of them."""

    def prepare(self):
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.put(self.net)

    def put(self, net):
        raise NotImplementedError

    def factor(self):
        raise NotImplementedError

    def step(self, batch):
        factor = float(self.factor())
        witness(factor)
        return self.mse(batch) * (1 + 0.1 * factor)


class Output:
    def __call__(self, layer, args, output):
        layer.last_output = output.detach()
        layer.norms = [*getattr(layer, "norms", []), float(output.detach().norm())]


class Activations(Hooked):
    """Feature extraction: a hook keeps the output on the layer."""

    def put(self, net):
        net[0].register_forward_hook(Output())

    def factor(self):
        return len(getattr(self.net[0], "norms", [])) + float(getattr(self.net[0], "last_output", torch.zeros(1)).sum())


class Count:
    def __call__(self, layer, args):
        layer.calls = getattr(layer, "calls", 0) + 1
        layer.stats.setdefault("inputs", []).append(float(args[0].detach().sum()))


class Calls(Hooked):
    """A counter and a dictionary on the activation and on the container."""

    def put(self, net):
        for layer in (net, net[1]):
            layer.stats = {}
            layer.register_forward_pre_hook(Count())

    def factor(self):
        return getattr(self.net[1], "calls", 0)


class Running:
    def __call__(self, layer, args, output):
        layer.running.data.lerp_(output.detach().mean(0), 0.1)


class RunningMean(Hooked):
    """A tensor on the layer, written to through ``.data``."""

    def put(self, net):
        net[0].running = torch.zeros(4).double()
        net[0].register_forward_hook(Running())

    def factor(self):
        return self.net[0].running.sum()


class Backward:
    def __call__(self, layer, grad_input, grad_output):
        layer.grad_norms.append(float(grad_output[0].norm()))


class GradientNorms(Hooked):
    """A backward hook of a module."""

    has_oracle = False  # the oracle's second gradient is not weighted

    def put(self, net):
        net[2].grad_norms = []
        net[2].register_full_backward_hook(Backward())

    def factor(self):
        return len(self.net[2].grad_norms)


class OnTensor(Hooked):
    """A hook that the step registers on an activation, as in Grad-CAM."""

    has_oracle = False

    def put(self, net):
        self.seen = []

    def factor(self):
        return len(self.seen)

    def step(self, batch):
        x, y = batch
        hidden = self.net[0](x)
        hidden.register_hook(lambda grad: self.seen.append(float(grad.norm())))
        witness(self.factor())
        return (self.net[2](hidden.tanh()) - y).square().mean() * (1 + 0.1 * len(self.seen))


class Pruned(Hooked):
    """``torch.nn.utils.prune`` computes the weight in a hook in each call."""

    has_oracle = False  # torch refuses to deep-copy a weight with a graph

    def put(self, net):
        nn.utils.prune.random_unstructured(net[0], "weight", 0.5)
        self.calls = 0

    def factor(self):
        self.calls += 1
        return self.calls


class Spectral(Hooked):
    """The old spectral norm: a hook updates a buffer and sets the weight as a plain attribute."""

    has_oracle = False

    def put(self, net):
        nn.utils.spectral_norm(net[0])

    def factor(self):
        return self.net[0].weight_u.sum()


test_leaves_no_trace, test_gradient = contract(
    Activations, Calls, RunningMean, GradientNorms, OnTensor, Pruned, Spectral
)
