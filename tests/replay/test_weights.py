"""Weights that the step itself writes to, for methods with one and with two displaced points."""

import pytest
import torch
from outside import Record
from torch import nn

from lightning_gr import GRRule, SAMRule, regularized_backward
from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.places import EntryPlace
from lightning_gr.replay.snapshot import Snapshot
from lightning_gr.replay.weights import WrittenWeights

START, DIRECTION = 2.0, 3.0


def after(write, rule, calls=1):
    """Train a weight w on the loss 3 w, applying ``write`` to it in each step; return it and its values."""
    module, seen = nn.Module(), Record()
    module.weight = nn.Parameter(torch.tensor([START], dtype=torch.float64))

    def loss():
        seen.append(module.weight.item())
        write(module.weight)
        return (DIRECTION * module.weight).sum()

    for _ in range(calls):
        module.weight.grad = None
        regularized_backward(loss, module, rule)
    return module.weight, seen


def halve(weight):
    weight.data.mul_(0.5)


def clamp(weight):
    with torch.no_grad():
        weight.clamp_(-1.5, 1.5)


def point_elsewhere(weight):
    weight.data = weight.data * 0.5


@pytest.mark.parametrize("write", [halve, clamp, point_elsewhere])
@pytest.mark.parametrize(
    ("rule", "probes"), [(SAMRule(0.25), [0.25]), (GRRule(0.1, 0.1, scheme="central"), [0.3, -0.3])]
)
def test_each_pass_starts_where_the_first_one_did(write, rule, probes):
    weight, seen = after(write, rule, calls=3)
    expected, value = [], torch.tensor([START], dtype=torch.float64)
    for _ in range(3):
        expected += [value.item() + probe for probe in (0.0, *probes)]
        write(value)
    assert list(seen) == pytest.approx(expected)
    assert weight.item() == value.item()


def test_a_weight_that_only_second_passes_write_to():
    """Such as by clamping: only the displaced weight is out of range."""
    found = Record()

    def clip(weight):
        found.append(weight.item())
        if weight.item() > START:
            weight.data = weight.data.clamp(max=START)

    weight, seen = after(clip, SAMRule(10.0), calls=3)
    assert weight.item() == START
    assert list(found) == list(seen) == 3 * [START, START + 10.0]


def test_only_trained_weights_that_were_written_are_noted():
    """With their values before; others are restored by those who save everything else."""
    written, same, buffer, table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), torch.ones(2), {}
    notes = WrittenWeights(Footprint(dict), lambda: [written, same])
    places = [TensorPlace(tensor, "x") for tensor in (written, same, buffer)]
    start = Snapshot([*places, EntryPlace(table, "table")])
    written.data += 1
    buffer += 1
    table["a"] = 1
    ((weight, value),) = notes.note([start])
    assert weight is written
    assert value.tolist() == [1.0, 1.0]
