"""Trains several cases on two CPU ranks with DDP; run with torchrun by test_ddp.py."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from modules import METHODS, STATEFUL, make_data, mlp, weights
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed import nn as collectives
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gr import Flooding, GradientRegularizationMixin, in_second_pass

RANKS, BATCH, SAMPLES, EPOCHS = 2, 8, 44, 2  # the last batch has 4
WINDOWS = -(-SAMPLES // BATCH)
REDUCED = []


class Case(NamedTuple):
    """A training run: the method, its options, the network, and the options of DDP and of the Trainer."""

    method: str | None = "forward GR"
    options: dict = {}  # noqa: RUF012
    net: str = "plain"
    ddp: dict = {}  # noqa: RUF012
    trainer: dict = {}  # noqa: RUF012
    flooding: dict | None = None
    bad_step: int | None = None
    compressed: bool = False
    manual: bool = False

    def callbacks(self):
        own = [] if self.method is None else [(METHODS | STATEFUL)[self.method].callback(**self.options)]
        return own if self.flooding is None else [*own, Flooding(**self.flooding)]


LOCAL = {"ascent_sync": False}
EXCLUDE = {"exclude": ["*.bias"]}
MICRO = {**LOCAL, "accumulation": "micro_batch"}
TWO = {"accumulate_grad_batches": 2}
UNUSED = {"find_unused_parameters": True}
# the level lies between the losses of the two ranks
FLOODED = {"level": 1.0, "sync": True}

JOINT = {
    **{f"synced {name}": Case(name) for name in METHODS | STATEFUL},
    **{f"synced accumulation {name}": Case(name, trainer=TWO) for name in STATEFUL},
    **{f"synced manual {name}": Case(name, manual=True) for name in STATEFUL},
    "synced clipping": Case("SAM", {"gradient_clip": (0.1, 0.05)}),
    "synced clipping, three passes": Case("central GR", {"gradient_clip": 0.05}),
    "synced exclude": Case("SAM", EXCLUDE),
    "synced accumulation": Case("SAM", trainer=TWO),
    "synced flooding": Case(None, flooding=FLOODED),
    "synced flooding with GR": Case(flooding=FLOODED),
    "synced flooding with accumulation": Case(flooding=FLOODED, trainer=TWO),
    "synced unused": Case("SAM", net="unused", ddp=UNUSED),
    "synced batch norm": Case("SAM", net="batch norm"),
    "synced manual": Case("SAM", manual=True),
    "synced manual central": Case("central GR", manual=True, net="unused", ddp=UNUSED),
    "synced bucket view": Case(ddp={"gradient_as_bucket_view": True}),
    "synced static graph": Case("SAM", ddp={"static_graph": True}),
}
OWN = {
    **{f"local {name}": Case(name, LOCAL) for name in METHODS},
    "local exclude": Case(options={**LOCAL, **EXCLUDE}),
    "local accumulation": Case("SAM", LOCAL, trainer=TWO),
    "local micro-batches": Case("SAM", MICRO, trainer=TWO),
    "local flooding": Case("SAM", LOCAL, flooding={"level": 1.0}),
    "local bucket view": Case("SAM", LOCAL, ddp={"gradient_as_bucket_view": True}),
    "local manual": Case("SAM", LOCAL, manual=True),
    "local manual central": Case("central GR", LOCAL, manual=True),
    "local manual exclude": Case(options={**LOCAL, **EXCLUDE}, manual=True),
    "local manual flooding": Case("SAM", LOCAL, flooding={"level": 1.0}, manual=True),
    "local branches": Case("SAM", LOCAL, net="branches", ddp=UNUSED),
}
OTHERS = {
    "noisy synced": Case("SAM", net="noisy"),
    "noisy local": Case("SAM", LOCAL, net="noisy"),
    "noisy local unused": Case(options=LOCAL, net="noisy", ddp=UNUSED),
    "noisy local flooding": Case(options=LOCAL, net="noisy", flooding={"level": 1.0}),
    "noisy manual": Case("SAM", LOCAL, net="noisy", manual=True),
    "synced manual static graph": Case("SAM", manual=True, ddp={"static_graph": True}),
    "local manual static graph": Case(options=LOCAL, manual=True, ddp={"static_graph": True}),
    "local static graph": Case(options=LOCAL, net="noisy", ddp={"static_graph": True}),
    "compressed synced": Case("SAM", compressed=True),
    "compressed local": Case("SAM", LOCAL, compressed=True),
    "branches synced": Case(net="branches", ddp=UNUSED),
    "plain": Case(None),
    "nan plain": Case(None, bad_step=2),
    "nan synced": Case("SAM", bad_step=2),
    "nan local": Case("SAM", LOCAL, bad_step=2),
    "nan local GR": Case(options=LOCAL, bad_step=2),
}
CASES = {**JOINT, **OWN, **OTHERS}


class Branches(nn.Module):
    """A network in which each rank also uses a layer of its own."""

    def __init__(self):
        super().__init__()
        self.common, self.own = mlp(4), nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(RANKS))

    def forward(self, x):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return self.own[rank](self.common(x))


class SyncedNorm(nn.BatchNorm1d):
    """Emulates SyncBatchNorm, with statistics over the joint batch. In a single process, it is BatchNorm."""

    def forward(self, x):
        if not torch.distributed.is_initialized():
            return super().forward(x)
        mean, square = collectives.functional.all_reduce(torch.stack([x.mean(0), x.square().mean(0)])) / RANKS
        count, var = RANKS * len(x), square - mean.square()
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


def make_net(kind):
    torch.manual_seed(0)
    if kind == "noisy":
        layers = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)
        return nn.Sequential(*layers).double()
    if kind == "batch norm":
        return nn.Sequential(nn.Linear(5, 16), SyncedNorm(16), nn.Tanh(), nn.Linear(16, 3)).double()
    if kind == "branches":
        return Branches()
    net = mlp()
    if kind == "unused":
        net.unused = nn.Linear(2, 2, dtype=torch.float64)
        net.forward = lambda x: net[2](net[1](net[0](x)))
    return net


class Module(pl.LightningModule):
    """Trains each rank on its part of a joint batch; counts gradient all-reduces and decisions made on the host."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.net = make_net(case.net)
        self.result = {"gradients": [], "finite": [], "losses": []}

    def train_dataloader(self):
        rank, ranks = self.global_rank, self.trainer.world_size
        data = TensorDataset(*make_data(SAMPLES))
        return DataLoader(Subset(data, range(rank, SAMPLES, ranks)), batch_size=BATCH // ranks)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if batch_idx == self.case.bad_step and self.global_rank == 1 and self.current_epoch == 0:
            loss = loss * torch.nan
        return loss

    def on_train_start(self):
        REDUCED.clear()
        if self.trainer.world_size > 1:
            # Lightning ignores `ddp_comm_hook` on the CPU
            self.trainer.model.register_comm_hook(self.case.compressed, _counted)

    def on_before_optimizer_step(self, optimizer):
        assert not in_second_pass()
        self.result["gradients"].append([is_finite(p.grad) for p in self.parameters() if p.grad is not None])
        self.result["finite"].append(all(is_finite(p) for p in self.parameters()))

    def on_before_backward(self, loss):
        self.result["losses"].append(loss.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Manual(GradientRegularizationMixin, Module):
    """The same module with manual optimization."""

    def __init__(self, case):
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.regularized_step(self.optimizers(), lambda: super(Manual, self).training_step(batch, batch_idx))


def is_finite(tensor):
    return bool(tensor.isfinite().all())


def _counted(compressed, bucket):
    # not in an attribute of the module: counts of the second pass would be undone
    REDUCED.append(bucket.index())
    return (default_hooks.bf16_compress_hook if compressed else default_hooks.allreduce_hook)(None, bucket)


def fit(case, module=None, **strategy):
    """Train; return the weights and what the module recorded."""
    module = (Manual if case.manual else Module)(case) if module is None else module
    pl.Trainer(
        accelerator="cpu",
        **{"devices": 1, **strategy},
        max_epochs=EPOCHS,
        callbacks=case.callbacks(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **case.trainer,
    ).fit(module)
    return {
        **module.result,
        "reduced": len(REDUCED),
        "weights": weights(module.net),
        "buffers": dict(module.net.named_buffers()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: fit(case, strategy=DDPStrategy(**case.ddp), devices=RANKS) for name, case in CASES.items()}
    torch.save(results, Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
