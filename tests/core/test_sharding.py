"""Distributed tensors in one process; tests/system/test_sharded.py uses four."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lightning_gr.core.sharding import (
    SideGroup,
    by_layout,
    is_distributed,
    local_parts,
    mean_over_ranks,
    norm_over_ranks,
    plain_are_shards,
    settle_gradients,
    shards_over,
    sum_of_shards,
    sum_over_ranks,
)


@pytest.fixture
def reduced(monkeypatch):
    """Emulate three ranks with equal values in each sum, and return the list of process groups used."""
    groups = []

    def all_reduce(tensor, group=None):
        groups.append(group)
        tensor.mul_(3)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return groups


def test_plain_tensors_are_whole_and_reduce_nothing(reduced):
    x = torch.ones(3)
    assert not is_distributed(x)
    assert local_parts([x])[0] is x
    assert by_layout([x, x]) == {None: [x, x]}
    assert norm_over_ranks(x, x) is x
    assert sum_over_ranks(x, x) is x
    assert reduced == []


def test_local_parts_share_storage_and_layouts_are_distinguished(mesh):
    data = torch.arange(6.0).view(3, 2)
    layouts = [(Shard(0), Replicate()), (Shard(0), Replicate()), (Shard(1), Shard(0))]
    spread = [DTensor.from_local(data, mesh, layout) for layout in layouts]
    assert all(is_distributed(x) for x in spread)
    (part, *_) = local_parts(spread)
    assert not is_distributed(part)
    part[0, 0] = 7.0
    assert spread[0].to_local()[0, 0] == 7.0
    groups = by_layout([spread[0], data, spread[1], spread[2]])
    assert list(map(len, groups.values())) == [2, 1, 1]
    assert groups[None][0] is data


@pytest.mark.parametrize(
    ("layout", "factor"), [((Shard(0), Replicate()), 3), ((Shard(0), Shard(0)), 9), ((Replicate(),) * 2, 1)]
)
def test_sums_are_over_the_ranks_that_hold_shards(mesh, reduced, layout, factor):
    like, values = DTensor.from_local(torch.ones(3), mesh, layout), torch.tensor([1.0, 2.0])
    assert torch.equal(sum_over_ranks(values, like), factor * values)
    assert torch.equal(values, torch.tensor([1.0, 2.0]))
    assert reduced == [mesh.get_group(i) for i, place in enumerate(layout) if place.is_shard()]
    norm = norm_over_ranks(torch.tensor(2.0), like)
    assert norm.item() == pytest.approx(2.0 * factor**0.5)
    assert norm.dtype is torch.float32


def test_a_large_norm_does_not_overflow(mesh, reduced):
    like = DTensor.from_local(torch.ones(3), mesh, (Shard(0), Replicate()))
    assert norm_over_ranks(torch.tensor(1e30), like).item() == pytest.approx(3**0.5 * 1e30)


def test_the_mean_leaves_its_argument_alone(mesh, reduced, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    value = torch.tensor(2.0, requires_grad=True)
    assert mean_over_ranks(value).item() == 2.0
    assert not mean_over_ranks(value).requires_grad
    assert value.item() == 2.0


def test_partial_gradients_get_the_layout_of_their_parameter(mesh):
    param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, (Shard(0), Replicate())))
    other = nn.Parameter(torch.ones(2))
    param.grad = DTensor.from_local(torch.full((4,), 5.0), mesh, (Partial(), Replicate()))
    other.grad = torch.ones(2)
    whole = other.grad
    settle_gradients([param, other, nn.Parameter(torch.ones(1))])
    assert param.grad.placements == param.placements
    assert torch.equal(param.grad.full_tensor(), torch.full((4,), 5.0))
    assert other.grad is whole


def test_plain_tensors_can_be_shards(reduced):
    """Norms of FSDP1's shards are summed over the ranks that share them."""
    group, norm = object(), torch.tensor(2.0)
    with shards_over(group, torch.device("cpu")):
        assert plain_are_shards()
        assert norm_over_ranks(norm, norm) == pytest.approx(2.0 * 3**0.5)
        assert sum_of_shards(norm).dtype == torch.float32
        assert sum_over_ranks(norm, norm) == 6.0
    assert reduced == [group] * 3
    assert norm == 2.0
    assert not plain_are_shards()
    with shards_over(None, torch.device("cpu")):
        assert not plain_are_shards()
        assert sum_of_shards(norm) is norm


def test_a_norm_of_offloaded_shards_is_reduced_where_the_process_group_is(monkeypatch):
    """The group may have no backend for the CPU."""
    part, placement = torch.ones(()), SimpleNamespace(is_replicate=lambda: False)
    mesh = SimpleNamespace(device_type="meta", get_group=lambda dim: dim)
    seen = []
    monkeypatch.setattr(dist, "all_reduce", lambda total, group: seen.append((total.device.type, group)))
    with pytest.raises(NotImplementedError, match="meta"):  # values of meta tensors cannot be copied back
        sum_over_ranks(part, SimpleNamespace(device_mesh=mesh, placements=[placement]))
    assert seen == [("meta", 0)]


@pytest.mark.usefixtures("mesh")
def test_side_groups_with_the_same_name_are_shared():
    one, again, other = (SideGroup(torch.device("cpu"), name) for name in ("a", "a", "b"))
    assert one._group is again._group is not other._group


@pytest.mark.usefixtures("mesh")
def test_a_side_group_averages_over_present_ranks_and_compares_numbers(monkeypatch):
    group = SideGroup(torch.device("cpu"), "a")
    assert group.mean_over_present(torch.tensor(3.0)) == 3.0
    group.be_absent()
    assert len(group._absent) == 1
    assert group.mean_over_present(torch.tensor(5.0)) == 5.0
    assert group._absent == []
    assert group.agree(4)()

    def another_has_five(both, *_, **options):
        both.copy_(torch.maximum(both, torch.tensor([5.0, -5.0], dtype=both.dtype)))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", another_has_five)
    assert not group.agree(4)()
    assert group.agree(5)()
