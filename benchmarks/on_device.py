"""Measurements of ``gpu.py`` on one device: whole steps, passes, copies, compiled networks, and two ranks."""

import copy
import gc
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from measuring import STEPS, WARM_UP, Same, count, count_pass, make_trainer, quiet
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from ways import WAYS
from workloads import Deep, Workload

__all__ = ["Effort", "Spent", "time_copies", "time_pass", "train", "train_on_ranks", "vector_passes"]

RANKS = 2


class Effort(NamedTuple):
    """How long to measure: steps before the measurement, measured steps, and the bytes of a copy."""

    warm_up: int = WARM_UP
    steps: int = STEPS
    copied: int = 2**30


class Spent(NamedTuple):
    """The seconds of a step, and the peak of allocated bytes beyond what was there before the module was made."""

    seconds: float
    peak: float


class Span(pl.Callback):
    """Measures all steps after the warm-up together, since waiting for the device after each would slow them down."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.began = self.seconds = 0.0
        self.peak = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start or stop the clock."""
        if batch_idx == self.effort.warm_up:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.began = _now(self.device)
        elif batch_idx == self.effort.warm_up + self.effort.steps:
            self.seconds = (_now(self.device) - self.began) / self.effort.steps
            if self.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated(self.device)


def _now(device: torch.device) -> float:
    """The time when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _options(device: torch.device, precision: str) -> dict[str, Any]:
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0], "precision": precision}
    return {"accelerator": "cpu", "devices": 1, "precision": precision}


@contextmanager
def _freed(device: torch.device) -> Iterator[int]:
    """The allocated bytes before the block; afterwards, garbage is collected."""
    yield torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def train(
    workload: Workload, way: str, precision: str, device: torch.device, effort: Effort, backend: str | None = None
) -> Spent:
    """Train a new module on one batch, which is on the device already.

    Args:
        workload: The network and the batch.
        way: The method, a name in ``WAYS``.
        precision: Lightning's name of it.
        device: The device.
        effort: How long to measure.
        backend: The backend of torch.compile; None does not compile.
    """
    torch.manual_seed(0)
    with _freed(device) as before:
        span, net = Span(device, effort), workload.model()
        module = WAYS[way].module(net if backend is None else torch.compile(net, backend=backend))
        batch = tuple(part.to(device) for part in workload.batch())
        trainer = make_trainer(span, *WAYS[way].callbacks(), **_options(device, precision))
        trainer.fit(module, Same(batch, effort.warm_up + effort.steps + 1))
        del trainer, module, batch, net
    peak = span.peak - before if device.type == "cuda" else 0
    return Spent(span.seconds, peak)


def cpu_peak(workload: Workload, way: str) -> float:
    """The peak of a step on the CPU, where the allocator keeps no record, from a profile."""
    return count(workload, way).peak + sum(p.nbytes for p in workload.model().parameters())


def time_pass(workload: Workload, precision: str, device: torch.device, effort: Effort) -> float:
    """The seconds of a forward and backward pass that adds to existing gradients."""
    torch.manual_seed(0)
    with _freed(device):
        net, (x, y) = workload.model().to(device), (part.to(device) for part in workload.batch())
        for step in range(effort.warm_up + effort.steps):
            if step == effort.warm_up:
                began = _now(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
        seconds = (_now(device) - began) / effort.steps
        del net, loss, x, y
    return seconds


def time_copies(device: torch.device, effort: Effort) -> float:
    """The bytes per second that a copy on the device reads and writes, in the median of five."""
    with _freed(device):
        source = torch.ones(effort.copied // 4, device=device)
        target = torch.empty_like(source)
        target.copy_(source)
        rates = []
        for _ in range(5):
            began = _now(device)
            target.copy_(source)
            rates.append(2 * source.nbytes / (_now(device) - began))
        del source, target
    return sorted(rates)[2]


def vector_passes(ways: Sequence[str]) -> dict[str, float]:
    """The bytes that a method moves beyond plain training and its further pass, in units of the parameters' size.

    They are counted on the CPU with tensors so small that they are copied there, as all are on a GPU.
    """
    work = Workload(lambda: Deep(200), lambda: (torch.randn(16, 8), torch.randint(8, (16,))))
    size = sum(p.nbytes for p in work.model().parameters())
    plain, one_pass = count(work, "plain").bytes, count_pass(work).bytes
    further = {way: 0 if way == "Momentum-SAM" else 1 for way in ways}
    return {way: (count(work, way).bytes - plain - further[way] * one_pass) / size for way in ways}


def train_on_ranks(
    workload: Workload, ways: Sequence[str], device: torch.device, backend: str, effort: Effort, limit: float
) -> dict[str, tuple[float, float]]:
    """Train with DDP on two ranks that share the device.

    Returns:
        For each method the seconds of a step, and how far apart the weights of both ranks are at the end.

    Raises:
        RuntimeError: If the backend refuses, as NCCL does for two ranks on one card.
    """
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    model = workload.model(), workload.batch()  # a factory cannot be sent to another process
    args = (port, model, list(ways), str(device), backend, effort, results)
    ranks = torch.multiprocessing.spawn(_work, args, nprocs=RANKS, join=False, daemon=True)
    end = time.monotonic() + limit
    try:
        while not ranks.join(timeout=1):  # re-raises errors of the ranks
            if time.monotonic() > end:
                raise RuntimeError(f"not finished after {limit:g} s")
    finally:
        for process in ranks.processes:
            process.kill()
    return results.get()


def _work(
    rank: int, port: int, model: Any, ways: list[str], device: str, backend: str, effort: Effort, results: Any
) -> None:
    # for Lightning, each rank is the only one of its node, so that both take the same card
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in variables.items()})
    with quiet():
        found = {way: _ddp_step(rank, model, way, torch.device(device), backend, effort) for way in ways}
    if rank == 0:
        results.put(found)
    torch.distributed.destroy_process_group()


def _ddp_step(
    rank: int, model: Any, way: str, device: torch.device, backend: str, effort: Effort
) -> tuple[float, float]:
    net, batch = copy.deepcopy(model)  # tensors that were sent to several processes are shared by them
    span, module = Span(device, effort), WAYS[way].module(net)
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(rank))
    own = tuple(part[order[: len(order) // RANKS]].to(device) for part in batch)
    options = {"num_nodes": RANKS, "strategy": DDPStrategy(process_group_backend=backend)}
    options |= {"plugins": [LightningEnvironment()], "use_distributed_sampler": False, **_options(device, "32-true")}
    trainer = make_trainer(span, *WAYS[way].callbacks(), **options)
    trainer.fit(module, Same(own, effort.warm_up + effort.steps + 1))
    weights = nn.utils.parameters_to_vector(net.parameters()).detach().cpu()
    everywhere = [torch.empty_like(weights) for _ in range(RANKS)]
    torch.distributed.all_gather(everywhere, weights.to(device) if backend == "nccl" else weights)
    return span.seconds, (everywhere[0] - everywhere[1]).abs().max().item()
