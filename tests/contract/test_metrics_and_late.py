"""The contract for torchmetrics in any place, and for modules and metrics that are created late, in any hook."""

import torch
from contract import LIGHTNING, Situation, contract, witness
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MetricTracker, MinMaxMetric, SumMetric
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
from torchmetrics.wrappers import Running


class Measured(Situation):
    """Updates metrics with the loss."""

    def metrics(self):
        raise NotImplementedError

    def step(self, batch):
        loss = self.mse(batch)
        for metric in self.metrics():
            if not isinstance(metric, CatMetric):  # a second pass may find an empty list instead of a long one
                witness(metric.update_count)
            metric(loss.detach().float())
        return loss


class InDict(Measured):
    def prepare(self):
        self.by_name = {"train": MeanMetric(), "deep": {"sum": SumMetric()}}

    def metrics(self):
        return [self.by_name["train"], self.by_name["deep"]["sum"]]


class InList(Measured):
    """A metric with a list state, and a wrapped metric."""

    def prepare(self):
        self.many = [CatMetric(), MinMaxMetric(MeanMetric())]

    def metrics(self):
        return self.many[:1]

    def step(self, batch):
        self.many[1].update(self.mse(batch).detach().float())
        return super().step(batch)


class InObject(Measured):
    class Tracker:
        def __init__(self):
            self.running, self.best = Running(SumMetric(), 3), float("inf")

    def prepare(self):
        self.tracker = self.Tracker()

    def metrics(self):
        return []

    def step(self, batch):
        loss = self.mse(batch)
        self.tracker.running.update(loss.detach().float())
        self.tracker.best = min(self.tracker.best, float(loss.detach()))
        witness(1)
        return loss


class Attribute(Measured):
    """Metrics as attributes of the module, as intended."""

    def prepare(self):
        self.mean, self.kept = MeanMetric(), CatMetric()

    def metrics(self):
        return [self.mean, self.kept]


class Collection(Situation):
    """Collections, one of them in a plain list, which share state in compute groups from the second update on."""

    def prepare(self):
        self.hidden = [MetricCollection([MeanSquaredError(), MeanAbsoluteError()])]
        self.shown = MetricCollection({"a": MeanSquaredError(), "b": MeanSquaredError()})

    def step(self, batch):
        found = self.net(batch[0]).detach().float()
        witness(1)
        for collection in (self.hidden[0], self.shown):
            collection.update(found, batch[1].float())
        return self.mse(batch)


class Logged(Situation):
    """One metric is logged by ``self.log``, another one is kept in a dictionary."""

    forms, has_oracle = LIGHTNING, False

    def prepare(self):
        self.own = {"loss": MeanMetric()}
        self.mean = MeanMetric()

    def step(self, batch):
        loss = self.mse(batch)
        self.own["loss"].update(loss.detach().float())
        self.mean(loss.detach().float())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("raw", loss, on_step=True, on_epoch=True)
        return loss


# --- created late


class Late(Situation):
    forms = LIGHTNING


class Tracked(Late):
    """The documented use of MetricTracker: ``increment`` at the start of each epoch."""

    def prepare(self):
        self.tracker = MetricTracker(MetricCollection([MeanSquaredError(), MeanAbsoluteError()]))

    def on_train_epoch_start(self):
        self.tracker.increment()

    def step(self, batch):
        witness(len(self.tracker))
        self.tracker.update(self.net(batch[0]).detach().float(), batch[1].float())
        return self.mse(batch)


class NormOfTheEpoch(Late):
    def on_train_epoch_start(self):
        self.norm = nn.BatchNorm1d(3, affine=False).double()

    def step(self, batch):
        witness(self.norm.running_mean)
        return self.mse((self.norm(batch[0]), batch[1]))


class MetricOfTheBatch(Late):
    """A new metric for each batch, kept in a dictionary."""

    def prepare(self):
        self.found = {}

    def on_train_batch_start(self, batch, batch_idx):
        self.found[batch_idx] = MeanMetric()
        self.now = batch_idx

    def step(self, batch):
        loss = self.mse(batch)
        witness(self.found[self.now].update_count)
        self.found[self.now].update(loss.detach().float())
        return loss


class MadeInStep(Situation):
    """A metric, a BatchNorm and a buffer, created in the first step for the shape of the data."""

    def prepare(self):
        self.norm = None

    def step(self, batch):
        witness(self.norm is None)
        if self.norm is None:
            self.norm = nn.BatchNorm1d(batch[0].shape[1], affine=False).double()
            self.mean = MeanMetric()
            self.register_buffer("total", torch.zeros(2).double())
        witness(self.norm.running_mean)
        self.total += self.net(batch[0]).detach().mean(0)
        loss = self.mse((self.norm(batch[0]), batch[1]))
        self.mean.update(loss.detach().float())
        return loss


class MadeInFifthStep(Situation):
    """Modules are added between two learning steps."""

    def prepare(self):
        self.calls, self.norms = 0, nn.ModuleList()

    def step(self, batch):
        self.calls += 1
        if self.calls == 5:
            self.norms.append(nn.BatchNorm1d(3, affine=False).double())
        x = batch[0]
        for norm in self.norms:
            witness(norm.running_var)
            x = norm(x)
        return self.mse((x, batch[1]))


class MadeInLaterSteps(Situation):
    """Modules, metrics, and large buffers and lists, created in steps that mostly are not learning steps."""

    def prepare(self):
        self.calls, self.meters = 0, {}

    def step(self, batch):
        self.calls += 1
        if self.calls in (3, 6, 7):
            self.add_module(f"norm{self.calls}", nn.BatchNorm1d(3, affine=False).double())
            self.register_buffer(f"table{self.calls}", torch.zeros(3000).double())
            setattr(self, f"list{self.calls}", [torch.zeros(3000)])
            self.meters[self.calls] = MeanMetric()
        x = batch[0]
        for made in self.meters:
            x = getattr(self, f"norm{made}")(x)
            witness(getattr(self, f"norm{made}").running_mean)
            witness(self.meters[made].update_count)
            getattr(self, f"table{made}").add_(1)
            getattr(self, f"list{made}")[0].data.add_(1)
            x = x + getattr(self, f"table{made}")[:3] + getattr(self, f"list{made}")[0][:3]
            self.meters[made].update(x.detach().mean().float())
        return self.mse((x, batch[1]))


class FilledBuffer(Situation):
    """``register_buffer("run", None)``, which the step fills."""

    def prepare(self):
        self.register_buffer("run", None)

    def step(self, batch):
        mean = self.net(batch[0]).detach().mean(0)
        witness(0.0 if self.run is None else self.run)
        self.run = mean if self.run is None else 0.9 * self.run + 0.1 * mean
        return self.mse(batch) * (1 + self.run.square().sum())


class Temperature(Late):
    """Set by a hook for each micro-batch, so each second evaluation must start from its own value."""

    def on_train_batch_start(self, batch, batch_idx):
        self.temperature = 10.0 * (batch_idx + 1)
        self.left = [batch_idx]

    def step(self, batch):
        witness(self.temperature)
        self.temperature += self.left.pop()
        return self.mse(batch) * (1 + self.temperature / 100)


test_leaves_no_trace, test_gradient = contract(
    InDict,
    InList,
    InObject,
    Attribute,
    Collection,
    Logged,
    Tracked,
    NormOfTheEpoch,
    MetricOfTheBatch,
    MadeInStep,
    MadeInFifthStep,
    MadeInLaterSteps,
    FilledBuffer,
    Temperature,
)
