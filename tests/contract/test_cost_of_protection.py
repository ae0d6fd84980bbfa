"""The cost of the contract: state that is only read is not copied, and no search between learning evaluations."""

import pytorch_lightning as pl
import torch
from contract import Batches, as_dict, make_trainer, same, seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr import SAM


class Large(pl.LightningModule):
    """Much that is only read: a buffer, a frozen backbone, attributes and a dictionary of tensors."""

    many = 3000

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.register_buffer("table", torch.randn(self.many, 3))
        self.backbone = nn.Linear(3, self.many, bias=False).requires_grad_(False)
        self.prior = torch.randn(self.many, 3)
        self.by_name = {"prior": torch.randn(self.many, 3)}
        self.register_buffer("written", torch.zeros(3))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.written += 1
        x = batch[0] + self.table[batch_idx] + self.backbone.weight[batch_idx] + self.prior[batch_idx]
        return (self.net(x + self.by_name["prior"][batch_idx] + self.written) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Sizes(TorchDispatchMode):
    """Counts operations that read or write something large, by the step in which they run."""

    def __init__(self):
        super().__init__()
        self.step, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = ("view", "select", "slice", "detach", "alias", "unsqueeze", "index", "as_strided", "t.default")
        large = [x for x in torch.utils._pytree.tree_leaves((args, result)) if _is_large(x)]
        if large and not any(view in str(func) for view in views):
            self.found.append((self.step, str(func)))
        return result


def _is_large(value):
    return isinstance(value, torch.Tensor) and value.numel() >= Large.many


class Steps(pl.Callback):
    def __init__(self, mode):
        self.mode = mode

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode.step = batch_idx + 1


def count_large(*callbacks):
    """The large operations between learning steps, which are the first and those of powers of two."""
    seed()
    module, mode = Large(), Sizes()
    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(15)]
    with mode:
        make_trainer(*callbacks, Steps(mode)).fit(module, Batches(batches))
    assert module.calls == 15
    return [name for step, name in mode.found if step >= 3 and step & (step - 1)]


def test_what_is_only_read_is_not_copied_between_learning_steps():
    assert count_large(SAM(0.1, metrics=())) == count_large()


def test_nothing_is_walked_where_there_is_no_second_pass():
    same("operations", as_dict(count_large(SAM(0.1, start_step=100))), as_dict(count_large()))
