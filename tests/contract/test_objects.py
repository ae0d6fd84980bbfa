"""The contract for objects of the user and of the standard library."""

import heapq
import queue
from array import array
from collections import UserDict
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from contract import contract
from situations import Factor


class Helper(Factor):
    """A plain object with state and a reference back to its owner."""

    class Schedule:
        def __init__(self, owner):
            self.owner, self.value, self.log = [owner], 1.0, {"values": []}

        def advance(self):
            self.value *= 0.9
            self.log["values"].append(self.value)
            return self.value

    def prepare(self):
        self.schedule = self.Schedule(self)

    def factor(self, loss):
        return self.schedule.advance()


class Records(Factor):
    @dataclass
    class State:
        step: int = 0
        losses: list = field(default_factory=list)

    def prepare(self):
        self.state, self.space = self.State(), SimpleNamespace(inner=SimpleNamespace(n=0))

    def factor(self, loss):
        self.state.step += 1
        self.state.losses.append(loss)
        self.space.inner.n += 1
        return self.state.step + self.space.inner.n


class Slots(Factor):
    class Pair:
        __slots__ = ("count", "last")

        def __init__(self):
            self.count, self.last = 0, []

    def prepare(self):
        self.pair = self.Pair()

    def factor(self, loss):
        self.pair.count += 1
        self.pair.last.append(loss)
        return self.pair.count


class ClassAttributes(Factor):
    """State on the class instead of the instance."""

    has_oracle = False  # a deep copy shares it

    def prepare(self):
        ClassAttributes.losses, ClassAttributes.calls, ClassAttributes.by_kind = [], 0, {"n": [0]}

    def factor(self, loss):
        before = ClassAttributes.calls + len(self.losses) + self.by_kind["n"][0]
        ClassAttributes.calls += 1
        self.losses.append(loss)
        self.by_kind["n"][0] += 1
        return before


class Mappings(Factor):
    """A dictionary subclass with attributes, and a UserDict."""

    class Table(dict):
        def __init__(self, owner):
            super().__init__()
            self.owner, self.hits = owner, 0

    def prepare(self):
        self.table, self.user = self.Table("me"), UserDict(n=0)

    def factor(self, loss):
        self.table.hits += 1
        self.table[self.table.hits] = loss
        self.user["n"] += 1
        return self.table.hits + self.user["n"]


class Long(Factor):
    """A list that is too long to be copied in each step, and changes in its middle."""

    def prepare(self):
        self.priorities = [0.0] * 5000

    def factor(self, loss):
        before = self.priorities[2500]
        self.priorities[2500] += 1.0
        self.priorities.append(1.0)
        return before


class Heap(Factor):
    def prepare(self):
        self.heap = [(float(value), str(value)) for value in range(8)]
        self.buffer, self.bytes = array("d", [0.0] * 4), bytearray(4)

    def factor(self, loss):
        value, name = heapq.heappop(self.heap)
        heapq.heappush(self.heap, (value + 5.0, name))
        self.buffer[1] += 1.0
        self.bytes[2] += 1
        return value + self.buffer[1] + self.bytes[2]


class Queue(Factor):
    """Holds locks, which cannot be copied."""

    has_oracle = False

    def prepare(self):
        self.queue = queue.Queue()
        for value in range(4):
            self.queue.put(float(value))

    def factor(self, loss):
        value = self.queue.get()
        self.queue.put(value + 4.0)
        return value


class Closure(Factor):
    """A function that counts its calls."""

    has_oracle = False  # a deep copy shares it

    def prepare(self):
        calls, seen = 0, []

        def count():
            nonlocal calls
            calls += 1
            seen.append(calls)
            return len(seen)

        self.count = count

    def factor(self, loss):
        return self.count()


class Deleted(Factor):
    """Attributes that are added, deleted and change their type."""

    def prepare(self):
        self.kept, self.value = [1.0], None

    def factor(self, loss):
        if self.value is None:
            self.value = 0.0
            self.fresh = {"n": 0.0}
            del self.kept
        elif isinstance(self.value, float):
            self.value = torch.zeros(1)
        self.value = self.value + 1.0
        self.fresh["n"] += 1.0
        return float(self.value) + self.fresh["n"]


class WrittenLate(Factor):
    """First written to in the sixth step, between two learning steps, and again in the eighth."""

    def prepare(self):
        self.calls, self.deep, self.weights = 0, {"a": [[0.0]]}, torch.zeros(3)

    def factor(self, loss):
        self.calls += 1
        before = self.deep["a"][0][0] + float(self.weights.sum())
        if self.calls in (6, 8):
            self.deep["a"][0][0] += 1.0
            self.weights.data += 1.0
        return before


test_leaves_no_trace, test_gradient = contract(
    Helper,
    Records,
    Slots,
    ClassAttributes,
    Mappings,
    Long,
    Heap,
    Queue,
    Closure,
    Deleted,
    WrittenLate,
)
