"""The contract for :class:`SharpnessMonitor` and the Hessian functions: no side effects."""

from collections import Counter

import numpy as np
import pytest
import torch
from contract import Batches, Situation, generators, make_trainer, right_or_refused, same, seed
from fingerprints import fingerprint
from torch import nn
from torchmetrics import CatMetric, MeanMetric

from lightning_gr import SAM, SharpnessMonitor, hessian_eigenvalue, hessian_trace


class Teacher(Situation):
    """A teacher that is moved in each step through ``.data``."""

    def prepare(self):
        self.teacher = nn.Linear(3, 2).double().requires_grad_(False)

    def step(self, batch):
        for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.mul_(0.9).add_(p.data, alpha=0.1)
        return self.mse(batch) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()


class Target(Teacher):
    """A hard update."""

    def step(self, batch):
        self.teacher.load_state_dict(self.net.state_dict())
        return self.mse(batch) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()


class Generators(Situation):
    def prepare(self):
        self.gen, self.box = torch.Generator().manual_seed(1), {"rng": [np.random.default_rng(0)]}

    def step(self, batch):
        noise = torch.randn(3, generator=self.gen, dtype=torch.float64) + float(self.box["rng"][0].normal())
        return self.mse((batch[0] + noise, batch[1]))


class Containers(Situation):
    calls = [0]  # noqa: RUF012

    def prepare(self):
        Containers.calls = [0]
        self.history, self.counter, self.stats = [[]], Counter(), {"mean": torch.zeros(1)}

    def step(self, batch):
        loss = self.mse(batch)
        self.calls[0] += 1
        self.history[0].append(float(loss.detach()))
        self.counter["n"] += 1
        self.stats["mean"].add_(1.0)
        return loss


class Metrics(Situation):
    def prepare(self):
        self.by_name, self.kept = {"loss": MeanMetric()}, CatMetric()
        self.register_buffer("run", None)

    def step(self, batch):
        loss = self.mse(batch)
        for metric in (self.by_name["loss"], self.kept):
            metric.update(loss.detach().float())
        self.run = loss.detach() if self.run is None else 0.9 * self.run + 0.1 * loss.detach()
        return loss


class Logs(Situation):
    """Logs through ``self.log`` and directly to the logger."""

    def prepare(self):
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()

    def step(self, batch):
        loss = self.mse(batch)
        if self._trainer is not None:
            self.log("loss", loss, on_step=True, on_epoch=True)
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] *= 0.99
        return loss


class SameContent(Target):
    """The first evaluation cannot see the write: the teacher starts as a copy, and follows through ``.data``."""

    def prepare(self):
        super().prepare()
        self.teacher.load_state_dict(self.net.state_dict())

    def step(self, batch):
        for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.copy_(p.data)
        return self.mse(batch) + (self.net(batch[0]) - 2 * self.teacher(batch[0])).square().mean()


class Trainable(SameContent):
    """A teacher that is in the optimizer, as in a DQN whose target was not frozen."""

    def prepare(self):
        super().prepare()
        self.teacher.requires_grad_(True)


class Clips(Situation):
    """Clips its own weights, as a Wasserstein critic does."""

    def step(self, batch):
        with torch.no_grad():
            for p in self.net.parameters():
                p.data.clamp_(-0.2, 0.2)
        return self.mse(batch)


class Adversarial(Situation):
    """An inner backward pass leaves gradients behind."""

    def step(self, batch):
        x = batch[0].clone().requires_grad_()
        with torch.enable_grad():
            (self.net(x) - batch[1]).square().mean().backward()
        return self.mse((batch[0] + 0.1 * x.grad.sign(), batch[1]))


KINDS = [Teacher, Target, Generators, Containers, Metrics, Logs, SameContent, Trainable, Clips, Adversarial]
METHODS = ["double_backward", "finite_difference"]


def fit(kind, *callbacks, **options):
    seed()
    module = kind(0.05)
    seed()
    batches = module.make_batches()
    trainer = make_trainer(*callbacks, max_epochs=2, **options)
    trainer.fit(module, Batches(batches))
    return trainer, {**fingerprint(module), **generators()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_as_without_the_monitor(kind, method):
    monitor = SharpnessMonitor(samples=2, max_iterations=3, method=method)
    trainer, found = fit(kind, monitor)
    same("what is left", found, fit(kind)[1])
    assert len(monitor.results) == 2
    assert torch.isfinite(trainer.callback_metrics["hessian/eigenvalue"])


@pytest.mark.parametrize("kind", [Teacher, Target, SameContent, Trainable])
def test_together_with_sam(kind):
    _, found = fit(kind, SAM(0.1), SharpnessMonitor(samples=2, max_iterations=3))
    same("what is left", found, fit(kind, SAM(0.1))[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_functions(kind, method):
    seed()
    module = kind()
    (batch, *_) = module.make_batches()
    module.step(batch).backward()
    before = {**fingerprint(module, batch), **generators()}
    hessian_eigenvalue(lambda: module.step(batch), module, max_iterations=3, method=method)
    hessian_trace(lambda: module.step(batch), module, max_samples=2, min_samples=2, method=method)
    same("what is left", {**fingerprint(module, batch), **generators()}, before)


class Doubles(Situation):
    """Changes its batch in place, so that each evaluation has another loss."""

    def prepare(self):
        self.net = nn.Linear(3, 1, bias=False).double()

    def make_batches(self):
        return [torch.randn(8, 3).double() for _ in range(3)]

    def step(self, batch):
        batch *= 1.1
        return self.net(batch).square().mean() / 2


class DoublesData(Doubles):
    """Changes its batch through ``.data``."""

    def step(self, batch):
        batch.data.mul_(1.1)
        return self.net(batch).square().mean() / 2


class DoublesEntry(Doubles):
    """Replaces an entry of its batch, and changes another one in place."""

    def make_batches(self):
        return [{"x": x, "n": torch.ones(1).double()} for x in super().make_batches()]

    def step(self, batch):
        batch["n"] += 0.1
        batch["x"] = batch["x"] * batch["n"]
        return self.net(batch["x"]).square().mean() / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Doubles, DoublesData, DoublesEntry])
def test_a_batch_that_the_step_changes_in_place(kind, method):
    """Either λ is correct for the loss of the first batch, or an error says that the batch was changed."""
    seed()
    first = kind().make_batches()
    seed()
    module = kind()
    x = torch.as_tensor(first[0]["x"] if kind is DoublesEntry else first[0]) * 1.1
    expected = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])

    def check():
        monitor = SharpnessMonitor(trace=False, method=method, tolerance=1e-4)
        batches = [{**b} if isinstance(b, dict) else b for b in first]
        make_trainer(monitor).fit(module, Batches(batches))
        assert float(monitor.results[0][1]) == pytest.approx(expected, rel=1e-3)

    right_or_refused(check, "batch|in place|clone")


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("none", [{0}, {0, 1, 2}, {8}, set(range(9))])
def test_batches_without_a_loss_do_not_end_the_run(none):
    class Skips(Situation):
        step = Situation.mse

        def training_step(self, batch, batch_idx):
            return None if batch_idx in none else self.step(batch)

    class First(Skips):
        """Decides by the batch itself, since the monitor measures the first batch."""

        def make_batches(self):
            return [(x + 100 * (index in none), y) for index, (x, y) in enumerate(super().make_batches())]

        def training_step(self, batch, batch_idx):
            return None if batch[0].mean() > 50 else self.step(batch)

    for kind in (Skips, First):
        monitor = SharpnessMonitor(samples=2, max_iterations=3)
        trainer, _ = fit(kind, monitor)
        assert trainer.global_step == 18
        assert len(monitor.results) == (0 if len(none) == 9 else 2)


def test_a_loss_that_is_none_in_eval_mode_is_not_measured():
    class OnlyInTraining(Situation):
        def step(self, batch):
            return self.mse(batch) if self.training else None

    with pytest.warns(UserWarning, match="sharpness is not measured: override `SharpnessMonitor.loss`"):
        trainer, _ = fit(OnlyInTraining, SharpnessMonitor(samples=2, max_iterations=3))
    assert trainer.global_step == 18
