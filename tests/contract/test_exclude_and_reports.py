"""The contract for ``exclude`` and for the numbers in reports."""

import pytest
import torch
from contract import Batches, Situation, gradients, make_trainer, report, seed, train
from torch import nn

from lightning_gr import SAM, GradientRegularization, GradientRegularizationMixin, GRRule, SAMRule


class Plain(Situation):
    step = Situation.mse


class Grows(Situation):
    """Adds a layer at the start of the epoch, as a finetuning callback does."""

    forms = ("automatic", "accumulation")

    def prepare(self):
        self.first = nn.Linear(3, 3).double()
        self.first.bias.data += 0.5

    def on_train_epoch_start(self):
        if not hasattr(self, "late"):
            self.late = nn.Linear(2, 2).double()
            self.trainer.optimizers[0].add_param_group({"params": list(self.late.parameters())})

    def step(self, batch):
        return (self.late(self.net(self.first(batch[0]))) - batch[1]).square().mean()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_exclude_holds_for_layers_that_are_added_later(accumulate):
    seen = {}
    for name, callbacks in {"plain": [], "fgr": [GradientRegularization(0.2, 0.5, exclude=["*.bias"])]}.items():
        seed()
        module = Grows()
        seed()
        batches, found = module.make_batches(), []
        module.on_before_optimizer_step = lambda optimizer, m=module, f=found: f.append(gradients(m))
        make_trainer(*callbacks, accumulate_grad_batches=accumulate).fit(module, Batches(batches))
        seen[name] = found
    for plain, regularized in zip(seen["plain"], seen["fgr"], strict=True):
        assert len(plain) == 6
        for key, value in plain.items():
            assert torch.equal(value, regularized[key]) == key.endswith("bias"), key


@pytest.mark.parametrize("rule", ["trainer", GRRule(0.2, 0.5), SAMRule(0.3)])
def test_exclude_holds_for_rules_of_the_mixin(rule):
    class Chooses(GradientRegularizationMixin, Plain):
        def training_step(self, batch, batch_idx):
            self.regularized_step(self.optimizers(), lambda: self.evaluate(batch), rule=rule)

    plain = train(Plain, "mixin").gradients
    seed()
    module, found = Chooses(), []
    module.automatic_optimization = False
    seed()
    batches = module.make_batches()
    module.on_before_optimizer_step = lambda optimizer: found.append(gradients(module))
    make_trainer(GradientRegularization(0.1, 0.4, exclude=["*.bias"])).fit(module, Batches(batches))
    for clean, regularized in zip(plain, found, strict=True):
        assert torch.equal(clean["net.bias"], regularized["net.bias"])
        assert not torch.equal(clean["net.weight"], regularized["net.weight"])


# --- reports


def test_the_report_of_the_mixin_counts_steps_and_not_calls():
    class Twice(GradientRegularizationMixin, Plain):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for _ in range(2):
                self.regularized_backward(lambda: self.evaluate(batch), optimizer)
            optimizer.step()

    module, callback = Twice(), SAM(0.1)
    module.automatic_optimization = False
    make_trainer(callback).fit(module, Batches(module.make_batches()))
    assert report(callback) == (9, 9)


def test_the_report_of_the_mixin_counts_accumulated_steps():
    class Accumulates(GradientRegularizationMixin, Plain):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            if batch_idx % 3 == 0:
                optimizer.zero_grad()
            self.regularized_backward(lambda: self.evaluate(batch), optimizer)
            if batch_idx % 3 == 2:
                optimizer.step()

    module, callback = Accumulates(), SAM(0.1, interval=2)
    module.automatic_optimization = False
    make_trainer(callback).fit(module, Batches(module.make_batches()))
    assert report(callback) == (2, 3)
