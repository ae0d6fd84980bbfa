"""Measures several cases on two CPU ranks with DDP and FSDP2; run with torchrun by test_measured.py."""

import sys
from pathlib import Path

import replicas
import sharded
import torch
from modules import FIRST_ORDER, METHODS
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torchmetrics import MetricCollection

from lightning_gr import Flooding, GradientNorm, GradientNormMonitor, SharpnessMonitor
from lightning_gr.metrics import GradientAlignment, Sharpness
from lightning_gr.report.measurement import BY_LAYER

RANKS = 2
LOGGED = {"log_every_n_steps": 1, "limit_train_batches": 1, "max_epochs": 1}
ALL = {"metrics": ["all", BY_LAYER]}
FLOOD_LEVEL = 1.09  # lies between the losses of the two ranks
CLIP = {"gradient_clip_val": 0.01}


class Case(replicas.Case):
    """A case with additional callbacks that only monitor."""

    def callbacks(self):
        own = [] if self.method is None else [METHODS[self.method].callback(**self.options)]
        watch = SharpnessMonitor(tolerance=1e-8, samples=2) if self.net == "plain" else None
        flood = Flooding(FLOOD_LEVEL) if self.flooding else None
        if self.net == "unmonitored":
            return own
        monitor = GradientNormMonitor(by_layer=True)
        return [*own, monitor, *(callback for callback in (watch, flood) if callback is not None)]


def ddp_case(method, local=False, flooding=None):
    options = {**ALL, "ascent_sync": not local} if method else {}
    return Case(method, options, trainer=CLIP, flooding=flooding)


CASES = {
    "plain": ddp_case(None, flooding={}),
    "flooded": ddp_case(None, flooding={"level": FLOOD_LEVEL}),
    **{f"synced {name}": ddp_case(name) for name in METHODS},
    **{f"local {name}": ddp_case(name, local=True) for name in METHODS},
}


def logged(module, **options):
    """Train for one step and return the logged values."""
    import pytorch_lightning as pl

    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, use_distributed_sampler=False, callbacks=module.case.callbacks(),
        **{"devices": 1, **quiet, **LOGGED, **module.case.trainer, **options},
    )  # fmt: skip
    trainer.fit(module)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def replicated(case, **options):
    return logged(replicas.Module(case), **options)


class Spread(sharded.Case):
    """A sharded case with an additional callback that only monitors."""

    def callbacks(self):
        return [METHODS[self.method].callback(**ALL), GradientNormMonitor(by_layer=True)]


def spread(method, layout="fsdp", **options):
    module = sharded.Module(Spread(layout, method, trainer=CLIP))
    return logged(module, **options)


def by_metrics():
    """Compute the torchmetrics after different updates, and a different number of them, on each rank."""
    rank = torch.distributed.get_rank()
    collection = MetricCollection([GradientNorm(), GradientAlignment(), Sharpness()])
    for count in range(1 + rank):
        w = torch.full((2,), 1.0 + rank + count, requires_grad=True)
        (w.square().sum() / 2).backward()
        collection["GradientNorm"].update([w])
        collection["GradientAlignment"].update([w], [torch.tensor([1.0, float(count)])])
        collection["Sharpness"].update(torch.tensor(1.0), w.detach().sum())
    return {name: metric.compute().item() for name, metric in collection.items()}


def all_reduces(metrics, every):
    """Count the all-reduces in a training run of four steps."""
    case = Case("SAM", {"metrics": metrics}, net="unmonitored", trainer={"log_every_n_steps": every})
    with sharded.Collectives() as mode:
        logged(replicas.Module(case), devices=RANKS, strategy=DDPStrategy(), limit_train_batches=4)
    return mode.counts["allreduce_"]


def own_batch(rank):
    """Return the first batch of a rank."""
    x, y = replicas.make_data(replicas.SAMPLES)
    size = replicas.BATCH // RANKS
    return x[rank::RANKS][:size], y[rank::RANKS][:size]


def main(folder):
    results = {name: replicated(case, devices=RANKS, strategy=DDPStrategy()) for name, case in CASES.items()}
    if hasattr(torch.cpu.Stream, "record_event"):
        for name in FIRST_ORDER:
            results[f"sharded {name}"] = spread(name, devices=RANKS, strategy=ModelParallelStrategy(RANKS, 1))
    results["torchmetrics"] = by_metrics()
    results["all-reduces"] = {(m, every): all_reduces(m, every) for m, every in (((), 1), ("all", 100), ("all", 2))}
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
