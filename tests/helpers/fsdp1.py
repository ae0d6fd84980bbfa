"""Trains several cases on CPU ranks with FSDPStrategy; run with torchrun by test_fsdp1.py, on 2 or 4 ranks."""

import faulthandler
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from modules import FIRST_ORDER, METHODS, STATEFUL, make_data, mlp
from pytorch_lightning.plugins import FSDPPrecision
from pytorch_lightning.strategies import FSDPStrategy
from sharded import Collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gr import Flooding, GradientNormMonitor
from lightning_gr._fsdp1 import own_name

BATCH, SAMPLES = 8, 16
WRAP = {"auto_wrap_policy": ModuleWrapPolicy({nn.Linear})}
LAYOUTS = {
    "root": {},
    "wrap": WRAP,
    "flat": {**WRAP, "use_orig_params": False},
    "grad op": {**WRAP, "sharding_strategy": "SHARD_GRAD_OP"},
    "grad op flat": {**WRAP, "sharding_strategy": "SHARD_GRAD_OP", "use_orig_params": False},
    "no shard": {**WRAP, "sharding_strategy": "NO_SHARD"},
    "hybrid": {**WRAP, "sharding_strategy": "HYBRID_SHARD"},
}


class OnCPU(FSDPStrategy):
    """FSDP1 on CPU ranks, for which Lightning's strategy would pass the index of a GPU."""

    def setup_environment(self):
        super().setup_environment()
        if self.sharding_strategy.name == "HYBRID_SHARD":
            self.kwargs["device_mesh"] = init_device_mesh("cpu", (2, torch.distributed.get_world_size() // 2))

    def _setup_model(self, model):
        from lightning_fabric.strategies.fsdp import _setup_activation_checkpointing

        options = {"cpu_offload": self.cpu_offload, "mixed_precision": self.mixed_precision_config, **self.kwargs}
        options |= {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(model, **options)
        _setup_activation_checkpointing(model, self._activation_checkpointing_kwargs)
        return model


class KeepFloat64(FSDPPrecision):
    """Leaves float64 alone, for which the strategy has no precision setting."""

    mixed_precision_config = MixedPrecision()

    def convert_module(self, module):
        return module

    def convert_input(self, data):
        return data

    def forward_context(self):
        return nullcontext()

    convert_output = convert_input


class Case(NamedTuple):
    """A training run: how it is sharded (``"single"`` is the reference), the method, and options."""

    layout: str
    method: str | None = "forward GR"
    options: dict = {}  # of the callback  # noqa: RUF012
    trainer: dict = {}  # options of the Trainer  # noqa: RUF012
    strategy: dict = {}  # options of the strategy  # noqa: RUF012
    level: float | None = None
    adam: bool = False
    monitor: bool = False  # monitors the norm of all gradients and of each layer's
    kind: str = ""  # "uneven" (a parameter is used on the first rank only), "tied" or "frozen"

    def callbacks(self):
        own = [] if self.method is None else [(METHODS | STATEFUL)[self.method].callback(**self.options)]
        own += [GradientNormMonitor(by_layer=True)] if self.monitor else []
        return own if self.level is None else [*own, Flooding(self.level, sync=True)]


SOME = ["forward GR", "central GR", "SAM", "ASAM with eta", "backward norm penalty", "Momentum-SAM"]
TWO = {"accumulate_grad_batches": 2}
# all regularized parameters lie on one rank
LITTLE = {"exclude": ["net.[023].weight", "net.[03].bias"]}
CASES = {
    **{f"wrap {name}": Case("wrap", name) for name in [*FIRST_ORDER, "Momentum-SAM"]},
    **{
        f"{layout} {name}": Case(layout, name)
        for layout in ("root", "flat", "grad op", "grad op flat", "no shard")
        for name in SOME
    },
    **{
        f"{layout} {name}, accumulation": Case(layout, name, trainer=TWO)
        for layout in ("wrap", "flat", "grad op", "grad op flat")
        for name in ("central GR", "SAM", "Momentum-SAM")
    },
    "plain": Case("wrap", None),
    "exclude": Case("wrap", "SAM", {"exclude": ["*.bias"]}),
    "exclude, a unit": Case("flat", "SAM", {"exclude": ["net.0.*"]}),
    "exclude, grad op": Case("grad op", "central GR", {"exclude": ["net.2.weight"]}),
    "exclude by type": Case("wrap", "forward GR", {"exclude": ["type:LayerNorm"]}),
    **{f"little, {name}": Case("wrap", name, LITTLE) for name in SOME},
    "flooding": Case("wrap", "SAM", level=0.9),
    "clipping by value": Case("wrap", trainer={"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "clipping each": Case("wrap", "central GR", {"gradient_clip": (0.1, 0.05)}),
    "interval": Case("wrap", "SAM", {"interval": 2, "warmup_steps": 3}),
    "Adam": Case("wrap", "SAM", adam=True),
    "Adam, Momentum-SAM": Case("wrap", "Momentum-SAM", adam=True),
    "activation checkpointing": Case("wrap", "SAM", strategy={"activation_checkpointing": nn.Linear}),
    "activation checkpointing, flat": Case("flat", "central GR", strategy={"activation_checkpointing": nn.Linear}),
    **{
        f"{kind}, {name}": Case("root" if kind == "tied" else "wrap", name, {"metrics": "all"}, kind=kind)
        for kind in ("uneven", "tied", "frozen")
        for name in ("SAM", "central GR", "Momentum-SAM")
    },
    **{f"monitor, {layout}": Case(layout, "SAM", monitor=True) for layout in ("root", "wrap", "grad op", "no shard")},
    "metrics": Case("wrap", "forward GR", {"metrics": ["all", "grad_norm_by_layer"]}),
    "metrics, Momentum-SAM": Case("grad op", "Momentum-SAM", {"metrics": "all"}),
}
HYBRID = {f"hybrid {name}": Case("hybrid", name) for name in SOME}
ROUGH = {
    f"{name}, {precision}": Case("wrap", name, trainer={"precision": precision})
    for name in ("forward GR", "SAM", "Momentum-SAM")
    for precision in ("bf16-mixed", "bf16-true", "32-true")
}


class Module(pl.LightningModule):
    """An MLP with a LayerNorm; each rank takes its part of a joint batch."""

    def __init__(self, case):
        super().__init__()
        self.case, self.logs = case, {}
        self.net = nn.Sequential(*mlp(8), nn.LayerNorm(3, dtype=torch.float64))
        if case.kind == "tied":
            self.net = nn.Sequential(*mlp(8, 8, 8), nn.LayerNorm(3, dtype=torch.float64))
            self.net[4].weight = self.net[2].weight
        if case.kind == "frozen":
            self.net[0].bias.requires_grad_(False)
        if case.kind == "uneven":
            self.offset = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))
        if case.trainer.get("precision"):
            self.net = self.net.float()

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        x, y = make_data(SAMPLES)
        data = TensorDataset(x.float() if self.case.trainer.get("precision") else x, y)
        return DataLoader(Subset(data, range(rank, SAMPLES, ranks)), batch_size=BATCH // ranks)

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        if self.case.kind == "uneven" and self.trainer.world_size == 1:
            output = output + self.offset * (torch.arange(len(output)) % 2 == 0)[:, None]  # the samples of rank 0
        elif self.case.kind == "uneven" and self.global_rank == 0:
            output = output + self.offset
        return nn.functional.cross_entropy(output, batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logs = {n: float(v) for n, v in self.trainer.callback_metrics.items()}

    def on_train_end(self):
        self.final = whole(self)

    def configure_optimizers(self):
        params = list(self.trainer.strategy.model.parameters())
        if self.case.adam:
            return torch.optim.Adam(params, lr=0.01)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def whole(module):
    """Gather the full parameters by name, on each rank."""
    model = module.trainer.strategy.model
    if not isinstance(model, FullyShardedDataParallel):
        return {n: p.detach().clone() for n, p in module.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {own_name(n): p.detach().clone() for n, p in module.named_parameters()}


def trainer(case, *callbacks, strategy="auto", **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    options = {"logger": False, "max_epochs": 2, "use_distributed_sampler": False, **quiet, **case.trainer, **options}
    options = {"log_every_n_steps": 1, **options}
    return pl.Trainer(accelerator="cpu", strategy=strategy, callbacks=[*case.callbacks(), *callbacks], **options)


def spread(case, *callbacks, ranks=2, **options):
    """Create a Trainer over all ranks."""
    kwargs = {**LAYOUTS[case.layout], **case.strategy}
    if not case.trainer.get("precision"):
        options["plugins"] = [KeepFloat64("32-true")]
    kwargs |= options.pop("strategy_options", {})
    return trainer(case, *callbacks, strategy=OnCPU(**kwargs), devices=ranks, **options)


def trained(case, ranks=2):
    module = Module(case)
    spread(case, ranks=ranks).fit(module)
    return {"weights": module.final, "logs": module.logs}


def communication(layout, method, window=1):
    """Count the collectives of a training run."""
    case = Case(layout, method, trainer={"accumulate_grad_batches": window})
    module = Module(case)
    module.on_train_end = lambda: None
    with Collectives() as mode:
        spread(case).fit(module)
    return mode.counts


class SavesInGap(Module):
    """Saves a checkpoint between the forward and the backward pass, where FSDP holds gathered weights."""

    def on_before_backward(self, loss):
        if self.trainer.global_step == 2:
            self.trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.clean = whole(self)


def saved_in_gap(folder, layout):
    case = Case(layout, "Momentum-SAM")
    module = SavesInGap(case)
    module.path = folder / f"gap-{layout}.ckpt"
    spread(case, strategy_options={"state_dict_type": "sharded"}).fit(module)
    return module.clean


def resumed(folder, kind, layout):
    """Return the weights after two epochs, with and without resuming from a checkpoint in between."""
    case = Case(layout, "SAM", adam=True)
    path = folder / f"resume-{kind}-{layout}.ckpt"
    straight, first, second = Module(case), Module(case), Module(case)
    options = {"strategy_options": {"state_dict_type": kind}}
    spread(case, **options).fit(straight)
    run = spread(case, max_epochs=1, **options)
    run.fit(first)
    run.save_checkpoint(path)
    spread(case, **options).fit(second, ckpt_path=path)
    return {"straight": straight.final, "resumed": second.final, "saved": first.final}


def main(folder, chosen):
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    results = {}
    for name, case in (HYBRID if ranks == 4 else {**CASES, **ROUGH}).items():
        if not chosen or any(part in name for part in chosen.split("|")):
            print("case", name, flush=True)
            results[name] = trained(case, ranks)
            torch.save(results, folder / f"{rank}.pt")
    if ranks == 2 and chosen in ("", "communication"):
        for layout in ("root", "wrap", "grad op"):
            for method in (None, "forward GR", "SAM", "central GR", "Momentum-SAM"):
                results["communication", layout, method] = communication(layout, method)
                print("case", layout, method, results["communication", layout, method], flush=True)
    if ranks == 2 and chosen in ("", "others", "gap"):
        # torch itself crashes when it saves a full checkpoint from CPU ranks
        for kind in ("sharded",) if chosen != "gap" else ():
            for layout in ("wrap", "flat"):
                print("case resumed", kind, layout, flush=True)
                results["resumed", kind, layout] = resumed(folder, kind, layout)
        for layout in ("root", "wrap", "grad op"):
            print("case gap", layout, flush=True)
            results["gap", layout] = saved_in_gap(folder, layout)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
