"""FSDP1 on two CPU ranks, and HYBRID_SHARD on four: results of one process, clean checkpoints, no extra gathering."""

import pytest
import torch
from fsdp1 import CASES, HYBRID, ROUGH, Case, Module, spread, trainer
from launching import PYTHON, ROOT, finish, torchrun
from modules import assert_near, assert_same
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_gr import SAM, Flooding, GradientRegularization, TwoPass
from lightning_gr.rules import GSAMRule

LIMIT = 400
pytestmark = [
    pytest.mark.timeout(2 * LIMIT + 60),
    pytest.mark.skipif(not hasattr(torch.cpu, "Event"), reason="this torch cannot shard on a CPU"),
]


def results_of(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp(f"fsdp1-{ranks}")
    torchrun("fsdp1.py", folder, ranks=ranks, limit=LIMIT)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of two ranks for all cases; processes are only started once, since that takes most of the time."""
    return results_of(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return results_of(tmp_path_factory, 4)


def joined(folder, name):
    """Return the weights in a sharded checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / f"{name}.ckpt", folder / f"{name}-joined.ckpt")
    return torch.load(folder / f"{name}-joined.ckpt", weights_only=False)["model"]


def alone(case):
    """Train in one process on the joint batch, in the precision of the module; return the initial weights as well."""
    case = case._replace(layout="single", trainer={n: v for n, v in case.trainer.items() if n != "precision"})
    if case.trainer.get("gradient_clip_algorithm") == "value":
        case = case._replace(trainer=case.trainer)
    module = Module(case)
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer(case).fit(module)
    return start, module


def check(ranks, name, case, tolerance):
    start, expected = alone(case)
    for rank in ranks:
        assert_same(rank[name]["weights"], ranks[0][name]["weights"])
        moved = {n: rank[name]["weights"][n].double() - start[n] for n in start}
        assert_near(moved, {n: expected.final[n].double() - start[n] for n in start}, tolerance)
    return expected


@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_equals_a_single_process(results, name):
    """Weights and logged metrics agree in float64, even if a rank holds no part of the regularized parameters."""
    expected = check(results[1], name, CASES[name], 1e-9)
    for rank in results[1]:
        assert rank[name]["logs"] == pytest.approx(expected.logs, rel=1e-6)


@pytest.mark.launch
@pytest.mark.parametrize("name", HYBRID)
def test_shards_that_are_replicated_equal_a_single_process(hybrid, name):
    check(hybrid[1], name, HYBRID[name], 1e-9)


@pytest.mark.launch
@pytest.mark.parametrize("name", ROUGH)
def test_lower_precision_differs_by_its_rounding(results, name):
    check(results[1], name, ROUGH[name], 1e-4 if name.endswith("32-true") else 0.1)


@pytest.mark.launch
@pytest.mark.parametrize("layout", ["wrap", "flat"])
@pytest.mark.parametrize("kind", ["sharded"])
def test_checkpoints_are_clean_and_load_without_us(results, kind, layout):
    """Checkpoints have one part per rank, with the names of the user's module."""
    folder, ranks = results
    assert_same(joined(folder, f"resume-{kind}-{layout}"), ranks[0]["resumed", kind, layout]["saved"])


@pytest.mark.launch
@pytest.mark.parametrize("layout", ["wrap", "flat"])
@pytest.mark.parametrize("kind", ["sharded"])
def test_a_resumed_run_ends_with_the_same_bits(results, kind, layout):
    for rank in results[1]:
        result = rank["resumed", kind, layout]
        assert_same(result["resumed"], result["straight"])


@pytest.mark.launch
@pytest.mark.parametrize("layout", ["root", "wrap", "grad op"])
def test_a_checkpoint_between_the_passes_of_momentum_sam_contains_the_clean_weights(results, layout):
    """At that moment FSDP holds gathered weights, which come from displaced shards."""
    folder, ranks = results
    assert_same(joined(folder, f"gap-{layout}"), ranks[0]["gap", layout])


@pytest.mark.launch
@pytest.mark.parametrize("layout", ["root", "wrap", "grad op"])
@pytest.mark.parametrize("method", ["forward GR", "SAM", "central GR"])
def test_no_gradient_is_gathered(results, layout, method):
    """Each pass gathers and scatters as in plain training; each step sends a number for a norm and one for a metric."""
    counts, plain = (results[1][0]["communication", layout, name] for name in (method, None))
    passes, steps = (3 if method == "central GR" else 2), 4
    for name in ("allgather_", "_reduce_scatter_base_"):
        assert counts[name] == passes * plain[name]
    assert counts["allreduce_"] - plain["allreduce_"] == 2 * steps + 2  # settings and panel, at the start


@pytest.mark.launch
@pytest.mark.parametrize(("layout", "more"), [("root", 1), ("wrap", 1), ("grad op", 3)])
def test_momentum_sam_gathers_units_again_that_stay_gathered_between_its_passes(results, layout, more):
    """This is the outermost unit, or all units with ``SHARD_GRAD_OP``."""
    counts, plain = (results[1][0]["communication", layout, name] for name in ("Momentum-SAM", None))
    assert counts["allgather_"] == plain["allgather_"] + 4 * more
    assert counts["_reduce_scatter_base_"] == plain["_reduce_scatter_base_"]


def example(folder, launcher, *options):
    """Run the cluster example for one epoch, and return the folder of its checkpoints."""
    folder.mkdir()
    script = ROOT / "examples/cluster/train.py"
    command = ["env", "-C", folder, *PYTHON, *launcher, script, "fit", "--config", script.with_name("config.yaml")]
    command += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", 1, *options]
    codes, output = finish(folder / "log", command, limit=LIMIT)
    assert codes == [0], output[-3000:]
    return folder / "runs/checkpoints"


@pytest.mark.launch
def test_the_cluster_example_runs_with_fsdp_by_changing_its_strategy(tmp_path):
    """With CPU ranks and sharded checkpoints, it ends with the weights of a single process."""
    strategy = ["--trainer.strategy", "fsdp1.OnCPU", "--trainer.strategy.state_dict_type", "sharded"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    found = joined(example(tmp_path / "two", launcher, "--trainer.devices", 2, *strategy), "last")
    alone = example(tmp_path / "one", [], "--trainer.devices", 1, "--trainer.strategy", "auto")
    assert_near(found, torch.load(alone / "last.ckpt", weights_only=False)["state_dict"], 1e-4)


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (GradientRegularization(scheme="exact"), {}, r"`scheme='exact'` cannot .* use `scheme='central'`"),
        (SAM(ascent_sync=False), {}, r"`ascent_sync=False` needs all parameters on each device, but OnCPU .*'ddp'"),
        (TwoPass(GSAMRule()), {}, r"GSAM combines its gradients itself, which was not shown .*strategy='ddp'"),
        (SAM(), {"cpu_offload": True}, r"FSDP offloads to the CPU: leave `cpu_offload` out"),
    ],
)
def test_what_cannot_be_sharded_is_refused(callback, options, message):
    asked = spread(Case("wrap", None), callback, strategy_options=options)
    with pytest.raises(MisconfigurationException, match=message):
        callback.setup(asked, Module(Case("wrap", None)), "fit")


@pytest.mark.parametrize("callback", [SAM(), Flooding(0.1)])
def test_manual_optimization_is_refused(callback):
    """In plain Lightning, FSDP1 fails in manual optimization, or does not train."""
    module = Module(Case("wrap", None))
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"cannot run a backward pass within `training_step`, also"):
        callback.setup(spread(Case("wrap", None), callback), module, "fit")
