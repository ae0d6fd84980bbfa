"""The contract for state that a search of only attributes and containers would miss."""

import contextvars
import functools
import io
import threading
import types

import numpy as np
import torch
from contract import Situation, contract, witness
from situations import Factor
from torch import nn


class Held:
    """An object with a counter."""

    def __init__(self):
        self.count = 0


class Keys(Factor):
    """The keys of a dictionary and the items of a set are objects, one of them a tensor."""

    def prepare(self):
        self.table, self.seen, self.key = {Held(): 1.0}, {Held()}, torch.zeros(2)
        self.by_tensor = {self.key: 1.0}

    def factor(self, loss):
        for each in (*self.table, *self.seen):
            each.count += 1
        self.by_tensor[self.key] += 1
        self.key.add_(1)
        return sum(each.count for each in (*self.table, *self.seen)) + self.by_tensor[self.key] + self.key.sum()


class Registry:
    count, entries = 0, []

    @classmethod
    def add(cls):
        cls.count += 1
        cls.entries.append(1)
        return cls.count + len(cls.entries)


class ClassItself(Factor):
    """An attribute is a class rather than an instance."""

    has_oracle = False

    def prepare(self):
        Registry.count, Registry.entries = 0, []
        self.registry = Registry

    def factor(self, loss):
        return self.registry.add()


class LocalClass(Factor):
    """The methods and properties of a local class share variables of the enclosing function."""

    has_oracle = False

    def prepare(self):
        count, seen, box = 0, [], [0]

        class Local:
            def step(self):
                nonlocal count
                count += 1
                seen.append(1)
                return count + len(seen) + self.next + self.also()

            @property
            def next(self):
                box[0] += 1
                return box[0]

            @staticmethod
            def also():
                box[0] += 1
                return box[0]

        self.local = Local()

    def factor(self, loss):
        return self.local.step()


class BoundToBuiltins(Factor):
    """Methods of builtin objects, partials and defaults of keyword arguments."""

    has_oracle = False

    def prepare(self):
        items, held = [], Held()
        self.add, self.size = items.append, items.__len__
        self.set, self.get = functools.partial(setattr, held, "count"), functools.partial(getattr, held, "count")

        def remember(*, memo=[0]):  # noqa: B006 - mutable on purpose
            memo[0] += 1
            return memo[0]

        self.remember = remember

    def factor(self, loss):
        self.add(1)
        self.set(self.get() + 1)
        return self.size() + self.get() + self.remember()


class Cache(Factor):
    """Values kept by ``functools.cache`` and ``cached_property``."""

    has_oracle = False

    @functools.cache  # noqa: B019
    def buffer(self, size):
        return torch.zeros(size)

    @functools.cached_property
    def table(self):
        return [0.0]

    def factor(self, loss):
        self.buffer(3).add_(1)
        self.table[0] += 1
        return self.buffer(3).sum() + self.table[0] + self.buffer(int(self.table[0])).sum()


class Views(Factor):
    """State that is only reachable through views."""

    has_oracle = False

    def prepare(self):
        self.proxy = types.MappingProxyType({"a": [1.0]})
        self.numbers, self.raw = {"x": [1.0]}.values(), memoryview(bytearray(4))

    def factor(self, loss):
        inner = next(iter(self.numbers))
        self.proxy["a"][0] += 1
        self.raw[1] += 1
        inner[0] += 1
        return self.proxy["a"][0] + self.raw[1] + inner[0]


class OnTensors(Factor):
    """Attributes of tensors and parameters."""

    has_oracle = False

    def prepare(self):
        self.state = torch.zeros(3)
        self.state.age, self.net.weight.ages = 0, [0]

    def factor(self, loss):
        self.state.age += 1
        self.net.weight.ages[0] += 1
        return self.state.age + self.net.weight.ages[0]


class Tagged(torch.Tensor):
    pass


class TensorSubclass(Factor):
    has_oracle = False

    def prepare(self):
        self.small, self.large = torch.zeros(3).as_subclass(Tagged), torch.zeros(3000).as_subclass(Tagged)
        self.small.note = [1.0]

    def factor(self, loss):
        before = float(self.small.sum() + self.large.sum())
        self.small.add_(1)
        self.large.add_(1)
        self.small.note[0] += 1
        return before + self.small.note[0]


class InMemory(Factor):
    """Files in memory, a context variable and a thread-local variable."""

    has_oracle = False

    def prepare(self):
        self.text, self.bytes = io.StringIO(), io.BytesIO()
        self.variable, self.local = contextvars.ContextVar("variable"), threading.local()
        self.variable.set(0)
        self.local.count = 0

    def factor(self, loss):
        self.text.write("ab")
        self.bytes.write(b"abc")
        self.variable.set(self.variable.get() + 1)
        self.local.count += 1
        return len(self.text.getvalue()) + len(self.bytes.getvalue()) + self.variable.get() + self.local.count


class PrivateSlots(Factor):
    class Slotted:
        __slots__ = ("__count", "items")

        def __init__(self):
            self.__count, self.items = 0, []

        def step(self):
            self.__count += 1
            self.items.append(1)
            return self.__count + len(self.items)

    def prepare(self):
        self.slotted = self.Slotted()

    def factor(self, loss):
        return self.slotted.step()


class Arrays(Factor):
    """Arrays with fields, with a mask, with objects in a field, and without dimensions."""

    def prepare(self):
        self.fields = np.zeros(3, dtype=[("x", "f8"), ("n", "i4")])
        self.masked = np.ma.masked_array([1.0, 2.0], mask=[0, 0])
        self.objects, self.number = np.zeros(2, dtype=[("x", "f8"), ("o", "O")]), np.zeros(())
        self.objects[0]["o"] = self.inner = [1.0]

    def factor(self, loss):
        self.fields["x"] += 1
        self.masked[0] = self.masked[0] + 1
        self.masked[1] = np.ma.masked if len(self.inner) % 2 else 2.0
        self.number += 1
        self.objects[0]["o"].append(1.0)
        self.objects["x"] += 1
        total = self.fields["x"].sum() + float(self.masked.sum()) + float(self.number)
        return total + len(self.inner) + self.objects["x"].sum()


# --- tensors and layers


class WantsGradient(Situation):
    """``requires_grad`` is toggled in each step."""

    def prepare(self):
        self.extra = nn.Parameter(torch.zeros(1).double())

    def step(self, batch):
        self.extra.requires_grad_(not self.extra.requires_grad)
        witness(self.extra.requires_grad)
        return self.mse(batch) * (1 + self.extra.sum())


class Layers(Factor):
    """Mode, options and attributes of torch's layers, first changed between two learning evaluations."""

    def prepare(self):
        self.drop, self.calls = nn.Dropout(0.5), 0
        self.pair = nn.Sequential(nn.Identity(), nn.Dropout(0.1))

    def factor(self, loss):
        self.calls += 1
        if self.calls >= 3:
            self.drop.train(not self.drop.training)
            self.drop.p *= 0.9
            self.net.tag = getattr(self.net, "tag", 0) + 1
        if self.calls in (3, 6):
            self.pair[0], self.pair[1] = self.pair[1], self.pair[0]
        return float(self.drop(torch.ones(10)).sum()) + getattr(self.net, "tag", 0) + self.pair[1].training


class Modules(Factor):
    """Containers of modules and parameters grow and shrink, also between two learning evaluations."""

    def prepare(self):
        self.calls, self.list, self.dict, self.chain = 0, nn.ModuleList(), nn.ModuleDict(), nn.Sequential()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(2), requires_grad=False)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2), requires_grad=False)})

    def factor(self, loss):
        self.calls += 1
        self.weights[0].add_(1)
        self.named["a"].add_(1)
        if self.calls in (1, 3, 6):
            self.weights.append(nn.Parameter(torch.zeros(2), requires_grad=False))
            self.list.append(nn.BatchNorm1d(2, affine=False))
            self.dict[f"m{len(self.dict)}"] = nn.BatchNorm1d(2, affine=False)
            self.chain.append(nn.BatchNorm1d(2, affine=False))
        if self.calls == 7:
            self.dict.pop("m0")
            del self.list[0]
        norms = [*self.list, *self.dict.values(), *self.chain]
        for norm in norms:
            norm(torch.randn(4, 2))
        return self.weights[0].sum() + self.named["a"].sum() + len(self.weights) + sum(n.running_var[0] for n in norms)


class PointedElsewhere(Factor):
    """Two tensors swap their ``.data``; ``set_`` and ``resize_`` give others new memory."""

    size = 2

    def prepare(self):
        self.front, self.back = torch.zeros(self.size), torch.ones(self.size)
        self.other, self.longer = torch.zeros(self.size), torch.zeros(self.size)

    def factor(self, loss):
        before = self.other.mean() + self.longer.mean() + len(self.other) + len(self.longer)
        self.front.data, self.back.data = self.back.data, self.front.data
        self.front.add_(1)
        self.other.set_(torch.full((len(self.other) + 1,), float(before)))
        self.longer.resize_(len(self.longer) + 1)
        self.longer[-1] = 1.0
        return 2 * self.front.mean() + self.back.mean() + 0.1 * before


class LargePointedElsewhere(PointedElsewhere):
    size = 3000


class OtherTypes(Factor):
    """A layer is converted back and forth."""

    def prepare(self):
        self.layer = nn.Linear(2, 2).requires_grad_(False)

    def factor(self, loss):
        self.layer.half() if self.layer.weight.dtype == torch.float32 else self.layer.float()
        self.layer.weight.add_(1)
        return float(self.layer.weight.float().mean()) + (self.layer.weight.dtype == torch.float32)


class Parts(Factor):
    """Tensors with several entries at the same address, and the values inside sparse tensors."""

    has_oracle = False

    def prepare(self):
        self.base = torch.zeros(4)
        self.wide, self.windows = self.base.expand(3, 4), self.base.unfold(0, 2, 1)
        self.coo, self.lazy_sign = torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.complex64).conj().imag

    def factor(self, loss):
        self.base += 1
        self.coo.values().mul_(0.9) if self.coo.is_coalesced() else None
        self.coo.mul_(0.9)
        return self.wide.sum() + self.windows.sum() + self.coo.to_dense().sum() + self.lazy_sign.sum()


test_leaves_no_trace, test_gradient = contract(
    Keys, ClassItself, LocalClass, BoundToBuiltins, Cache, Views, OnTensors, TensorSubclass, InMemory, PrivateSlots,
    Arrays, WantsGradient, Layers, Modules, PointedElsewhere, LargePointedElsewhere, OtherTypes, Parts,
)  # fmt: skip
