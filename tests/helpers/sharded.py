"""Trains several cases on four CPU ranks with ModelParallelStrategy; run with torchrun by test_sharded.py."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from modules import FIRST_ORDER, METHODS, STATEFUL, make_data, mlp
from pytorch_lightning.callbacks import OnExceptionCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gr import Flooding, GradientRegularizationMixin, in_second_pass

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.7 or so
    from torch.distributed._composable.fsdp import fully_shard

RANKS, BATCH, SAMPLES = 4, 8, 24


class Case(NamedTuple):
    """A training run: how it is sharded (``"single"`` is the reference), the method, and options."""

    layout: str
    method: str | None = "forward GR"
    options: dict = {}  # of the callback  # noqa: RUF012
    level: float | None = None
    trainer: dict = {}  # options of the Trainer  # noqa: RUF012
    adam: bool = False
    sync_flood: bool = False
    manual: bool = False

    def callbacks(self):
        own = [] if self.method is None else [(METHODS | STATEFUL)[self.method].callback(**self.options)]
        return own if self.level is None else [*own, Flooding(self.level, sync=self.sync_flood)]


EXCLUDE = {"exclude": ["*.bias"]}
CASES = {
    **{f"{layout} {name}": Case(layout, name) for layout in ("fsdp", "tensor", "both") for name in FIRST_ORDER},
    **{f"{layout} Momentum-SAM": Case(layout, "Momentum-SAM") for layout in ("fsdp", "tensor", "both", "kept whole")},
    "fsdp Momentum-SAM by hand": Case("fsdp", "Momentum-SAM", manual=True),
    "fsdp Momentum-SAM, Adam, accumulation": Case(
        "fsdp", "Momentum-SAM", {"exclude": ["*.bias"]}, trainer={"accumulate_grad_batches": 2}, adam=True
    ),
    "fsdp clipping each": Case("fsdp", "SAM", {"gradient_clip": (0.1, 0.05)}),
    "fsdp exclude": Case("fsdp", options=EXCLUDE),
    "tensor exclude": Case("tensor", options=EXCLUDE),
    "both exclude": Case("both", "SAM", options=EXCLUDE),
    "fsdp accumulation": Case("fsdp", "SAM", trainer={"accumulate_grad_batches": 2}),
    "fsdp clipping": Case("fsdp", trainer={"gradient_clip_val": 0.05}),
    "fsdp Adam": Case("fsdp", adam=True),
    "fsdp flooding": Case("fsdp", level=0.9, sync_flood=True),
    "fsdp interval": Case("fsdp", "SAM", options={"interval": 2, "warmup_steps": 3}),
    "fsdp by hand": Case("fsdp", "SAM", manual=True),
    "both by hand": Case("both", "central norm penalty", manual=True),
    "fsdp kept whole": Case("kept whole", "SAM"),
    "sequence SAM": Case("sequence", "SAM"),
}


class Module(pl.LightningModule):
    """An MLP with a LayerNorm, sharded over ranks; each data-parallel rank takes its part of a joint batch."""

    def __init__(self, case, fails=False):
        super().__init__()
        self.case, self.fails = case, fails
        self.net = nn.Sequential(*mlp(8), nn.LayerNorm(3, dtype=torch.float64))

    def configure_model(self):
        if self.case.layout == "single" or isinstance(next(self.parameters()), DTensor):
            return
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if self.case.layout in ("tensor", "both", "sequence"):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            if self.case.layout == "sequence":
                plan |= {"2": RowwiseParallel(output_layouts=Shard(0)), "3": SequenceParallel(sequence_dim=0)}
            parallelize_module(self.net, tensor, plan)
        if self.case.layout in ("fsdp", "both", "kept whole"):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=data, reshard_after_forward=self.case.layout != "kept whole")

    def train_dataloader(self):
        rank, ranks = 0, 1
        if self.case.layout != "single":
            mesh = self.device_mesh["data_parallel"]
            rank, ranks = mesh.get_local_rank(), mesh.size()
        data = TensorDataset(*make_data(SAMPLES))
        return DataLoader(Subset(data, range(rank, SAMPLES, ranks)), batch_size=BATCH // ranks)

    def on_train_batch_start(self, batch, batch_idx):
        self.clean = whole(self)

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        output = output.full_tensor() if isinstance(output, DTensor) else output
        loss = nn.functional.cross_entropy(output, batch[1])
        if self.fails and in_second_pass() and batch_idx == 1:
            raise RuntimeError("broken")
        return loss

    def configure_optimizers(self):
        if self.case.adam:
            return torch.optim.Adam(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Manual(GradientRegularizationMixin, Module):
    """The same module with manual optimization."""

    def __init__(self, case):
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.regularized_step(self.optimizers(), lambda: super(Manual, self).training_step(batch, batch_idx))


def whole(module):
    """Gather the full parameters by name, on each rank."""
    named = {n: p.detach() for n, p in module.net.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in named.items()}


def trainer(case, *callbacks, strategy="auto", **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    options = {**quiet, "logger": False, "max_epochs": 2, "use_distributed_sampler": False, **case.trainer, **options}
    return pl.Trainer(accelerator="cpu", strategy=strategy, callbacks=[*case.callbacks(), *callbacks], **options)


def spread(case, *callbacks, full_checkpoint=True):
    """Create a Trainer over all ranks."""
    tensor = {"tensor": RANKS, "sequence": RANKS, "both": 2}.get(case.layout, 1)
    strategy = ModelParallelStrategy(RANKS // tensor, tensor, save_distributed_checkpoint=not full_checkpoint)
    return trainer(case, *callbacks, strategy=strategy, devices=RANKS)


class Collectives(TorchDispatchMode):
    """Counts collectives and the amount of data they send."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def communication(method):
    """Count the collectives of a training run, without those of the test itself."""
    case = Case("fsdp", method)

    class Silent(Module):
        on_train_batch_start = pl.LightningModule.on_train_batch_start

    with Collectives() as mode:
        spread(case).fit(Silent(case))
    return mode.counts


def failed_run(folder, full_checkpoint):
    """Train until a second pass fails; return the error, and the weights before and after the failed step."""
    case = Case("fsdp", "SAM")
    module = Module(case, fails=True)
    saver = OnExceptionCheckpoint(folder, "full" if full_checkpoint else "sharded")
    try:
        spread(case, saver, full_checkpoint=full_checkpoint).fit(module)
    except RuntimeError as error:
        return {"error": str(error), "clean": module.clean, "after": whole(module)}


def main(folder):
    results = {}
    for name, case in CASES.items():
        module = (Manual if case.manual else Module)(case)
        spread(case).fit(module)
        results[name] = whole(module)
    for method in (None, "forward GR", "SAM"):
        results[f"communication {method}"] = communication(method)
    for full in (True, False):
        results[f"broken off {full}"] = failed_run(folder, full)
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
