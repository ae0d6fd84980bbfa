"""Clips gradients with hooks and by hand, on two ranks with DDP; run with torchrun by test_hooks_over_ranks.py."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_gr import GradientRegularization

LIMIT, GAMMA, EPSILON, RANKS, STEPS = 0.1, 0.4, 0.8, 2, 4
CASES = {
    f"{kind} {scheme} {'local' if local else 'synced'} {window}": (kind, scheme, local, window)
    for kind in ("on its way", "after accumulation")
    for scheme in ("forward", "central")
    for local in (False, True)
    for window in (1, 2)
    if not (local and kind == "after accumulation")
}


def clip(grad):
    return grad.clamp(-LIMIT, LIMIT)


def clip_accumulated(param):
    param.grad.clamp_(-LIMIT, LIMIT)


class Module(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.found = []
        for param in self.net.parameters():
            if kind == "on its way":
                param.register_hook(clip)
            elif kind == "after accumulation":
                param.register_post_accumulate_grad_hook(clip_accumulated)

    def make_batches(self):
        generator = torch.Generator().manual_seed(self.global_rank)
        return [torch.randn(4, 5, generator=generator).double() for _ in range(STEPS)]

    def train_dataloader(self):
        return DataLoader(self.make_batches(), batch_size=None)

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch)

    def on_before_optimizer_step(self, optimizer):
        self.found.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loss_of(net, batch):
    return (net(batch[:, :3]) - batch[:, 3:]).square().mean()


def by_hand(kind, scheme, local, window, batches, net):
    """Return the gradients of each step, computed with a network without hooks."""
    signs = (1.0,) if scheme == "forward" else (1.0, -1.0)
    weight = GAMMA / EPSILON / len(signs)
    keep = 1.0 - sum(sign * weight for sign in signs)

    def clean(group, moves):
        params, total = list(net.parameters()), [torch.zeros_like(p) for p in net.parameters()]
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p += move
        for batch in group:
            grads = torch.autograd.grad(loss_of(net, batch) / len(group), params)
            total = [t + clip(g) if kind == "on its way" else clip(t + g) for t, g in zip(total, grads, strict=True)]
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p -= move
        return total

    def mean(grads):
        for grad in grads:
            torch.distributed.all_reduce(grad)
        return [grad / RANKS for grad in grads]

    found = []
    for start in range(0, len(batches), window):
        group = batches[start : start + window]
        first = clean(group, [0.0 * p for p in net.parameters()])
        first = first if local else mean(first)
        final = [keep * g for g in first]
        for sign in signs:
            second = clean(group, [sign * EPSILON * g.detach() for g in first])
            final = [f + sign * weight * s for f, s in zip(final, second if local else mean(second), strict=True)]
        final = mean(final) if local else final
        found.append([g.clone() for g in final])
        with torch.no_grad():
            for p, g in zip(net.parameters(), final, strict=True):
                p -= 0.1 * g
    return found


def difference(kind, scheme, local, window):
    module = Module(kind)
    callback = GradientRegularization(GAMMA, EPSILON, scheme=scheme, ascent_sync=not local, verbose=False)
    pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=DDPStrategy(),
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=window,
    ).fit(module)
    expected = by_hand(kind, scheme, local, window, module.make_batches(), Module(None).net)
    pairs = [(f, e) for fs, es in zip(module.found, expected, strict=True) for f, e in zip(fs, es, strict=True)]
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in pairs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: difference(*case) for name, case in CASES.items()}
    torch.save(results, Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()  # its threads might outlive the interpreter otherwise
