"""The contract for containers, NumPy arrays and plain attributes of every kind."""

from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import torch
from contract import contract
from situations import Factor


class Number(Factor):
    def prepare(self):
        self.calls = 0

    def factor(self, loss):
        self.calls += 1
        return self.calls


class HParams(Factor):
    """Annealing, as for a VAE's beta."""

    def prepare(self):
        self.hparams.beta = 1.0

    def factor(self, loss):
        self.hparams.beta *= 0.9
        return self.hparams.beta


class NestedLists(Factor):
    def prepare(self):
        self.history = [[], [[0.0]]]

    def factor(self, loss):
        before = len(self.history[0]) + sum(self.history[1][0])
        self.history[0].append(loss)
        self.history[1][0][0] += 1.0
        return before


class Counts(Factor):
    def prepare(self):
        self.counter = Counter(a=1)

    def factor(self, loss):
        self.counter["a"] += 1
        self.counter.update(["b", round(loss, 6)])  # rounded, as both ways to compute this key must agree
        return self.counter["a"]


class Array(Factor):
    def prepare(self):
        self.array = np.zeros((2, 3))

    def factor(self, loss):
        before = self.array.sum()
        self.array += 1.0
        return before


class ArrayViews(Factor):
    """An array, a view of it and a tensor that share memory."""

    def prepare(self):
        self.array = np.zeros(4)
        self.tensor, self.half = torch.from_numpy(self.array), self.array[:2]

    def factor(self, loss):
        before = float(self.tensor.sum())
        self.half += 1.0
        return before


class ObjectArray(Factor):
    def prepare(self):
        self.array = np.array([[1.0], {"n": 2.0}], dtype=object)

    def factor(self, loss):
        self.array[1]["n"] += 1.0
        self.array[0].append(loss)
        return self.array[1]["n"]


class TensorsInDict(Factor):
    def prepare(self):
        self.stats = {"mean": torch.zeros(2), "deep": {"var": [torch.ones(2)]}}

    def factor(self, loss):
        before = self.stats["mean"].sum() + self.stats["deep"]["var"][0].sum()
        self.stats["mean"].add_(0.5)
        self.stats["deep"]["var"][0].data.mul_(0.9)
        return before


class TensorAttribute(Factor):
    """Tensors in plain attributes, written to in place, through NumPy and through a view."""

    def prepare(self):
        self.total, self.mean, self.flat = torch.zeros(2, 2), torch.zeros(2), torch.zeros(4)
        self.matrix = self.flat.view(2, 2)

    def factor(self, loss):
        before = self.total.sum() + self.mean.sum() + self.flat.sum()
        self.total += 1.0
        self.mean.numpy()[:] += 1.0
        self.matrix[0, 1] += 1.0
        return before


class Deques(Factor):
    """A replay memory of fixed length."""

    def prepare(self):
        self.memory, self.groups = deque([0.0] * 3, maxlen=3), defaultdict(list)

    def factor(self, loss):
        self.memory.append(len(self.groups["all"]))
        self.groups["all"].append(loss)
        self.groups[len(self.groups["all"])].append(1)
        return sum(self.memory)


class Order(Factor):
    """Only the order of the entries changes."""

    def prepare(self):
        self.cache, self.names = OrderedDict(a=1.0, b=2.0, c=3.0), {"x": 1.0, "y": 2.0}

    def factor(self, loss):
        first = next(iter(self.cache))
        self.cache.move_to_end(first)
        self.names["x"] = self.names.pop("x")
        return self.cache[first]


class Sets(Factor):
    """The result depends on the iteration order of a set, as in scvi-tools.

    The items are numbers, whose order is the same in each process. With strings whose hashes collide, a second pass may
    find another order, but the set itself never changes: see ``replay/test_stand_ins.py``.
    """

    has_oracle = False  # a deep copy may have another order

    def prepare(self):
        self.seen = {7919 * index % 1000 for index in range(20)}

    def factor(self, loss):
        first = next(iter(self.seen))
        self.seen.remove(first)
        self.seen.add(first + 1000)
        return first / 1000


test_leaves_no_trace, test_gradient = contract(
    Number,
    HParams,
    NestedLists,
    Counts,
    Array,
    ArrayViews,
    ObjectArray,
    TensorsInDict,
    TensorAttribute,
    Deques,
    Order,
    Sets,
)
