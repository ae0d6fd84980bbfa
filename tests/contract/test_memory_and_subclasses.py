"""The contract for memory shared with other processes, and for tensor subclasses with their own methods."""

import ctypes
import multiprocessing

import pytest
import torch
from contract import Situation, check_gradient, contract, over, train
from oracle import FGR, HUGE
from situations import Factor


class Shared(Factor):
    """The cursor and the lengths of a replay memory (torchrl), which cannot be deep-copied."""

    has_oracle = False

    def prepare(self):
        self.cursor, self.lengths = multiprocessing.Value("i", 0), multiprocessing.Array("d", 3)
        self.raw = (ctypes.c_long * 2)()

    def factor(self, loss):
        with self.cursor.get_lock():
            self.cursor.value += 1
        self.lengths[self.cursor.value % 3] += 0.5
        self.raw[1] += 1
        return self.cursor.value + sum(self.lengths) + self.raw[1]


class Labelled(torch.Tensor):
    """Tensors with labels as in PINA, which reject many methods without them."""

    @staticmethod
    def __new__(cls, values, labels):
        return values.as_subclass(cls)

    def __init__(self, values, labels):
        self._labels = labels

    def __deepcopy__(self, memo):
        return Labelled(self.as_subclass(torch.Tensor).detach().clone(), list(self._labels))

    def clone(self):
        return Labelled(super().clone(), list(self._labels))

    def reshape(self, *shape):
        raise ValueError("labels do not match")

    def copy_(self, other):
        raise TypeError("labels do not match")

    flatten = resize_ = reshape


class Labels(Situation):
    """Small and large attributes, read or written to, and tensors of the batch."""

    def prepare(self):
        self.small = Labelled(torch.zeros(2).double(), ["a", "b"])
        self.large = Labelled(torch.zeros(600, 2).double(), ["a", "b"])
        self.read = Labelled(torch.ones(600, 2).double(), ["a", "b"])

    def make_batches(self):
        return [(Labelled(x, ["x", "y", "z"]), y) for x, y in super().make_batches()]

    def step(self, batch):
        x, y = batch
        assert x._labels == ["x", "y", "z"]
        x = x.as_subclass(torch.Tensor)
        self.small += 1.0
        torch.Tensor.add_(self.large, x.mean())
        weight = self.small.sum() + self.large.mean() + self.read.mean()
        return self.mse((x, y)) * weight.as_subclass(torch.Tensor)


test_leaves_no_trace, test_gradient = contract(Shared, Labels)


@over(Shared, forms=("automatic", "accumulation", "functional"))
def test_gradient_with_shared_memory(kind, form):
    """The gradient is the same as with plain attributes instead."""

    class Plain(kind):
        has_oracle = True

        def prepare(self):
            self.cursor, self.lengths, self.raw = 0, [0.0] * 3, [0, 0]

        def factor(self, loss):
            self.cursor += 1
            self.lengths[self.cursor % 3] += 0.5
            self.raw[1] += 1
            return self.cursor + sum(self.lengths) + self.raw[1]

    expected = check_gradient(Plain, form, FGR)
    found = train(kind, form, FGR, lr=0.05)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_ctypes_pointers_are_not_touched():
    class Pointer(Factor):
        def prepare(self):
            self.names = (ctypes.c_char_p * 1)(b"a")

        def factor(self, loss):
            self.names[0] = self.names[0] + b"b"
            return 1.0

    with pytest.warns(UserWarning, match="self.names"):
        module = train(Pointer, "automatic", HUGE).module
    assert module.names[0].startswith(b"ab")
