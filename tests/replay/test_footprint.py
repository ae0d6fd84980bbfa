"""Which places are found to be written to: by full searches at first, later by marks."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.fingerprint import Fingerprint
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.snapshot import Snapshot, storages_of
from lightning_gr.replay.walk import walk


def test_leaves_are_the_tensors_that_require_a_gradient():
    leaf, plain = torch.ones(2, requires_grad=True), torch.ones(2)
    footprint = Footprint(lambda: {"self": [leaf, plain, leaf * 2]})
    footprint.begin()
    assert [id(found) for found in footprint.leaves] == [id(leaf)]
    plain.requires_grad_()  # as in a training step that needs the gradient of its input
    assert [id(found) for found in footprint.leaves] == [id(leaf), id(plain)]


# --- detected writes


# number of entries; smaller tensors are saved in each step without having been written to
SIZE = 2**11


class Writes(nn.Module):
    """A module with tensors and an array that are large enough not to be saved in each step."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("running", torch.zeros(SIZE))
        self.register_buffer("other", torch.zeros(SIZE))
        self.large = np.zeros(2**14)


def protected_paths(footprint):
    content = [place for place in footprint.protected if type(place).__name__ in ("TensorPlace", "ArrayPlace")]
    return {place.path for place in content if place.owner.nbytes > 2**12}


def evaluate(footprint, write):
    learning = footprint.begin()
    before = footprint.unprotected(0) if learning else footprint.marks()
    write()
    footprint.note(before.changed())
    return learning


def test_full_searches_at_steps_1_2_4_8_and_after_new_modules():
    net = Writes()
    footprint = Footprint(lambda: {"self": net})
    assert [evaluate(footprint, int) for _ in range(9)] == [True, True, False, True, False, False, False, True, False]
    net.new = nn.Linear(1, 1)
    assert [evaluate(footprint, int) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize(
    "write",
    [
        lambda net: net.running.add_(1),
        lambda net: net.running.data.add_(1),
        lambda net: setattr(net.running, "data", torch.ones(SIZE)),
    ],
    ids=["in place", "through data", "data"],
)
def test_a_late_write_is_detected(late, write):
    net = Writes()
    footprint = Footprint(lambda: {"self": net})
    for _ in range(late):
        evaluate(footprint, int)
    assert protected_paths(footprint) == set()
    assert evaluate(footprint, lambda: write(net)) == (late == 0)
    assert protected_paths(footprint) == {"self.running"}
    evaluate(footprint, int)
    assert protected_paths(footprint) == {"self.running"}


def test_a_write_to_a_large_array_is_detected():
    net = Writes()
    footprint = Footprint(lambda: {"self": net})
    evaluate(footprint, lambda: net.large.__setitem__(7, 1.0))
    assert protected_paths(footprint) == {"self.large"}


def test_a_fingerprint_names_what_changed():
    net = Writes()
    places = walk({"self": net})
    fingerprint = Fingerprint(places, 0)
    assert fingerprint.changed() == []
    net.running.data[1] += 1
    net.layer.weight.data += 1
    net.note = 1
    assert {place.path for place in fingerprint.changed()} == {"self.running", "self.layer.weight", "self"}
    moved = storages_of([net.layer.weight])
    assert {place.path for place in fingerprint.changed(moved)} == {"self.running", "self"}


def test_a_snapshot_restores_everything_except_moved_weights():
    net = Writes()
    snapshot = Snapshot(walk({"self": net}))
    weight, running = net.layer.weight.detach().clone(), net.running
    with torch.no_grad():
        net.layer.weight += 1
        net.layer.bias += 1
        net.running += 1
        net.large[3] = 1
    net.note = 1
    bias = net.layer.bias.detach() - 1
    snapshot.restore(storages_of([net.layer.weight]))
    assert torch.equal(net.layer.weight, weight + 1)
    assert torch.allclose(net.layer.bias, bias)
    assert net.running is running
    assert not net.running.any()
    assert not net.large.any()
    assert not hasattr(net, "note")
    assert [place for place in snapshot.changed() if not isinstance(place, TensorPlace)] == []


def test_a_view_of_moved_weights_is_not_restored():
    net = Writes()
    net.view = net.layer.weight.data[0]
    snapshot = Snapshot(walk({"self": net}))
    with torch.no_grad():
        net.layer.weight += 1
    moved = net.layer.weight.detach().clone()
    snapshot.restore(storages_of([net.layer.weight]))
    assert torch.equal(net.layer.weight, moved)


def test_warns_once_of_what_cannot_be_restored():
    told, steps = [], iter(range(100))
    footprint = Footprint(lambda: {"self": {"steps": steps}}, warn=told.append)
    for _ in range(3):
        footprint.begin()
        start = Snapshot(footprint.protected)
        next(steps)
        footprint.warn_about_opaque(start)
    assert len(told) == 1
    assert told[0].startswith("`self['steps']` cannot be put back")
    assert "`lightning_gr.in_second_pass()`" in told[0]
