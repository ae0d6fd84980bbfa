"""The contract for other tensors that a step writes to, such as target and teacher networks."""

import copy

import torch
from contract import Situation, contract, witness
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Teacher(Situation):
    """A frozen copy of the network, which the step moves towards the network before it computes the loss."""

    trainable = False

    def prepare(self):
        self.teacher = copy.deepcopy(self.net).requires_grad_(self.trainable)
        with torch.no_grad():
            self.teacher.weight.add_(1.0)

    def pairs(self):
        return zip(self.teacher.parameters(), self.net.parameters(), strict=True)

    def step(self, batch):
        x = batch[0]
        witness(self.teacher.weight)
        self.update()
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.mse(batch) + (self.net(x) - wanted).square().mean()

    def update(self):
        with torch.no_grad():
            for t, p in self.pairs():
                t.copy_(0.9 * t + 0.1 * p)


class ThroughData(Teacher):
    """DINO, BYOL: the update does not increase version counters."""

    def update(self):
        for t, p in self.pairs():
            t.data.mul_(0.9).add_(p.detach().data, alpha=0.1)


class TrainableThroughData(ThroughData):
    trainable = True


class Load(Teacher):
    """DQN: a hard update."""

    def update(self):
        self.teacher.load_state_dict(self.net.state_dict())


class LoadTrainable(Load):
    """The target is also in the optimizer, since ``self.parameters()`` contains it."""

    trainable = True


class EverySeventh(Teacher):
    """A hard update every 7 steps, so that most learning steps see no write."""

    def prepare(self):
        super().prepare()
        self.calls = 0

    def update(self):
        self.calls += 1
        if self.calls % 7 == 0:
            for t, p in self.pairs():
                t.data.copy_(p.data)


class EveryFifthByLoad(EverySeventh):
    trainable = True

    def update(self):
        self.calls += 1
        if self.calls % 5 == 0:
            self.teacher.load_state_dict(self.net.state_dict())


class Rebound(Teacher):
    """``.data`` is replaced by another tensor."""

    def update(self):
        for t, p in self.pairs():
            t.data = 0.9 * t.data + 0.1 * p.data


class Foreach(Teacher):
    def update(self):
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.net.parameters()), 0.1)


class Vector(Teacher):
    def update(self):
        vectors = [nn.utils.parameters_to_vector(net.parameters()) for net in (self.teacher, self.net)]
        nn.utils.vector_to_parameters((0.9 * vectors[0] + 0.1 * vectors[1]).detach(), self.teacher.parameters())


class Copied(Teacher):
    """A new module in each step."""

    def update(self):
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)


class Hidden(Situation):
    """A teacher in a list, so that it is neither trained nor saved."""

    def prepare(self):
        self.hidden = [copy.deepcopy(self.net)]

    def step(self, batch):
        (teacher,) = self.hidden
        witness(teacher.weight)
        for t, p in zip(teacher.parameters(), self.net.parameters(), strict=True):
            t.data.mul_(0.9).add_(p.data, alpha=0.1)
        return self.mse(batch) + (self.net(batch[0]) - teacher(batch[0]).detach()).square().mean()


class HiddenAttribute(Situation):
    """A teacher that is set by ``object.__setattr__``, so that it is not registered as a module."""

    def prepare(self):
        object.__setattr__(self, "teacher", copy.deepcopy(self.net))

    def step(self, batch):
        witness(self.teacher.weight)
        for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.lerp_(p.data, 0.2)
        return self.mse(batch) + (self.net(batch[0]) - self.teacher(batch[0]).detach()).square().mean()


class Averaged(Situation):
    """torch's own weight averaging, including its counter."""

    def prepare(self):
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.average.requires_grad_(False)

    def step(self, batch):
        witness(self.average.n_averaged)
        self.average.update_parameters(self.net)
        return self.mse(batch) + (self.net(batch[0]) - self.average(batch[0])).square().mean()


class Shadow(Situation):
    """Weight averages as in timm and many other repositories: tensors in a dictionary of a plain object."""

    class Average:
        def __init__(self, net):
            self.shadow = {name: value.detach().clone() for name, value in net.named_parameters()}
            self.decay, self.updates = 0.9, 0

        def update(self, net):
            self.updates += 1
            for name, value in net.named_parameters():
                self.shadow[name].mul_(self.decay).add_(value.data, alpha=1 - self.decay)

    def prepare(self):
        self.average = self.Average(self.net)

    def step(self, batch):
        witness(self.average.shadow["bias"])
        self.average.update(self.net)
        return self.mse(batch) * (1 + self.average.shadow["weight"].square().sum())


class Prototypes(Situation):
    """SwAV: the step normalizes trained weights."""

    has_oracle = False  # weights could be moved from the start or from the normalized ones

    def step(self, batch):
        with torch.no_grad():
            self.net.weight.copy_(nn.functional.normalize(self.net.weight.clone(), dim=1))
        return self.mse(batch)


class Clipped(Prototypes):
    """Wasserstein GAN: the step clips trained weights."""

    def step(self, batch):
        for param in self.net.parameters():
            param.data.clamp_(-0.3, 0.3)
        return self.mse(batch)


test_leaves_no_trace, test_gradient = contract(
    Teacher,
    ThroughData,
    TrainableThroughData,
    Load,
    LoadTrainable,
    EverySeventh,
    EveryFifthByLoad,
    Rebound,
    Foreach,
    Vector,
    Copied,
    Hidden,
    HiddenAttribute,
    Averaged,
    Shadow,
    Prototypes,
    Clipped,
)
