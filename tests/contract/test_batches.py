"""The contract for batches of every kind, and for loaders that reuse memory."""

from collections import UserList, namedtuple
from dataclasses import dataclass

import torch
from contract import (
    as_dict,
    contract,
    over,
    same,
    train,
)
from oracle import FGR, by_hand
from situations import Wrapped, Written


class Boxes(list):
    """Bounding boxes: a list whose constructor takes two arguments."""

    def __init__(self, items, size):
        super().__init__(items)
        self.size = size


class ListSubclass(Wrapped):
    def wrap(self, x, y):
        return {"boxes": Boxes([x, y], (3, 2)), "pair": (Boxes([x], 1),)}

    def pair(self, batch):
        assert isinstance(batch["boxes"], Boxes)
        assert batch["boxes"].size == (3, 2)
        return batch["boxes"]


class Record(dict):
    """A dictionary whose constructor requires an argument."""

    def __init__(self, name, **entries):
        super().__init__(**entries)
        self.name = name


class DictSubclass(Written):
    def wrap(self, x, y):
        return Record("a", x=x, y=y)

    def pair(self, batch):
        return batch.pop("x"), batch.pop("y")


NORMAL, OTHER = object(), object()


class Mode:
    def __init__(self):
        self.uses = 0


SHARED = Mode()


class ByIdentity(Wrapped):
    """The step compares objects in the batch by identity."""

    has_oracle = False  # a deep copy has another identity

    def wrap(self, x, y):
        return {"x": x, "y": y, "mode": NORMAL, "task": SHARED, "where": [OTHER]}

    def pair(self, batch):
        known = batch["mode"] is NORMAL and batch["task"] is SHARED and batch["where"][0] is OTHER
        return (batch["x"], batch["y"]) if known else (0 * batch["x"], batch["y"])


class SameTensor(Wrapped):
    """Two entries are the same tensor."""

    def wrap(self, x, y):
        return {"x": x, "again": x, "y": y, "all": [x, y]}

    def pair(self, batch):
        assert batch["x"] is batch["again"] is batch["all"][0]
        return batch["x"], batch["y"]


class Proxy:
    """``__getattr__`` reads ``self.data``, and so recurses infinitely before ``data`` is set."""

    def __init__(self, **data):
        self.data = data

    def __getattr__(self, name):
        return self.data[name]


class GetAttr(Wrapped):
    has_oracle = False  # a deep copy would recurse infinitely

    def wrap(self, x, y):
        return Proxy(x=x, y=y)

    def pair(self, batch):
        return batch.x, batch.y


class Slotted:
    __slots__ = ("targets", "x")

    def __init__(self, x, y):
        self.x, self.targets = x, [y]


class Slots(Written):
    def wrap(self, x, y):
        return Slotted(x, y)

    def pair(self, batch):
        return batch.x, batch.targets.pop()


Point = namedtuple("Point", "x y")


class Popped(Written):
    """The step empties the containers in its batch, at every level."""

    def wrap(self, x, y):
        return {"input": [x], "deep": {"y": [y]}, "point": Point(x, [y]), "user": UserList([y])}

    def pair(self, batch):
        y = batch["deep"].pop("y").pop()
        batch["point"].y.clear()
        batch["user"].pop()
        return batch["input"].pop(), y


@dataclass
class Graph:
    """A batch as in graph libraries: an object with state that the step changes."""

    x: torch.Tensor
    y: torch.Tensor
    cursor: int = 0
    extra: dict | None = None


class Stateful(Written):
    def wrap(self, x, y):
        return Graph(x, y, extra={"scale": 1.0})

    def pair(self, batch):
        batch.cursor += 1
        batch.extra["scale"] *= 2.0
        return batch.x * batch.extra["scale"] * batch.cursor, batch.y


class Lock:
    """Holds a lock, which cannot be copied."""

    def __init__(self, x, y):
        import threading

        self.lock, self.x, self.y = threading.Lock(), x, y

    def __deepcopy__(self, memo):
        return Lock(self.x.clone(), self.y.clone())

    def __reduce__(self):
        raise TypeError("cannot pickle a lock")


class Locked(Wrapped):
    def wrap(self, x, y):
        return {"store": Lock(x, y)}

    def pair(self, batch):
        with batch["store"].lock:
            return batch["store"].x, batch["store"].y


KINDS = [ListSubclass, DictSubclass, ByIdentity, SameTensor, GetAttr, Slots, Popped, Stateful, Locked]
test_leaves_no_trace, test_gradient = contract(*KINDS)


@over(ByIdentity, GetAttr)
def test_objects_that_a_deep_copy_would_change(kind, form):
    """The gradients are the same as for batches without such objects."""

    class Simple(Wrapped):
        def wrap(self, x, y):
            return x, y

    found, expected = train(kind, form, FGR, 0.05), by_hand(Simple, form, FGR, 0.05)
    same("gradients", as_dict(found.gradients), as_dict(expected.gradients), 1e-9)
