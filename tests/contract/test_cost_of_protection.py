"""The cost of the contract: between learning steps, state that is only read is neither copied nor searched."""

import sys

import pytorch_lightning as pl
import torch
from contract import Batches, as_dict, make_trainer, same, seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr import SAM


class Large(pl.LightningModule):
    """Has large state that is only read: a buffer, a frozen backbone, attributes and a dictionary of tensors."""

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
    """Records operations on large tensors, with the step in which they run."""

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
    """Return operations on large tensors, except in learning steps, which are those at powers of two."""
    seed()
    module, mode = Large(), Sizes()
    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(15)]
    with mode:
        make_trainer(*callbacks, Steps(mode)).fit(module, Batches(batches))
    assert module.calls == 15
    return [name for step, name in mode.found if step >= 3 and step & (step - 1)]


def test_state_that_is_only_read_is_not_copied_between_learning_steps():
    assert count_large(SAM(0.1, metrics=())) == count_large()


def test_nothing_is_searched_without_a_second_pass():
    same("operations", as_dict(count_large(SAM(0.1, start_step=100))), as_dict(count_large()))


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied in each step."""

    NAMES = ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack", "flatten", "_foreach_copy_")

    def __init__(self):
        super().__init__()
        self.step, self.bytes = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._opname in self.NAMES:
            written = args[0] if func._opname.endswith("copy_") else result
            read = sum(x.nbytes for x in torch.utils._pytree.tree_leaves(written) if isinstance(x, torch.Tensor))
            self.bytes[self.step] = self.bytes.get(self.step, 0) + read
        return result


class Norms(Large):
    """Has large state that is only read, in every layout, and running means that are written to."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.images = torch.randn(4, 8, 30, 30).to(memory_format=torch.channels_last)
        self.tables = [torch.randn(40, self.many).T for _ in range(3)]

    def training_step(self, batch, batch_idx):
        return super().training_step((self.norm(batch[0]), batch[1]), batch_idx)


def copied(*callbacks):
    seed()
    module, mode = Norms(), Copied()
    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(15)]
    with mode:
        make_trainer(*callbacks, Steps(mode)).fit(module, Batches(batches))
    return [mode.bytes.get(step, 0) for step in range(1, 16)]


def test_only_written_and_small_tensors_are_copied_between_learning_steps():
    steps, plain = copied(SAM(0.1, metrics=())), copied()
    between = [steps[n - 1] - plain[n - 1] for n in range(3, 16) if n & (n - 1)]
    # weights are saved and restored; running means, their counter and the batch are copied four times at most
    assert max(between) < 4096
    # a learning step copies everything that might be written to
    assert steps[7] - plain[7] > 4 * Large.many


class Deep(Large):
    """Has many layers, each with weights, running means and a dozen attributes."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(count)))

    def training_step(self, batch, batch_idx):
        return super().training_step((self.layers(batch[0]), batch[1]), batch_idx)


class Calls:
    """Counts the calls of Python functions outside of the algorithm itself in each step."""

    PARTS = ("lightning_gr.replay.", "lightning_gr.callbacks.", "lightning_gr.core.hooks", "lightning_gr._compat")

    def __init__(self):
        self.step, self.count = 0, {}

    def __call__(self, frame, event, arg):
        if event == "call" and frame.f_globals.get("__name__", "").startswith(self.PARTS):
            self.count[self.step] = self.count.get(self.step, 0) + 1


def called(count):
    """Return the smallest number of calls in a step, except in learning steps."""
    seed()
    calls, batches = Calls(), [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(7)]
    trainer = make_trainer(SAM(0.1, metrics=()), Steps(calls))
    before = sys.getprofile()
    sys.setprofile(calls)
    try:
        trainer.fit(Deep(count), Batches(batches))
    finally:
        sys.setprofile(before)
    return min(calls.count[step] for step in (3, 5, 6, 7))


def test_layers_hardly_add_python_calls_between_learning_steps():
    few, many = called(10), called(40)
    # each added layer consists of three modules with six tensors
    assert (many - few) / 30 < 3
