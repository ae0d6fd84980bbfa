"""Metrics on two gloo ranks with DDP and FSDP2: those of the joint batch, or the mean over ranks."""

import measured
import pytest
import reference
import replicas
import torch
from launching import torchrun
from measured import FLOOD_LEVEL, RANKS, own_batch
from metrics_by_hand import by_hand
from modules import FIRST_ORDER, METHODS, cross_entropy, weights

LIMIT = 400
pytestmark = [pytest.mark.launch, pytest.mark.timeout(LIMIT + 60)]
shards = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The logs of each rank for all cases; processes are only started once, since that takes most of the time."""
    folder = tmp_path_factory.mktemp("measured")
    torchrun("measured.py", folder, ranks=RANKS, limit=LIMIT)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", [*(f"synced {n}" for n in METHODS), "plain"])
def test_synced_values_are_those_of_the_joint_batch(results, name):
    """Norms, also before clipping and by layer, losses, alignment, curvature and the Hessian's, on both ranks."""
    alone = measured.replicated(measured.CASES[name])
    for rank in results:
        assert rank[name].keys() == alone.keys()
        assert rank[name] == pytest.approx(alone, rel=1e-7)
    assert len(alone) == {"plain": 6}.get(name, len(alone))


@shards
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_sharded_values_are_those_of_the_joint_batch(results, name):
    alone = measured.spread(name, layout="single")
    for rank in results:
        assert rank[f"sharded {name}"] == pytest.approx(alone, rel=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_local_values_are_means_of_each_ranks_own(results, name):
    """Metrics that need each rank's second gradient are left out, since DDP reduces it."""
    net = replicas.make_net("plain")
    losses = [reference.loss_of(net, cross_entropy, [own_batch(rank)]) for rank in range(RANKS)]
    each = [by_hand(METHODS[name], loss, weights(net)) for loss in losses]
    names = ("grad_norm", "penalty", "loss_perturbed", "sharpness")
    expected = {f"gr/{n}": sum(values[n] for values in each) / RANKS for n in names if n in each[0]}
    gradients = [reference.plain(loss, weights(net)) for loss in losses]
    for layer in "02":
        norms = [reference.norm({n: v for n, v in g.items() if n.startswith(layer)}) for g in gradients]
        expected[f"gr/grad_norm/net.{layer}"] = sum(norms) / RANKS
    for rank in results:
        found = {n: v for n, v in rank[f"local {name}"].items() if n.startswith("gr/")}
        assert found == pytest.approx(expected, rel=1e-9)


def test_share_of_flooded_losses_is_the_mean_over_ranks(results):
    losses = [cross_entropy(replicas.make_net("plain"), own_batch(rank)).item() for rank in range(RANKS)]
    share = sum(loss < FLOOD_LEVEL for loss in losses) / RANKS
    assert share == 0.5
    assert [rank["flooded"]["gr/flooded"] for rank in results] == [share] * RANKS


def test_one_all_reduce_at_logged_steps_and_none_at_others(results):
    counts = results[0]["all-reduces"]
    assert counts["all", 100] == counts[(), 1]
    assert counts["all", 2] == counts[(), 1] + 2


def test_torchmetrics_reduce_over_ranks(results):
    """With one update on rank 0 and two on rank 1, the result is the mean over all three."""
    first, second = 2.0**0.5 * 1, (2.0**0.5 * 2, 2.0**0.5 * (2 + 1))
    half = 0.5**0.5
    expected = {
        "GradientNorm": (first + sum(second)) / 3,
        "GradientAlignment": (half + half + 1.0) / 3,
        "Sharpness": ((2 - 1) + (4 - 1) + (6 - 1)) / 3,
    }
    for rank in results:
        assert rank["torchmetrics"] == pytest.approx(expected, rel=1e-6)
