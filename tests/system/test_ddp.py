"""DDP on two gloo ranks: identical weights, the result of the joint batch or of each rank, and few all-reduces."""

import pytest
import reference
import replicas
import torch
from launching import torchrun
from modules import METHODS, assert_near, cross_entropy, make_batches
from replicas import CASES, EPOCHS, JOINT, OTHERS, OWN, RANKS, WINDOWS

LIMIT = 400
pytestmark = [pytest.mark.launch, pytest.mark.timeout(LIMIT + 60)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each rank for all cases; processes are only started once, since that takes most of the time."""
    folder = tmp_path_factory.mktemp("replicas")
    torchrun("replicas.py", folder, ranks=RANKS, limit=LIMIT)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def moved(result, net):
    """Return the change of the weights, so that tolerances are relative to it and not to the weights."""
    start = dict(net.named_parameters())
    return {n: p - start[n].detach() for n, p in result["weights"].items()}


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_identical_weights(results, name):
    a, b = (result[name]["weights"] for result in results)
    assert [n for n in a if not torch.equal(a[n].nan_to_num(), b[n].nan_to_num())] == []


@pytest.mark.parametrize("name", JOINT)
def test_synced_ascent_equals_the_joint_batch(results, name):
    case = JOINT[name]
    alone = replicas.fit(
        case._replace(ddp={}, manual=False, flooding=case.flooding and {"level": case.flooding["level"]})
    )
    net = replicas.make_net(case.net)
    assert_near(moved(results[0][name], net), moved(alone, net), 1e-10)


def test_statistics_of_the_joint_batch_are_counted_once(results):
    """Layers that communicate in the forward pass, like SyncBatchNorm, also do so in the second pass."""
    alone = replicas.fit(JOINT["synced batch norm"])["buffers"]
    for rank in results:
        buffers = rank["synced batch norm"]["buffers"]
        assert_near(
            {n: buffers[n] for n in buffers if n.startswith("1.running")},
            {n: alone[n] for n in alone if n.startswith("1.running")},
        )


@pytest.mark.parametrize("name", ["synced flooding", "synced flooding with GR"])
def test_a_common_decision_leaves_each_rank_its_own_loss(results, name):
    """Other hooks see the rank's own loss, and the mean over ranks is the loss of the joint batch."""
    case = JOINT[name]
    joint = torch.stack(replicas.fit(case._replace(flooding={"level": case.flooding["level"]}))["losses"])
    own = [torch.stack(rank[name]["losses"]) for rank in results]
    torch.testing.assert_close((own[0] + own[1]) / 2, joint, rtol=1e-10, atol=0)
    assert ((own[0] - own[1]).abs() > 1e-3).all()


class OwnBranch(replicas.Branches):
    """The network of one rank, in a single process."""

    rank = 0

    def forward(self, x):
        return self.own[self.rank](self.common(x)) + 0.0 * sum(p.sum() for p in self.parameters())


def of_rank(batches, rank):
    """Return the part of joint batches that one rank gets."""
    return [(x[rank::RANKS], y[rank::RANKS]) for x, y in batches]


@pytest.mark.parametrize("name", OWN)
def test_local_ascent_averages_what_each_rank_would_do(results, name):
    """The result is the mean of each rank's own regularized gradient, by the float64 reference."""
    case = OWN[name]
    method, net = METHODS[case.method], replicas.make_net(case.net)
    if case.net == "branches":
        torch.manual_seed(0)
        net = OwnBranch()
    share = case.trainer.get("accumulate_grad_batches", 1)
    level = case.flooding and case.flooding["level"]
    batches = make_batches(replicas.SAMPLES, replicas.BATCH)
    windows = [batches[i : i + share] for i in range(0, len(batches), share)] * EPOCHS
    excluded = [n for n, _ in net.named_parameters() if "exclude" in case.options and n.endswith("bias")]
    by_hand = reference.excluding(method.gradient, excluded) if excluded else method.gradient

    def gradient(step, loss, theta):
        total = {n: torch.zeros_like(p) for n, p in theta.items()}
        for rank in range(RANKS):
            net.rank = rank
            window = of_rank(windows[step], rank)
            groups = [[batch] for batch in window] if case.options.get("accumulation") == "micro_batch" else [window]
            for group in groups:
                own = by_hand(reference.loss_of(net, cross_entropy, group, len(group), level), theta)
                total = {n: total[n] + own[n] / (RANKS * len(groups)) for n in theta}
        return total

    theta = reference.train(net, windows, reference.SGD(), gradient)
    net = replicas.make_net(case.net)
    assert_near(moved(results[0][name], net), moved({"weights": theta}, net), 1e-10)


@pytest.mark.parametrize("name", [n for n in CASES if n != "nan synced"])
def test_all_reduces_per_step(results, name):
    """Two with synced ascent, and one with local ascent, as in plain training; a third pass needs no more."""
    case = CASES[name]
    steps = EPOCHS * WINDOWS // case.trainer.get("accumulate_grad_batches", 1)
    synced = case.method not in (None, "Momentum-SAM") and case.options.get("ascent_sync", True)
    if case.method == "LookSAM":  # has a second pass only in every third step
        assert results[0][name]["reduced"] == steps + -(-steps // 3)
        return
    if name == "synced clipping, three passes":  # needs each gradient reduced separately
        assert results[0][name]["reduced"] == 3 * steps
        return
    # to learn a static graph, DDP reduces once in the first step
    extra = 1 if case.ddp.get("static_graph") and not synced else 0
    assert results[0][name]["reduced"] == steps * (1 + synced) + extra


@pytest.mark.parametrize("name", ["compressed synced", "compressed local"])
def test_compressed_gradients(results, name):
    """A communication hook that sends bfloat16 only changes the result by its rounding."""
    net = replicas.make_net("plain")
    full = name.replace("compressed", "").strip() + " SAM"
    assert_near(moved(results[0][name], net), moved(results[0][full], net), 2e-2)
    assert not torch.equal(results[0][name]["weights"]["0.weight"], results[0][full]["weights"]["0.weight"])


@pytest.mark.parametrize("name", ["nan synced", "nan local", "nan local GR"])
def test_nan_on_one_rank_reaches_all_ranks_in_the_same_step(results, name):
    """As in plain training, gradients are NaN on all ranks, and weights stay finite until the optimizer step."""
    plain = results[0]["nan plain"]
    for rank in results:
        assert rank[name]["gradients"] == plain["gradients"]
        assert rank[name]["finite"] == plain["finite"]
    assert plain["finite"].index(False) == OTHERS[name].bad_step + 1
