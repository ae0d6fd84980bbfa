"""A fingerprint detects any write, and restores everything it has a copy of."""

import pytest
import torch

from lightning_gr.replay.contents import TensorPlace
from lightning_gr.replay.fingerprint import Fingerprint
from lightning_gr.replay.machinery import QuietTensorPlace
from lightning_gr.replay.places import EntryPlace
from lightning_gr.replay.snapshot import storages_of


def state():
    large, small, momentum, table = torch.zeros(40_000), torch.zeros(3), torch.zeros(3), {}
    places = [
        TensorPlace(large, "large"), TensorPlace(small, "small"), QuietTensorPlace(momentum, "momentum"),
        EntryPlace(table, "table"),
    ]  # fmt: skip
    return (large, small, momentum, table), places


WRITES = {
    "large": lambda s: s[0].data[12_345].add_(1), "small": lambda s: s[1].data.add_(1),
    "momentum": lambda s: s[2].add_(1), "table": lambda s: s[3].update(a=1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_detected_and_undone(name):
    owners, places = state()
    fingerprint = Fingerprint(places, 2**30)
    assert fingerprint.changed() == []
    WRITES[name](owners)
    changed = fingerprint.changed()
    assert [place.path for place in changed] == [name]
    assert fingerprint.restore(changed) == []
    assert not any(bool(each.any()) for each in owners[:3])
    assert owners[3] == {}


def test_values_beyond_the_budget_are_not_copied():
    owners, places = state()
    fingerprint = Fingerprint(places, 100)
    owners[0].add_(1)
    owners[1].add_(1)
    changed = fingerprint.changed()
    assert [place.path for place in fingerprint.restore(changed)] == ["large"]
    assert bool(owners[0].all())
    assert not bool(owners[1].any())


def test_tensors_in_moved_storages_do_not_count():
    owners, places = state()
    fingerprint = Fingerprint(places, 0)
    owners[0].add_(1)
    assert fingerprint.changed(storages_of([owners[0]])) == []


def test_places_that_are_taken_out_are_no_longer_compared():
    owners, places = state()
    fingerprint = Fingerprint(places, 2**30)
    owners[1].add_(1)
    taken = fingerprint.without(fingerprint.changed())
    assert fingerprint.changed() == []
    taken.restore()
    assert not bool(owners[1].any())
