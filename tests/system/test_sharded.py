"""FSDP2 and tensor parallelism on four CPU ranks: results of one process, no extra gathering, clean checkpoints."""

import pytest
import torch
from launching import torchrun
from modules import assert_near, assert_same
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sharded import CASES, RANKS, Module, spread, trainer, whole

from lightning_gr import SAM, GradientRegularization, TwoPass
from lightning_gr.rules import GSAMRule

LIMIT = 600
pytestmark = [
    pytest.mark.timeout(LIMIT + 60),
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each rank for all cases; processes are only started once, since that takes most of the time."""
    folder = tmp_path_factory.mktemp("sharded")
    torchrun("sharded.py", folder, ranks=RANKS, limit=LIMIT)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_equals_a_single_process(results, name):
    """In float64 on the joint batch, even if some ranks hold empty shards."""
    case = CASES[name]._replace(layout="single")
    alone = Module(case)
    start = whole(alone)
    trainer(case).fit(alone)
    for rank in results[1]:
        assert_same(rank[name], results[1][0][name])
        moved = {n: rank[name][n] - start[n] for n in start}
        assert_near(moved, {n: p - start[n] for n, p in whole(alone).items()}, 1e-12)


@pytest.mark.launch
def test_no_additional_gathering(results):
    """There are twice the collectives of plain training, and one number per norm."""
    counts = {method: results[1][0][f"communication {method}"] for method in (None, "forward GR", "SAM")}
    steps = 6
    for method in ("forward GR", "SAM"):
        assert counts[method].keys() == counts[None].keys()
        for name in ("_allgather_base_", "_reduce_scatter_base_"):
            assert counts[method][name] == 2 * counts[None][name]
        assert counts[method]["allreduce_"] == counts[None]["allreduce_"] + steps + 1  # settings, at the start


@pytest.mark.launch
@pytest.mark.parametrize("full", [True, False])
def test_checkpoints_are_clean(results, full):
    """Checkpoints saved after a second pass has failed, as one file or as one part per rank."""
    folder, ranks = results
    for rank in ranks:
        result = rank[f"broken off {full}"]
        assert result["error"] == "broken"
        assert_same(result["after"], result["clean"])
    path = folder / "full.ckpt"
    if not full:
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(folder / "sharded.ckpt", path := folder / "joined.ckpt")
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert_same({n.removeprefix("net."): p for n, p in saved.items()}, ranks[0][f"broken off {full}"]["clean"])


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (GradientRegularization(scheme="exact"), r"`scheme='exact'` cannot .* use `scheme='central'`"),
        (TwoPass(GSAMRule()), r"GSAM combines its gradients itself, which was not shown .*strategy='ddp'"),
        (SAM(ascent_sync=False), r"`ascent_sync=False` needs all parameters on each device.*strategy='ddp'"),
    ],
)
def test_what_cannot_be_sharded_is_refused(callback, message):
    case = CASES["fsdp SAM"]._replace(method=None)
    asked = spread(case, callback)
    with pytest.raises(MisconfigurationException, match=message):
        callback.setup(asked, Module(case), "fit")
