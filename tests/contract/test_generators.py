"""The contract for random number generators, both global ones and those reachable from the module."""

import random
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from contract import Situation, contract, witness
from torch import nn
from torch.quasirandom import SobolEngine


class Noise(Situation):
    """Multiplies its input by noise, which the second pass must draw again."""

    def draw(self):
        raise NotImplementedError

    def step(self, batch):
        x, y = batch
        noise = torch.as_tensor(self.draw()).double()
        witness(noise)
        return self.mse((x * (1 + noise), y))


class Torch(Noise):
    """A torch generator, as in a VAE."""

    def prepare(self):
        self.gen = torch.Generator().manual_seed(1)

    def draw(self):
        return torch.randn(3, generator=self.gen)


class NumPy(Noise):
    def prepare(self):
        self.rng = np.random.default_rng(0)

    def draw(self):
        return self.rng.normal(size=3)


class Philox(NumPy):
    def prepare(self):
        self.rng = np.random.Generator(np.random.Philox(5))


class Legacy(Noise):
    def prepare(self):
        self.rng = np.random.RandomState(0)

    def draw(self):
        return self.rng.rand(3)


class Python(Noise):
    def prepare(self):
        self.rng = random.Random(0)

    def draw(self):
        return [self.rng.gauss(0, 1) for _ in range(3)]


class Sobol(Noise):
    def prepare(self):
        self.engine = SobolEngine(3, scramble=True, seed=0)

    def draw(self):
        return self.engine.draw(1)[0]


class Augmentation:
    """A plain object with a legacy generator, as in MONAI and braindecode."""

    def __init__(self):
        self.R = np.random.RandomState(0)
        self.applied = 0

    def __call__(self, count):
        self.applied += 1
        return self.R.uniform(size=count)


class InObject(Noise):
    def prepare(self):
        self.augment = Augmentation()

    def draw(self):
        return self.augment(3)


class InObjects(Noise):
    """A pipeline: objects in a list in an object in a dictionary."""

    @dataclass
    class Compose:
        steps: list = field(default_factory=lambda: [Augmentation(), Augmentation()])

    def prepare(self):
        self.pipelines = {"train": self.Compose()}

    def draw(self):
        return sum(step(3) for step in self.pipelines["train"].steps)


class InSlots(Noise):
    """An object without ``__dict__``."""

    class Box:
        __slots__ = ("gen",)

    def prepare(self):
        self.box = self.Box()
        self.box.gen = torch.Generator().manual_seed(2)

    def draw(self):
        return torch.rand(3, generator=self.box.gen)


class InTuple(Noise):
    def prepare(self):
        self.rngs = (torch.Generator().manual_seed(2), np.random.default_rng(4))

    def draw(self):
        return torch.rand(3, generator=self.rngs[0]) + torch.as_tensor(self.rngs[1].normal(size=3))


class InPartial(Noise):
    def prepare(self):
        self.sample = partial(torch.randn, 3, generator=torch.Generator().manual_seed(2))

    def draw(self):
        return self.sample()


class InBoundMethod(Noise):
    """The generator is only reachable through one of its methods."""

    def prepare(self):
        self.sample = np.random.default_rng(3).normal

    def draw(self):
        return self.sample(size=3)


class InLayer(Noise):
    """An attribute of a torch.nn layer, used by its hook."""

    class Draw:
        def __call__(self, layer, args):
            layer.noise = torch.rand(3, generator=layer.gen)

    def prepare(self):
        self.source = nn.Identity()
        self.source.gen = torch.Generator().manual_seed(2)
        self.source.register_forward_pre_hook(self.Draw())

    def draw(self):
        self.source(torch.zeros(()))
        return self.source.noise


class MadeLate(Noise):
    """Created in the first step, because the device is not known earlier."""

    def prepare(self):
        self.rng = None

    def draw(self):
        if self.rng is None:
            self.rng = torch.Generator().manual_seed(3)
        return torch.randn(3, generator=self.rng)


class UsedLate(Noise):
    """First used in the sixth step, between two learning steps."""

    def prepare(self):
        self.rng, self.calls = np.random.default_rng(0), 0

    def draw(self):
        self.calls += 1
        return self.rng.normal(size=3) if self.calls > 5 else [0.0]


class Spawned(Noise):
    """Each step replaces the generator."""

    def prepare(self):
        self.gen = torch.Generator().manual_seed(4)

    def draw(self):
        child = torch.Generator().manual_seed(int(torch.randint(1000, (), generator=self.gen)))
        self.gen = child
        return torch.randn(3, generator=child)


class Global(Noise):
    def draw(self):
        return torch.randn(3) + torch.as_tensor(np.random.rand(3)) + random.random()


class Reseeded(Noise):
    """Each step seeds the global generators."""

    def prepare(self):
        self.calls = 0

    def draw(self):
        self.calls += 1
        torch.manual_seed(self.calls)
        np.random.seed(self.calls)
        return torch.randn(3) + torch.as_tensor(np.random.rand(3))


class Forked(Noise):
    """``fork_rng`` restores the generator after the inner draws, but not after those before it."""

    def draw(self):
        before = torch.rand(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inside = torch.rand(3)
        return before + inside


test_leaves_no_trace, test_gradient = contract(
    Torch,
    NumPy,
    Philox,
    Legacy,
    Python,
    Sobol,
    InObject,
    InObjects,
    InSlots,
    InTuple,
    InPartial,
    InBoundMethod,
    InLayer,
    MadeLate,
    UsedLate,
    Spawned,
    Global,
    Reseeded,
    Forked,
)
