"""The contract for batches that a step or a loader writes to, and for batches that can only be read once."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from contract import (
    AUTOMATIC,
    WINDOW,
    Situation,
    as_dict,
    check_gradient,
    contract,
    make_trainer,
    over,
    refused,
    right_or_refused,
    same,
    seed,
    train,
)
from oracle import FGR, HUGE, by_hand
from situations import Wrapped, Written


@dataclass
class Graph:
    """A batch as in graph libraries: an object with state that the step changes."""

    x: torch.Tensor
    y: torch.Tensor
    cursor: int = 0
    extra: dict | None = None


# --- steps that write to their batch: handled correctly or refused


class Scaled(Written):
    """The step scales its input in place."""

    def wrap(self, x, y):
        return [x, y]

    def pair(self, batch):
        return batch[0].mul_(2.0), batch[1]


class ScaledData(Scaled):
    def pair(self, batch):
        batch[0].data.mul_(2.0)
        return batch


class ScaledInPart(Scaled):
    """Through ``.data``, and only in an entry that a sample would not include."""

    def pair(self, batch):
        batch[0].data[1, 0] *= 2.0
        return batch


class Missing(Wrapped):
    """NaNs in the batch do not count as a change."""

    def wrap(self, x, y):
        x[0] = float("nan")
        return x, y

    def pair(self, batch):
        return batch[0].nan_to_num(), batch[1]


test_leaves_no_trace, test_gradient = contract(Missing)


class Arrays(Written):
    """NumPy arrays that are written to in place."""

    def wrap(self, x, y):
        return {"x": x.numpy().copy(), "y": y.numpy().copy()}

    def pair(self, batch):
        batch["x"] *= 2.0
        return torch.from_numpy(batch["x"].copy()), torch.from_numpy(batch["y"])


class ArraysInObject(Arrays):
    def wrap(self, x, y):
        return Graph(x, y, extra={"mask": np.ones(3)})

    def pair(self, batch):
        batch.extra["mask"][0] += 1.0
        return batch.x * torch.from_numpy(batch.extra["mask"].copy()), batch.y


WRITTEN = [Scaled, ScaledData, ScaledInPart, Arrays, ArraysInObject]


@over(*WRITTEN)
def test_a_batch_that_the_step_writes_to_is_handled_or_refused(kind, form):
    right_or_refused(lambda: check_gradient(kind, form, FGR), "batch|in place|clone")


class RequiresGrad(Wrapped):
    """The input becomes a leaf, for which the step computes a gradient."""

    has_oracle = False

    def wrap(self, x, y):
        return x, y

    def pair(self, batch):
        x, y = batch
        x.requires_grad_()
        (slope,) = torch.autograd.grad(self.mse((x, y)), x)
        return x + 0.1 * slope.sign(), y


@over(RequiresGrad)
def test_inputs_that_become_leaves(kind, form):
    right_or_refused(lambda: train(kind, form, HUGE), "batch|in place|clone")


# --- iterators


class Iterator(Written):
    def wrap(self, x, y):
        return {"x": x, "parts": iter([y])}

    def pair(self, batch):
        return batch["x"], next(batch["parts"])


class Generator(Iterator):
    def wrap(self, x, y):
        return [x, (part for part in [y])]

    def pair(self, batch):
        return batch[0], next(batch[1])


class Zip(Iterator):
    def wrap(self, x, y):
        return zip([x], [y], strict=True)

    def pair(self, batch):
        return next(batch)


class InObject(Iterator):
    def wrap(self, x, y):
        return Graph(x, y, extra={"parts": map(torch.clone, [y])})

    def pair(self, batch):
        return batch.x, next(batch.extra["parts"])


@over(Iterator, Generator, Zip, InObject)
def test_an_iterator_in_the_batch_is_refused(kind, form):
    with refused("iterator|generator"):
        train(kind, form, HUGE)


# --- loaders that refill their tensors


class Refills:
    """A loader that writes each batch into the memory of the previous one."""

    def __init__(self, batches, shared, fill):
        self.batches, self.shared, self.fill = batches, shared, fill

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.fill(self.shared, batch)
            yield self.shared


def fill_tensors(shared, batch):
    for to, value in zip(shared, batch, strict=True):
        to.copy_(value)


def fill_memory(shared, batch):
    """Write through NumPy, which does not increase version counters."""
    for to, value in zip(shared, batch, strict=True):
        to.numpy()[:] = value.numpy()


class Last(Situation):
    step = Situation.mse


def fill_part(shared, batch):
    """Write batches that only differ in one entry in the middle."""
    fill_memory(shared, [torch.zeros(4, 3).double(), torch.zeros(4, 2).double()])
    shared[0].numpy()[1, 0], shared[1].numpy()[0, 1] = batch[0][1, 0], batch[1][0, 1]


REFILLS = {
    "part": (fill_part, lambda: (torch.zeros(4, 3).double(), torch.zeros(4, 2).double())),
    "tensors": (fill_tensors, lambda: (torch.zeros(4, 3).double(), torch.zeros(4, 2).double())),
    "memory": (fill_memory, lambda: [torch.zeros(4, 3).double(), torch.zeros(4, 2).double()]),
}


@pytest.mark.parametrize("accumulate", [1, WINDOW])
@pytest.mark.parametrize("name", REFILLS)
def test_a_loader_that_refills_its_tensors_is_handled_or_refused(name, accumulate):
    fill, make = REFILLS[name]
    expected = by_hand(Last, AUTOMATIC[accumulate > 1], FGR, 0.05)

    def check():
        seed()
        module = Last(0.05)
        seed()
        batches = module.make_batches()
        make_trainer(FGR.callback(), accumulate_grad_batches=accumulate).fit(module, Refills(batches, make(), fill))
        if name == "part":  # the oracle trains on other batches
            assert accumulate == 1
            return
        found = as_dict(dict(module.state_dict()))
        same("weights", found, as_dict(dict(expected.module.state_dict())), 1e-9)

    right_or_refused(check, "loader")
    if accumulate == 1:
        check()


def test_plain_training_works_with_refilled_tensors():
    """The test above is only meaningful if this holds."""
    fill, make = REFILLS["tensors"]
    plain = train(Last, "accumulation", lr=0.05)
    seed()
    module = Last(0.05)
    seed()
    make_trainer(accumulate_grad_batches=WINDOW).fit(module, Refills(module.make_batches(), make(), fill))
    same("weights", as_dict(dict(module.state_dict())), as_dict(dict(plain.module.state_dict())))
