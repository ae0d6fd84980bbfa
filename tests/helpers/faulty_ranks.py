"""Trains cases in which two DDP ranks behave differently; run with torchrun by test_faults_between_ranks.py."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from modules import METHODS, STATEFUL, mlp, weights
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.utils.data import DataLoader

from lightning_gr import SAM, Flooding, GradientRegularization, GradientRegularizationMixin

RANKS, BATCHES, LEVEL = 2, 12, 0.9
UNUSED = {"find_unused_parameters": True}
LOCAL = {"ascent_sync": False}
# so small that each bucket holds a single gradient
VIEW = {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-6}
ALL = ("body", "middle", "head")


class Case(NamedTuple):
    """A training run, and what differs between its ranks."""

    method: str | None
    options: dict = {}  # noqa: RUF012
    ddp: dict = {}  # noqa: RUF012
    window: int = 1
    zeroes: bool = False  # whether gradients are set to zero instead of None
    parts: str = "all"  # which layers the loss of a micro-batch depends on, see `parts_of`
    without: tuple = ()  # pairs (rank, micro-batch) of batches that are None
    flooding: dict | None = None
    compiled: bool = False
    manual: bool = False

    def callbacks(self):
        own = [] if self.method is None else [(METHODS | STATEFUL)[self.method].callback(**self.options)]
        return own if self.flooding is None else [*own, Flooding(**self.flooding)]


def parts_of(kind, rank, batch_idx):
    """Return the layers that the loss of a micro-batch depends on."""
    if kind == "offset only on rank 1":
        return () if rank == 1 else ALL
    if kind == "drops layers":  # both, one, and none of them
        return ("body", "head") if (batch_idx + rank) % 3 == 1 else () if (batch_idx * (1 + rank)) % 5 == 4 else ALL
    if kind == "drops a layer in some micro-batches":
        return ("body", "head") if batch_idx % 2 else ALL
    return ALL


class Net(nn.Module):
    """A network whose layers can be left out; its output is linear in ``offset``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.middle, self.head = mlp(6)[0], nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
        self.offset, self.extra = (nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x, parts):
        output = self.offset.expand(len(x), 3)
        if parts:
            hidden = torch.tanh(self.body(x))
            hidden = torch.tanh(self.middle(hidden)) if "middle" in parts else hidden
            output = output + self.head(hidden)
        return output


def loss_of(net, batch, parts):
    x, y = batch
    # `extra` enters linearly, so that no second derivative depends on it
    return nn.functional.cross_entropy(net(x, parts), y) + 0.3 * net.extra.sum()


def batches_of(case, rank):
    generator = torch.Generator().manual_seed(10 + rank)
    found = []
    for index in range(BATCHES):
        x = torch.randn(4, 5, generator=generator).double()
        found.append(None if (rank, index) in case.without else (x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()))
    return found


class Module(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.case, self.net, self.norms = case, Net(), []

    def train_dataloader(self):
        return DataLoader(batches_of(self.case, self.global_rank), batch_size=None, collate_fn=lambda batch: batch)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch, parts_of(self.case.parts, self.global_rank, batch_idx))

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=not self.case.zeroes)

    def configure_optimizers(self):
        # without momentum, a gradient that is None is the same as zero
        momentum = 0.9 if self.case.parts == "all" else 0.0
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=momentum)


class Manual(GradientRegularizationMixin, Module):
    def __init__(self, case):
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=not self.case.zeroes)
        self.regularized_backward(lambda: super(Manual, self).training_step(batch, batch_idx), optimizer)
        optimizer.step()


# --- stashed gradients are views of DDP's buckets
BUCKETS = {
    **{
        f"buckets, {name}": Case(name, ddp=VIEW, zeroes=True)
        for name in ("forward GR", "central GR", "exact GR", "SAM", "ASAM", "GSAM", "LookSAM")
    },
    "buckets, accumulation": Case("SAM", ddp=VIEW, zeroes=True, window=3),
    "buckets, one for all": Case("SAM", ddp={"gradient_as_bucket_view": True}, zeroes=True),
    "buckets, static graph": Case("SAM", ddp={**VIEW, "static_graph": True}, zeroes=True),
    "buckets, manual": Case("SAM", ddp={**VIEW, **UNUSED}, zeroes=True, manual=True),
    "buckets, manual central": Case("central GR", ddp={**VIEW, **UNUSED}, zeroes=True, manual=True),
    "buckets, three passes clipped": Case("central GR", {"gradient_clip": 0.05}, VIEW, zeroes=True),
    "buckets, exclude": Case("SAM", {"exclude": ["*.bias"]}, VIEW, zeroes=True),
    "buckets, clipped, exclude": Case("SAM", {"exclude": ["*.bias"], "gradient_clip": 0.05}, VIEW, zeroes=True),
    "buckets, local": Case("SAM", LOCAL, VIEW, zeroes=True),
    "buckets, local accumulation": Case("central GR", LOCAL, VIEW, zeroes=True, window=2),
    "buckets, Momentum-SAM": Case("Momentum-SAM", ddp=VIEW, zeroes=True),
    "buckets, None": Case("SAM", ddp=VIEW, window=2),
}
# --- one rank has no gradients of its own
EXCLUDED = {**LOCAL, "exclude": ["*offset", "*extra"]}
ALONE = {
    f"without gradients, {name}{', accumulation' * (window > 1)}": Case(
        name, {**EXCLUDED, "metrics": "all"}, UNUSED, window, parts="offset only on rank 1"
    )
    for name in ("forward GR", "central GR", "exact GR", "central norm penalty", "SAM", "ASAM")
    for window in (1, 2)
} | {
    "without gradients, flooding": Case(
        "SAM", EXCLUDED, UNUSED, parts="offset only on rank 1", flooding={"level": LEVEL, "sync": True}
    ),
    "without gradients, manual": Case("SAM", EXCLUDED, UNUSED, parts="offset only on rank 1", manual=True),
    "without gradients, manual central": Case(
        "central GR", EXCLUDED, UNUSED, parts="offset only on rank 1", manual=True
    ),
    "without gradients, micro-batches": Case(
        "SAM", {**EXCLUDED, "accumulation": "micro_batch"}, UNUSED, 2, parts="offset only on rank 1"
    ),
}
# --- batches that are None
FIRST = ((0, 3), (0, 9), (1, 3), (1, 6))
BOTH = ((0, 0), (1, 0), (0, 6), (1, 6))
LAST = ((0, 5), (1, 5))
NONE = {
    "None first, plain": Case(None, window=3, without=FIRST),
    "None first": Case("SAM", {"interval": 2}, window=3, without=FIRST),
    "None first, local": Case("SAM", {"interval": 2, **LOCAL}, window=3, without=FIRST),
    "None first, warm-up": Case("central GR", {"interval": 2, "warmup_steps": 3}, window=3, without=FIRST),
    "None first, start": Case("forward GR", {"start_step": 1}, window=3, without=FIRST),
    "None first, LookSAM": Case("LookSAM", window=3, without=BOTH),
    "None first, on both": Case("SAM", {"interval": 2}, window=3, without=BOTH),
    "None first, Momentum-SAM": Case("Momentum-SAM", {"interval": 2}, window=3, without=FIRST),
    "None last": Case("SAM", {"interval": 2}, window=3, without=LAST),
    "None last, local": Case("SAM", LOCAL, window=3, without=LAST),
    "None in the middle": Case("SAM", {"interval": 2}, window=3, without=((0, 4), (1, 7))),
    "all None": Case("SAM", {"interval": 2}, window=3, without=tuple((r, b) for r in (0, 1) for b in (3, 4, 5))),
}
# --- exact scheme, with unused parameters
EXACT = {
    f"exact, {kind}, {'local' if options else 'synced'}{', accumulation' * (window > 1)}": Case(
        "exact GR", options, UNUSED, window, parts=kind
    )
    for kind in ("drops layers", "drops a layer in some micro-batches")
    for options in ({}, LOCAL)
    for window in (1, 3)
} | {
    "exact, norm penalty": Case("exact norm penalty", {}, UNUSED, parts="drops layers"),
    "exact, a linear parameter excluded": Case("exact GR", {"exclude": ["*extra", "*head.bias", "*offset"]}),
    "exact, excluded, drops layers": Case("exact GR", {"exclude": ["*extra", "*.bias"]}, UNUSED, parts="drops layers"),
    "exact, manual": Case("exact GR", {}, UNUSED, parts="drops layers", manual=True),
    "exact, static graph": Case("exact GR", {}, {"static_graph": True}),
    "exact, bucket view": Case("exact GR", {}, {**UNUSED, **VIEW}, zeroes=True, parts="drops layers"),
    **{
        f"{name}, drops layers": Case(name, {}, UNUSED, window, parts="drops layers")
        for name, window in (("SAM", 1), ("central GR", 3), ("GSAM", 1), ("ASAM", 1))
    },
}
# --- flooding with a common decision, while one rank has a micro-batch less
SYNC = {"level": LEVEL, "sync": True}
MICRO = {**LOCAL, "accumulation": "micro_batch"}
FLOODED = {
    "flooding, None": Case(None, window=3, without=FIRST, flooding=SYNC),
    **{
        f"flooding, None, {name}": Case(name, {"interval": 2}, window=3, without=FIRST, flooding=SYNC)
        for name in ("forward GR", "central GR", "SAM", "exact GR", "Momentum-SAM")
    },
    "flooding, None, local": Case("central GR", LOCAL, window=3, without=FIRST, flooding=SYNC),
    "flooding, None in the middle": Case("SAM", window=3, without=((0, 4), (1, 7)), flooding=SYNC),
    "flooding, None, micro-batches": Case("central GR", MICRO, window=3, without=((0, 4), (1, 7)), flooding=SYNC),
    "flooding, None first, micro-batches": Case("SAM", MICRO, window=3, without=((0, 6), (1, 9)), flooding=SYNC),
}
# --- compiled layers, which DDP reduces in separate buckets
COMPILED = {
    "compiled, SAM": Case("SAM", compiled=True),
    "compiled, accumulation": Case("forward GR", ddp=VIEW, window=2, compiled=True),
    "compiled, local": Case("central GR", LOCAL, compiled=True),
    "compiled, Momentum-SAM": Case("Momentum-SAM", compiled=True),
    "compiled, manual": Case("SAM", compiled=True, manual=True),
}
CASES = {**BUCKETS, **ALONE, **NONE, **EXACT, **FLOODED, **COMPILED}


def fit(case, module=None, callbacks=None):
    module = (Manual if case.manual else Module)(case) if module is None else module
    if case.compiled:
        module.net.compile(backend="aot_eager")
    pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=DDPStrategy(**case.ddp),
        max_epochs=1,
        callbacks=case.callbacks() if callbacks is None else callbacks,
        accumulate_grad_batches=1 if case.manual else case.window,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module)
    return weights(module.net)


# --- stateful communication hooks
GROUPS = []  # the subgroup that consists of this rank only


class Feedback:
    """A custom hook with error feedback: sends rounded gradients, keeps the rounding errors, counts its calls."""

    def __init__(self):
        self.missing, self.seen = {}, [0]

    def __call__(self, bucket):
        full = bucket.buffer() + self.missing.get(bucket.index(), 0.0)
        sent = (full * 64).round() / 64
        self.missing[bucket.index()] = full - sent
        self.seen[0] += 1
        future = torch.distributed.all_reduce(sent, async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / RANKS)


class Hooked(Module):
    """Records the counter in its hook's state at each optimizer step."""

    def __init__(self, case, kind, nan=()):
        super().__init__(case)
        self.kind, self.nan, self.counts = kind, nan, []

    def training_step(self, batch, batch_idx):
        loss = Module.training_step(self, batch, batch_idx)
        return loss * torch.nan if (self.global_rank, batch_idx) in self.nan else loss

    def on_before_optimizer_step(self, optimizer):
        state = self.trainer.state_of_hook
        self.counts.append(state.seen[0] if self.kind == "own" else state.iter)
        for param in self.parameters():
            param.grad.nan_to_num_(0.0, 0.0, 0.0)

    def on_train_start(self):
        if self.kind == "power":
            state = power_sgd.PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=0.1)
            hook = power_sgd.powerSGD_hook
        elif self.kind == "local":
            state, hook = local_sgd.PostLocalSGDState(None, GROUPS[0], LOCAL_STEPS), local_sgd.post_localSGD_hook
        else:
            state = Feedback()
            hook = Feedback.__call__
        self.trainer.state_of_hook = state
        self.trainer.model.register_comm_hook(state, hook)


class HookedManual(GradientRegularizationMixin, Hooked):
    def __init__(self, case, kind, nan=()):
        super().__init__(case, kind, nan)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.regularized_step(self.optimizers(), lambda: Hooked.training_step(self, batch, batch_idx))


HOOKED = {
    "plain": Case(None),
    **{name: Case(name) for name in ("SAM", "forward GR", "central GR")},
    "local": Case("central GR", {**LOCAL, "interval": 2, "warmup_steps": 4}),
    "clipped": Case("central GR", {"gradient_clip": 0.5}),
    "exclude": Case("central GR", {"exclude": ["*.weight"]}),
    "manual": Case("SAM", manual=True),
    "accumulation": Case("SAM", window=2),
    "Momentum-SAM": Case("Momentum-SAM"),
    "NaN": Case("SAM", ddp=UNUSED),
    "NaN, manual": Case("SAM", ddp=UNUSED, manual=True),
}
HOOKS = {f"{kind}, {name}": (kind, name) for kind in ("power", "local", "own") for name in HOOKED}
LOCAL_STEPS = 4  # local SGD starts after this many steps


def hooked(kind, name):
    """Return the weights on this rank and the counts of the hook."""
    case = HOOKED[name]
    # PowerSGD reduces in callbacks, which clashes with the reduction for unused parameters, even in plain torch
    if kind == "power":
        case = case._replace(ddp={})
    # on one rank only, so that the gradients of the ranks may differ
    nan = {(0, 6)} if name.startswith("NaN") else ()
    module = (HookedManual if case.manual else Hooked)(case, kind, nan)
    return {"weights": fit(case, module), "counts": module.counts}


# --- ranks that decide differently
class Moody(SAM):
    def should_regularize(self, step):
        return step < 3 or torch.distributed.get_rank() == 0


class MoodyRule:
    """A rule whose update differs between ranks from step 3 on."""

    name, equation = "moody", "g"
    constants = {}  # noqa: RUF012

    def update(self, at=None):
        from lightning_gr.core.rules import FULL_STRENGTH, Context
        from lightning_gr.rules import SAMRule

        at = FULL_STRENGTH if at is None else at
        own = at.step >= 3 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        return SAMRule(0.0 if own else 0.1).update(Context(1.0, at.step))


def moody_callbacks():
    from lightning_gr import TwoPass

    rank = torch.distributed.get_rank()
    return {
        "step": [Moody(0.1)],
        "step, local": [Moody(0.1, ascent_sync=False)],
        "rule": [TwoPass(MoodyRule())],
        "rho": [SAM(0.1 + rank)],
        "interval": [SAM(0.1, interval=1 + rank)],
        "scheme": [GradientRegularization(0.1, 0.1, scheme=("forward", "central")[rank])],
        "exclude": [SAM(0.1, exclude=["*.bias"] if rank else [])],
        "level": [Flooding(0.1 + rank, sync=True)],
        "sync": [Flooding(0.1, sync=rank == 1)],
    }


def disagreements():
    found = {}
    for name, callbacks in moody_callbacks().items():
        for window, manual in ((1, False), (2, False), (1, True)):
            case = Case(None, window=window, manual=manual)
            module = (Manual if manual else Module)(case)
            try:
                fit(case, module, callbacks=callbacks)
                found[name, window, manual] = None, module.trainer.global_step
            except Exception as error:
                found[name, window, manual] = f"{type(error).__name__}: {error}", module.trainer.global_step
    return found


def main(folder, chosen):
    results = {}
    for name, case in CASES.items():
        if any(part and part in name for part in chosen.split("|")) or not chosen:
            print("case", name, flush=True)
            results[name] = fit(case)
            torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    if chosen in ("", "hooks"):
        if not torch.distributed.is_initialized():
            fit(Case(None))
        GROUPS.extend(torch.distributed.new_subgroups(1))
        for name, case in HOOKS.items():
            print("case", name, flush=True)
            results[name] = hooked(*case)
    if chosen in ("", "moody"):
        if not torch.distributed.is_initialized():
            fit(Case(None))
        results["moody"] = disagreements()
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
    torch.distributed.destroy_process_group()  # its threads might outlive the interpreter otherwise
