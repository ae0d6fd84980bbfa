"""Counts the collectives of one optimizer step, on two CPU ranks with gloo."""
# ruff: noqa: RUF012

import logging
import os
import socket
import time
import warnings
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_gr import SAM, Flooding, GradientRegularization, MomentumSAM, in_second_pass

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.7 or so
    from torch.distributed._composable.fsdp import fully_shard

__all__ = ["CASES", "Sent", "start"]

RANKS, WIDTH, LAYERS, BATCH, WARM_UP = 2, 512, 4, 8, 2
LOCAL = {"ascent_sync": False}
CENTRAL = {"scheme": "central"}


class Case(NamedTuple):
    """The settings of one training run."""

    method: type[pl.Callback] | None = None
    options: dict[str, Any] = {}
    batches: int = 1  # per step, accumulated
    compressed: bool = False
    sharded: str = ""  # by what


CASES = {
    "plain": Case(),
    "F-GR synced": Case(GradientRegularization),
    "F-GR local": Case(GradientRegularization, LOCAL),
    "central synced": Case(GradientRegularization, CENTRAL),
    "central local": Case(GradientRegularization, {**CENTRAL, **LOCAL}),
    "SAM synced": Case(SAM),
    "SAM local": Case(SAM, LOCAL),
    "flooding synced": Case(Flooding, {"level": 0.1, "sync": True}),
    "plain ×4": Case(batches=4),
    "F-GR synced ×4": Case(GradientRegularization, batches=4),
    "F-GR local ×4": Case(GradientRegularization, LOCAL, batches=4),
    "plain bf16": Case(compressed=True),
    "F-GR synced bf16": Case(GradientRegularization, compressed=True),
    "F-GR local bf16": Case(GradientRegularization, LOCAL, compressed=True),
    **{
        f"{name}, {how}": case._replace(sharded=how)
        for how in ("FSDP1", "FSDP2")
        for name, case in {
            "plain": Case(),
            "F-GR synced": Case(GradientRegularization),
            "SAM synced": Case(SAM),
            "Momentum-SAM": Case(MomentumSAM),
            "plain ×4": Case(batches=4),
            "F-GR synced ×4": Case(GradientRegularization, batches=4),
        }.items()
    },
}
KINDS = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class Sent(NamedTuple):
    """The collectives of one kind in one optimizer step."""

    case: str
    kind: str
    number: float
    in_second_pass: float
    bytes: float
    bytes_per_parameter: float

    @classmethod
    def of(cls, case: str, kind: str, calls: list[tuple[str, bool, int]], steps: int, parameters: int) -> "Sent":
        """Means over steps."""
        later = [second for name, second, _ in calls if name == kind]
        nbytes = sum(nbytes for name, _, nbytes in calls if name == kind) / steps
        return cls(case, kind, len(later) / steps, sum(later) / steps, nbytes, nbytes / parameters)


class Collectives(TorchDispatchMode):
    """Sees every collective that this thread calls, including those of DDP's C++ reducer.

    On the CPU, the backward pass also runs in this thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.calls: list[tuple[str, bool, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting and func.namespace in ("c10d", "_c10d_functional"):
            # the largest argument is the full tensor that is gathered or scattered, not one rank's shard
            nbytes, numel = max(map(_size, args))
            kind = KINDS.get(func._opname, func._opname)
            self.calls.append(("scalar" if kind == "all-reduce" and numel <= 2 else kind, in_second_pass(), nbytes))
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> tuple[int, int]:
    """The bytes and elements of the tensors in an argument, which may be lists in a list."""
    if isinstance(value, (list, tuple)):
        nbytes, numel = zip(*map(_size, value), strict=True) if value else ((), ())
        return sum(nbytes), sum(numel)
    return (value.nbytes, value.numel()) if isinstance(value, Tensor) else (0, 0)


class Net(pl.LightningModule):
    """An MLP with buffers whose gradients fill several buckets. It starts and stops counting at step boundaries."""

    def __init__(self, case: Case, steps: int, mode: Collectives) -> None:
        super().__init__()
        self.case, self.steps, self.mode = case, steps, mode
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        self.net = nn.Sequential(*layers, nn.BatchNorm1d(WIDTH))

    def configure_model(self) -> None:
        if self.case.sharded == "FSDP2":
            for layer in [*self.net[:-1], self.net]:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader:
        batches = (WARM_UP + self.steps + 1) * self.case.batches
        return DataLoader(torch.randn(BATCH * batches, WIDTH), batch_size=BATCH)

    def on_train_start(self) -> None:
        if self.case.compressed:  # Lightning ignores its own `ddp_comm_hook` on the CPU
            self.trainer.model.register_comm_hook(None, halved)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.mode.counting = WARM_UP <= batch_idx // self.case.batches < WARM_UP + self.steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trainer.strategy.model.parameters(), lr=0.01, momentum=0.9)


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1 on CPU ranks: Lightning's strategy hands the index of a GPU over."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategy_of(case: Case) -> Strategy:
    """The strategy, with a bucket or a unit for each layer."""
    if case.sharded == "FSDP1":
        return FSDP1OnCPU(auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))
    return ModelParallelStrategy(RANKS, 1) if case.sharded else DDPStrategy(bucket_cap_mb=1)


def halved(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """Wrap bf16_compress_hook, which DDP recognizes by name and does not allow with gloo."""
    return bf16_compress_hook(state, bucket)


def measure(name: str, steps: int) -> list[Sent]:
    """Train on this rank and return the collectives of one step."""
    torch.manual_seed(0)
    case = CASES[name]
    module = Net(case, steps, mode := Collectives())
    parameters = sum(p.numel() for p in module.parameters())
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy_of(case),
        plugins=[LightningEnvironment()],
        callbacks=None if case.method is None else case.method(**case.options),
        max_epochs=1,
        accumulate_grad_batches=case.batches,
        use_distributed_sampler=False,
        **dict.fromkeys(quiet, False),
    )
    with mode:
        trainer.fit(module)
    return [Sent.of(name, kind, mode.calls, steps, parameters) for kind in sorted({call[0] for call in mode.calls})]


def work(rank: int, port: int, steps: int, results: Any) -> None:
    """Run all cases on one rank."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # about few dataloader workers, for example
    results.put([tuple(sent) for name in CASES for sent in measure(name, steps)])
    torch.distributed.destroy_process_group()


def start(steps: int, limit: float) -> list[list[Sent]]:
    """Run all cases on two ranks and return the counts of each rank."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = torch.multiprocessing.spawn(work, args=(port, steps, results), nprocs=RANKS, join=False, daemon=True)
    end = time.monotonic() + limit
    try:
        while not ranks.join(timeout=1):  # re-raises errors of the ranks
            if time.monotonic() > end:
                raise TimeoutError(f"not finished after {limit} s")
    finally:
        for process in ranks.processes:
            process.kill()
    return [[Sent(*sent) for sent in results.get()] for _ in range(RANKS)]
