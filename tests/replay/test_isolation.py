"""A second pass leaves no trace.

Most of these tests train with a learning rate of zero. A run with the callback then has the same weights throughout as
a run without it, so everything a user can see must be equal, bit for bit.
"""

import copy
import csv
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from modules import METHODS, TinyModule, assert_same, fit, make_loader, weights
from outside import Record
from torch import nn
from torch.nn.utils import parametrizations
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

from lightning_gr import SAM, GradientRegularization, in_second_pass
from lightning_gr.core.two_pass import NoLossError
from lightning_gr.replay import isolation
from lightning_gr.replay.isolation import RandomState, flagged, muted, noted_exceptions


def zero_lr_sgd(params):
    """An optimizer that does not change the weights."""
    return torch.optim.SGD(params, lr=0.0)


# --- random numbers


class Draws(TinyModule):
    """Draws from every generator in its training step."""

    def __init__(self, **options):
        super().__init__(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double(), **options)

    def training_step(self, batch, batch_idx):
        drawn = (torch.rand(()).item(), np.random.rand(), random.random())
        (SECOND if in_second_pass() else FIRST).append(drawn)
        return super().training_step(batch, batch_idx) * (1 + drawn[0] + drawn[1] + drawn[2])


FIRST, SECOND = [], []


def generators():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def draw_and_fit(*callbacks, **options):
    FIRST.clear()
    SECOND.clear()
    pl.seed_everything(1, verbose=False)
    module = Draws(optimizer=options.pop("optimizer", None) or (lambda p: torch.optim.SGD(p, lr=0.1)))
    loader = torch.utils.data.DataLoader(make_loader().dataset, batch_size=4, shuffle=True)
    fit(module, *callbacks, loader=loader, max_epochs=2, **options)
    return weights(module.net), generators(), list(FIRST), list(SECOND)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_random_numbers_are_replayed_and_then_continue(name, accumulate):
    _, plain_end, plain, _ = draw_and_fit(accumulate_grad_batches=accumulate)
    _, end, first, second = draw_and_fit(METHODS[name].callback(), accumulate_grad_batches=accumulate)
    assert first == plain
    assert end == plain_end
    passes = 2 if name.startswith("central") else 1
    windows = [first[i : i + accumulate] for i in range(0, len(first), accumulate)]
    assert second == [draw for window in windows for _ in range(passes) for draw in window]


@pytest.mark.parametrize(
    "callback",
    [
        GradientRegularization(gamma=0.0),
        SAM(rho=0.0),
        GradientRegularization(start_step=10**6),
        GradientRegularization(warmup_steps=10**6, start_step=11),
    ],
)
def test_without_second_passes_training_is_bit_identical(callback):
    without, with_it = draw_and_fit(), draw_and_fit(callback)
    assert_same(with_it[0], without[0])
    assert with_it[1:] == without[1:]
    assert with_it[3] == []


# --- modules


class Stateful(nn.Module):
    """Every kind of state that a layer may have."""

    def __init__(self):
        super().__init__()
        self.norm, self.average = nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=None)
        self.instance = nn.InstanceNorm1d(1, track_running_stats=True)
        self.spectral = parametrizations.spectral_norm(nn.Linear(5, 5))
        self.old_spectral = torch.nn.utils.spectral_norm(nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)
        self.register_buffer("queue", torch.zeros(6, 5))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("wide", torch.arange(5.0).expand(3, 5), persistent=False)
        self.calls, self.pointer, self.seen, self.by_kind = 0, 0, [], {"loss": [], "n": set()}
        self.hidden = torch.zeros(5)
        self.many = list(range(2000))

    def forward(self, x):
        x = self.instance(self.average(self.norm(x)).unsqueeze(1)).squeeze(1)
        x = self.old_spectral(self.spectral(x))
        self.queue[self.pointer] = x.detach()[0]
        self.pointer = (self.pointer + 1) % 6
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        self.hidden = 0.5 * self.hidden + x.detach()[0]
        self.calls += 1
        self.seen.append(x.detach().sum())
        self.many.append(self.calls)
        self.by_kind["loss"].append(self.calls)
        self.by_kind["n"].add(self.calls)
        return self.head(x + self.queue.mean() + self.mean + self.hidden)


def state_of(net):
    """Return the whole state as plain values."""
    own = (net.calls, net.pointer, [s.item() for s in net.seen], net.by_kind, net.hidden.tolist(), net.many)
    return {name: value.tolist() for name, value in net.state_dict().items()}, own


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_state_of_modules_is_the_same_as_without_the_callback(name, accumulate):
    states = []
    for callbacks in ([], [METHODS[name].callback()]):
        torch.manual_seed(0)
        module = TinyModule(Stateful().double(), optimizer=zero_lr_sgd)
        queue = module.net.queue
        fit(module, *callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
        assert module.net.queue is queue
        states.append(state_of(module.net))
    assert states[0] == states[1]


def test_second_pass_sees_the_function_of_the_first():
    first, second = Record(), Record()

    class Looks(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            (second if in_second_pass() else first).append(loss.item())
            return loss

    torch.manual_seed(0)
    # the step is too small to change the loss, so that any difference would be due to the buffers
    fit(Looks(Stateful().double()), GradientRegularization(1e-30, 1e-30), max_epochs=2)
    assert list(second) == pytest.approx(list(first), rel=1e-14)
    assert len(second) == 6


# --- metrics, logs and hooks


class Logs(TinyModule):
    """Logs in every way, with every kind of metric."""

    def __init__(self):
        super().__init__(optimizer=zero_lr_sgd)
        self.mean, self.kept, self.extremes = MeanMetric(), CatMetric(), MinMaxMetric(MeanMetric())
        common = {"num_classes": 3}
        kinds = [MulticlassPrecision(**common), MulticlassRecall(**common), MulticlassF1Score(**common)]
        self.several = MetricCollection(kinds)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"a": loss * 2, "b": batch_idx}, on_epoch=True)
        self.mean(loss.detach())
        self.kept.update(loss.detach())
        self.extremes.update(loss.detach())
        self.log("mean", self.mean, on_epoch=True)
        self.log_dict(self.several(self.net(x), y), on_epoch=True)
        return {"loss": loss, "extra": loss.detach() * 3}

    def on_train_epoch_end(self):
        RESULTS.append([value.item() for value in self.kept.value])
        RESULTS.append({k: v.item() for k, v in self.extremes.compute().items()})
        RESULTS.append({k: v.item() for k, v in self.several.compute().items()})
        RESULTS.append((self.mean._update_count, self.mean._forward_cache.item(), self.kept._update_count))


RESULTS = []


def logged(trainer):
    """Return what the user logged, without the callback's own keys."""
    return {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("gr/")}


def written(folder):
    """Return the columns that the user logged."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("gr/")} for row in csv.DictReader(file)]


class Watches(pl.Callback):
    """Records the calls of all hooks, and the outputs and logs of each batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        RESULTS.append({k: v.item() for k, v in outputs.items()})
        RESULTS.append(logged(trainer))


HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_")]
for _name in HOOKS:
    if _name not in vars(Watches):
        setattr(Watches, _name, lambda self, *args, _name=_name: RESULTS.append(_name))


class Hooked(Logs):
    """Records the calls of the module's hooks."""


for _name in [n for n in dir(pl.LightningModule) if n.startswith("on_") and "transfer" not in n]:
    if _name not in vars(Logs) and "gpu" not in _name:
        setattr(Hooked, _name, lambda self, *args, _name=_name: RESULTS.append(f"module {_name}"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_logs_metrics_outputs_and_hooks_are_the_same_as_without_the_callback(name, accumulate, tmp_path):
    seen = []
    for i, callbacks in enumerate(([], [METHODS[name].callback()])):
        RESULTS.clear()
        torch.manual_seed(0)
        logger = pl.loggers.CSVLogger(tmp_path, version=i)
        options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1, "logger": logger}
        trainer = fit(Hooked(), *callbacks, Watches(), max_epochs=2, **options)
        seen.append([*RESULTS, logged(trainer), written(tmp_path / "lightning_logs" / f"version_{i}")])
    assert len(seen[0]) > 80
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["log", "log_dict", "print"])
def test_a_method_shadowed_on_the_instance_is_muted_and_restored(name):
    """Such as by a wrapper that another library sets on the instance."""
    calls, module = Record(), TinyModule()

    def loss(net, batch):
        getattr(module, name)("x", 1.0)
        return torch.nn.functional.cross_entropy(net(batch[0]), batch[1])

    module.loss = loss
    wrapper = lambda *args: calls.append(in_second_pass())  # noqa: E731
    setattr(module, name, wrapper)
    fit(module, SAM(0.1))
    assert vars(module)[name] is wrapper
    assert calls == [False] * 3


def test_muting_restores_methods_after_an_exception():
    owner = nn.Module()
    owner.log = print
    with suppress(KeyboardInterrupt), muted([(owner, ("log", "log_dict")), (object(), ("log",))]):
        assert owner.log("shown") is owner.log_dict({}) is None
        assert owner.log is not print
        raise KeyboardInterrupt
    assert owner.log is print
    assert "log_dict" not in vars(owner)


def test_generators_of_accelerators_are_restored(monkeypatch):
    """Emulated, so that no such device is needed."""
    states = {("cuda", 1): "old", ("mps",): "old"}

    def key(device, given):
        assert given == (() if device.type == "mps" else (device,))  # Apple's functions take no device
        return (device.type, device.index) if given else (device.type,)

    def module_of(device):
        return SimpleNamespace(
            get_rng_state=lambda *given: states[key(device, given)],
            set_rng_state=lambda state, *given: states.update({key(device, given): state}),
        )

    monkeypatch.setattr(torch, "get_device_module", module_of)
    numbers = RandomState([torch.device("cuda:1"), torch.device("mps")])
    states.update(dict.fromkeys(states, "new"))
    numbers.restore()
    assert set(states.values()) == {"old"}


def flag_in_a_thread(prepare=int):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(prepare).result()
        return pool.submit(in_second_pass).result()


def evaluate():
    with flagged(second=False):
        pass


@pytest.mark.parametrize("python", [True, False])
def test_the_flag_holds_in_this_thread_and_in_autograd_threads(python, monkeypatch):
    """Autograd's threads, which are not Python threads, run hooks for whichever thread is in a second pass."""
    monkeypatch.setattr(isolation, "is_python_thread", lambda: python)
    assert not flag_in_a_thread()
    with flagged():
        assert in_second_pass()
        assert flag_in_a_thread() is not python
        assert not flag_in_a_thread(evaluate)
        with flagged():
            assert in_second_pass()
        assert in_second_pass()
        with flagged(second=False):  # a first pass within a second one
            assert in_second_pass()
        assert flag_in_a_thread() is not python
    assert not in_second_pass()
    assert not flag_in_a_thread()
    with suppress(KeyboardInterrupt), flagged():
        raise KeyboardInterrupt
    assert not in_second_pass()
    assert not flag_in_a_thread()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_exceptions_of_a_second_pass_have_a_note():
    with pytest.raises(ValueError, match="nan") as caught, noted_exceptions():
        raise ValueError("nan")
    (note,) = caught.value.__notes__
    assert "second pass" in note
    assert "`epsilon` or `rho`" in note
    with pytest.raises(NoLossError) as caught, noted_exceptions():  # users never see this one
        raise NoLossError
    assert not hasattr(caught.value, "__notes__")


class Keeps(Logs):
    """Compares its list state before and after the second pass."""

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        KEPT[in_second_pass()].append((self.kept.value, tuple(self.kept.value)))
        return output

    def on_before_optimizer_step(self, optimizer):
        (states, tensors), (states_again, tensors_again) = KEPT[False][-1], KEPT[True][-1]
        # the second pass has the same list with the same tensors, except for the last one, which it appended itself
        assert self.kept.value is states is states_again
        assert len(states) == len(tensors) == len(tensors_again) > 0
        assert all(now is then for now, then in zip(states, tensors, strict=True))
        assert all(now is then for now, then in zip(tensors_again[:-1], tensors[:-1], strict=True))
        assert tensors_again[-1] is not tensors[-1]


KEPT = {False: [], True: []}


def test_tensors_in_list_states_are_not_copied():
    for kept in KEPT.values():
        kept.clear()
    fit(Keeps(), SAM(0.1), max_epochs=2)
    assert len(KEPT[False]) == len(KEPT[True]) == 6


# --- gradients that are not finite, or zero


class Spoiled(TinyModule):
    """One entry of its gradient in the second step is not finite."""

    bad = float("nan")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.net[0].weight[0, 0] * self.bad if batch_idx == 1 else loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_that_are_not_finite_are_passed_on(name, bad):
    seen = []
    for callbacks in ([], [METHODS[name].callback()]):
        module = Spoiled(optimizer=zero_lr_sgd)
        module.bad = bad
        fit(module, *callbacks)
        seen.append(module.gradients)
    plain, regularized = seen
    assert not all(gradient.isfinite().all() for gradient in plain[1].values())
    for key in plain[1]:
        torch.testing.assert_close(regularized[1][key], plain[1][key], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(regularized[2]["0.weight"], plain[2]["0.weight"])


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_gradient_perturbs_nothing(name):
    module = TinyModule(loss=lambda net, batch: net(batch[0]).sum() * 0)
    before = weights(module.net)
    fit(module, METHODS[name].callback())
    assert_same(weights(module.net), before)


# --- copies during training


class Copies(pl.Callback):
    """Copies module and callback while both are in use."""

    def __init__(self):
        self.copies = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        method = trainer.callbacks[0]
        for duplicate in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
            self.copies.append((duplicate(pl_module), duplicate(method)))


class Picklable(TinyModule):
    def __init__(self):
        super().__init__()
        self.scheduler = None


def test_module_and_callback_can_be_copied_during_training():
    copies = Copies()
    module = Picklable()
    fit(module, SAM(0.2), copies)
    assert len(copies.copies) == 6
    for other, method in copies.copies:
        assert "log" not in vars(other)
        assert "training_step" not in vars(other)
        twin = copy.deepcopy(other)
        fit(other, method)
        fit(twin, SAM(0.2))
        assert_same(weights(other.net), weights(twin.net))


def gauss_state(keeps):
    np.random.seed(5)
    np.random.randn(2 if not keeps else 1)
    return np.random.get_state()


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("draw", [np.random.rand, np.random.randn, lambda: None, lambda: np.random.seed(0)])
def test_numpys_generator_is_restored_with_and_without_a_kept_number(keeps, draw):
    wanted = repr(gauss_state(keeps))
    for _ in range(2):
        state = RandomState()
        draw()
        state.restore()
        assert repr(np.random.get_state()) == wanted


def test_numpys_generator_of_another_kind_is_restored():
    before = np.random.mtrand._rand._bit_generator
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        state = RandomState()
        first = np.random.rand()
        state.restore()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(before)
    assert type(np.random.mtrand._rand._bit_generator) is np.random.MT19937


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize("drawn_again", [0, 1, 2])
def test_numpys_generator_is_restored_whatever_the_second_pass_draws(kept, drawn, drawn_again):
    """Normal numbers are drawn in pairs, and the generator keeps the second one outside of its key."""
    gauss_state(kept)
    start = RandomState()
    np.random.randn(drawn)
    wanted, after = repr(np.random.get_state()), RandomState()
    start.restore()
    np.random.randn(drawn_again)
    after.restore()
    assert repr(np.random.get_state()) == wanted
