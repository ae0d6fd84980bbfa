"""The cost of a step beyond plain training and its second pass: operators, passes over parameters, memory, waiting.

Time is measured by ``benchmarks/step_cost.py``, and communication is counted in ``test_benchmarks.py``.
"""

from pathlib import Path

import pytest
import torch
from modules import METHODS, MOVING
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr import SAM, GradientRegularization
from lightning_gr.core import storage as swap
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import add_second_pass_

ROOT = Path(__file__).parents[2]


# --- on an accelerator, emulated by tensors without values, where anything that would wait for the device fails


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def second_pass(name, tensors, loss_scale=None):
    """Return the operators of a second pass on an emulated GPU, without those of the replays."""
    params = [nn.Parameter(torch.empty(300, 300, device="cuda")) for _ in range(tensors)]
    for param in params:
        param.grad = torch.empty_like(param)

    def replay(transform, last=True):
        for param in params:
            param.grad = transform(torch.empty_like(param))

    with Names() as names:
        add_second_pass_(METHODS[name].rule.update(), params, replay, WeightStorage(), loss_scale=loss_scale)
    of_replay = {"empty_like", "mul", "detach", "empty"}
    return [name for name in names.seen if name not in of_replay]


def test_reading_from_a_device_would_be_noticed():
    with FakeTensorMode(), torch.no_grad(), pytest.raises(DataDependentOutputException):
        torch.empty(3, device="cuda").sum().item()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # only to compare addresses
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", MOVING)
def test_nothing_is_read_from_the_device(name, scaled):
    with FakeTensorMode():
        names = second_pass(name, 3, torch.ones((), device="cuda") if scaled else None)
    assert any("foreach" in name for name in names)


@pytest.mark.parametrize("name", MOVING)
def test_the_number_of_operators_does_not_depend_on_the_number_of_tensors(name):
    with FakeTensorMode():
        few, many = second_pass(name, 2), second_pass(name, 20)
    assert few == many


def test_f_gr_takes_five_operators_and_sam_seven():
    """F-GR copies, moves, scales the kept gradient, copies back and weights; SAM also needs a norm over all tensors."""
    with FakeTensorMode():
        assert second_pass("forward GR", 9) == [
            "_foreach_copy_",
            "_foreach_add_",
            "_foreach_mul_",
            "_foreach_copy_",
            "_foreach_mul_",
        ]
        assert [name for name in second_pass("SAM", 9) if "foreach" in name] == [
            "_foreach_norm",
            "_foreach_copy_",
            "_foreach_mul_",
            "_foreach_add_",
            "_foreach_copy_",
        ]


# --- whole steps with a Trainer, on the CPU


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measuring

    with measuring.quiet():
        yield measuring


def beyond(measuring, *ways, passes=1):
    """Yield operators, passes over the parameters, synchronizations and memory beyond plain training for each way."""
    import workloads

    # the second and third weights are large enough to be swapped
    work = workloads.Workload(lambda: workloads.make_mlp(32, 512, 512, 128), workloads._vectors(4, 32))
    size = sum(p.nbytes for p in work.model().parameters())
    plain, one = measuring.count(work, "plain"), measuring.count_pass(work)
    for way in ways:
        found = measuring.count(work, way)
        moved = (found.bytes - plain.bytes - passes * one.bytes) / size
        operators = found.operators - plain.operators - passes * one.operators
        yield operators, moved, found.syncs - plain.syncs, (found.peak - plain.peak) / size


# the norm reads once; a displacement reads twice and writes once, as does accumulating the second gradient, which is
# weighted by reading and writing once …
BY_SWAP = {"F-GR": 11, "GNP": 11, "SAM": 4, "ASAM": 11}
# … and copying the weights and restoring them takes four more
BY_COPY = {"F-GR": 15, "GNP": 15, "SAM": 8, "ASAM": 15}
LARGEST = 512 * 512 / (32 * 512 + 512 * 512 + 512 * 128)


@pytest.mark.slow
@pytest.mark.parametrize(("smallest", "expected"), [(0, BY_SWAP), (2**40, BY_COPY)])
def test_passes_over_the_parameters_and_memory(measuring, monkeypatch, smallest, expected):
    monkeypatch.setattr(swap, "SMALLEST", smallest)
    for (way, passes), found in zip(expected.items(), beyond(measuring, *expected), strict=True):
        _, moved, syncs, memory = found
        assert moved == pytest.approx(passes, abs=0.1), way
        assert syncs <= 2  # only on the CPU, where reading a norm is free
        # a set of gradients or weights, and the gradient of one layer before it is accumulated
        sets = 2 if (way, smallest > 0) == ("ASAM", True) else 1
        assert memory <= sets + (0 if way in ("SAM", "ASAM") else LARGEST) + 0.1, way


@pytest.mark.slow
def test_other_implementations_cost_more(measuring):
    ours, package, by_hand, double = beyond(
        measuring, "SAM", "SAM, pytorch_optimizer", "SAM, by hand", "double backward"
    )
    for other in (package, by_hand, double):
        assert ours[0] < other[0]
        assert ours[1] < other[1]
        assert ours[3] < other[3]


@pytest.mark.parametrize("callback", [GradientRegularization(start_step=10**6), SAM(start_step=10**6)])
def test_a_step_without_second_pass_adds_nothing(measuring, monkeypatch, callback):
    import ways

    monkeypatch.setitem(ways.WAYS, "idle", ways.Way(callbacks=lambda: [callback]))
    assert list(beyond(measuring, "idle", passes=0)) == [(0, 0, 0, 0)]
