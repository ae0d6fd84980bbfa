"""The callbacks in a real Trainer: against the reference, and against plain loops."""

import copy
import pickle
from collections import UserDict
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import outside
import pytest
import pytorch_lightning as pl
import reference
import torch
from modules import (
    METHODS,
    OPTIMIZERS,
    SOME,
    TinyModule,
    adam,
    assert_near,
    assert_same,
    cross_entropy,
    fit,
    gradients,
    make_batches,
    make_data,
    make_loader,
    make_trainer,
    mlp,
    sgd,
    weights,
)
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_gr import SAM, Flooding, GradientRegularization, regularized_backward
from lightning_gr.callbacks.base import TwoPass

LEVEL = 1.09  # lies between the losses, see core/test_two_pass.py
EPOCHS = 3


def by_hand(method, windows, optimizer=None, *, net=None, strength=lambda step: 1.0, parts=1, level=None):
    """Train with ``method``, one step per window of micro-batches; steps with strength None are plain."""
    net = mlp() if net is None else net
    losses = [reference.loss_of(net, cross_entropy, window, parts, level) for window in windows]

    def gradient(step, loss, theta):
        factor = strength(step)
        return reference.plain(loss, theta) if factor is None else method.gradient(loss, theta, factor)

    return reference.train(net, losses, optimizer or reference.SGD(), gradient)


def windows_of(size, batches, epochs):
    """Return the accumulation windows of several epochs; the last one of each epoch may be shorter."""
    return [batches[i : i + size] for _ in range(epochs) for i in range(0, len(batches), size)]


def loop(module, method, batches, epochs=1):
    """Train in a plain loop with the functional form."""
    optimizer = module.configure_optimizers()
    for batch in list(batches) * epochs:

        def closure(batch=batch):
            optimizer.zero_grad()
            return regularized_backward(lambda: module.loss(module.net, batch), module.net, method.rule)

        optimizer.step(closure)
    return weights(module.net)


# --- every method


@pytest.mark.parametrize("level", [None, LEVEL])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_reference(name, optimizer, level):
    method, (build, reference_optimizer) = METHODS[name], OPTIMIZERS[optimizer]
    module, floods = TinyModule(optimizer=build), [] if level is None else [Flooding(level)]
    fit(module, method.callback(), *floods, max_epochs=EPOCHS)
    windows = windows_of(1, make_batches(), EPOCHS)
    assert_near(weights(module.net), by_hand(method, windows, reference_optimizer(), level=level))


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_functional_form_bit_for_bit(name):
    module = TinyModule(optimizer=adam)
    fit(module, METHODS[name].callback(), max_epochs=EPOCHS)
    assert_same(weights(module.net), loop(TinyModule(optimizer=adam), METHODS[name], make_batches(), EPOCHS))


def test_precision_64_true():
    module = TinyModule(mlp(dtype=torch.float32))
    start = mlp(dtype=torch.float32).double()
    fit(module, SAM(0.2), precision="64-true", max_epochs=EPOCHS)
    assert_near(weights(module.net), by_hand(METHODS["SAM"], windows_of(1, make_batches(), EPOCHS), net=start))


# --- which steps


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    ("schedule", "strengths"),
    [
        ({"start_step": 4}, [None, None, None, None, 1, 1, 1, 1, 1]),
        ({"interval": 3}, [1, None, None, 1, None, None, 1, None, None]),
        ({"interval": 3, "lazy": True}, [3, None, None, 3, None, None, 3, None, None]),
        ({"start_step": 1, "interval": 2}, [None, 1, None, 1, None, 1, None, 1, None]),
        ({"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"start_step": 2, "warmup_steps": 4}, [None, None, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ({"start_step": 2, "warmup_steps": 4, "interval": 2}, [None, None, 0, None, 0.5, None, 1, None, 1]),
    ],
)
def test_schedule(name, schedule, strengths):
    module = TinyModule()
    fit(module, METHODS[name].callback(**schedule), max_epochs=EPOCHS)
    windows = windows_of(1, make_batches(), EPOCHS)
    assert_near(weights(module.net), by_hand(METHODS[name], windows, strength=strengths.__getitem__))


def test_no_second_pass_at_strength_zero_and_outside_the_schedule():
    calls = outside.Record()
    counted = TinyModule(loss=lambda net, batch: calls.append(1) or cross_entropy(net, batch))
    fit(counted, GradientRegularization(0.1, start_step=3, warmup_steps=2, interval=2), max_epochs=EPOCHS)
    assert len(calls) == 9 + 2  # at steps 5 and 7, since the strength is 0 at step 3


@pytest.mark.parametrize(
    "callback", [GradientRegularization(0.0), SAM(0.0), SAM(0.1, start_step=100), SAM(0.1, warmup_steps=2, interval=50)]
)
def test_without_second_passes_training_is_bit_identical(callback):
    plain, module = TinyModule(optimizer=adam), TinyModule(optimizer=adam)
    fit(plain, max_epochs=EPOCHS)
    fit(module, callback, max_epochs=EPOCHS)
    assert_same(weights(module.net), weights(plain.net))


class Picky(SAM):
    """Regularizes steps 1 and 2 of three."""

    def should_regularize(self, step):
        self.asked = [*getattr(self, "asked", []), step]
        return step % 3 != 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_should_regularize_can_be_overridden_and_is_asked_once_per_optimizer_step(accumulate):
    module, callback = TinyModule(), Picky(0.2)
    fit(module, callback, max_epochs=EPOCHS, accumulate_grad_batches=accumulate)
    windows = windows_of(accumulate, make_batches(), EPOCHS)
    expected = by_hand(
        METHODS["SAM"], windows, parts=accumulate, strength=[None, 1, 1, None, 1, 1, None, 1, 1].__getitem__
    )
    assert_near(weights(module.net), expected)
    assert callback.asked == list(range(len(windows)))


# --- excluded parameters


class CleanGradients(pl.Callback):
    """Keeps the gradients of the first pass; must come before other callbacks."""

    def __init__(self):
        self.seen = []

    def on_after_backward(self, trainer, pl_module):
        self.seen.append(gradients(pl_module.net))


@pytest.mark.parametrize("name", METHODS)
def test_excluded_parameters_are_not_perturbed_and_keep_exactly_the_clean_gradient(name):
    visited, clean, biases = outside.Record(), CleanGradients(), ["0.bias", "2.bias"]
    module = TinyModule(loss=lambda net, batch: visited.append(weights(net)) or cross_entropy(net, batch))
    fit(module, clean, METHODS[name].callback(exclude=["*.bias"]), max_epochs=EPOCHS)
    passes = len(visited) // len(clean.seen)
    for step, (final, before) in enumerate(zip(module.gradients, clean.seen, strict=True)):
        thetas = visited[step * passes : (step + 1) * passes]
        for bias in biases:
            assert torch.equal(final[bias], before[bias])
            assert all(torch.equal(theta[bias], thetas[0][bias]) for theta in thetas)
        assert not torch.equal(final["0.weight"], before["0.weight"])

    losses = [reference.loss_of(mlp(), cross_entropy, window) for window in windows_of(1, make_batches(), EPOCHS)]
    method = reference.excluding(METHODS[name].gradient, biases)
    expected = reference.train(mlp(), losses, reference.SGD(), lambda step, loss, theta: method(loss, theta))
    assert_near(weights(module.net), expected)


# --- accumulation


@pytest.mark.parametrize("level", [None, LEVEL])
@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize("name", SOME)
def test_accumulation_with_a_short_last_window(name, accumulate, level):
    data, floods = {"count": 40, "batch_size": 8}, [] if level is None else [Flooding(level)]
    module = TinyModule()
    callbacks = [METHODS[name].callback(), *floods]
    fit(module, *callbacks, loader=make_loader(**data), max_epochs=2, accumulate_grad_batches=accumulate)
    windows = windows_of(accumulate, make_batches(**data), 2)
    assert_near(weights(module.net), by_hand(METHODS[name], windows, parts=accumulate, level=level))


@pytest.mark.parametrize("name", SOME)
def test_accumulation_equals_one_large_batch(name):
    small, large = TinyModule(), TinyModule()
    fit(small, METHODS[name].callback(), loader=make_loader(batch_size=4), max_epochs=2, accumulate_grad_batches=3)
    fit(large, METHODS[name].callback(), loader=make_loader(batch_size=12), max_epochs=2)
    assert_near(weights(small.net), weights(large.net), 1e-13)


def test_accumulation_that_changes_between_epochs():
    module = TinyModule()
    fit(module, SAM(0.2), GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=2)
    halves = [windows_of(1, make_batches(), 1), windows_of(2, make_batches(), 1)]
    losses = [
        reference.loss_of(mlp(), cross_entropy, window, parts)
        for parts, windows in enumerate(halves, start=1)
        for window in windows
    ]
    gradient = METHODS["SAM"].gradient
    expected = reference.train(mlp(), losses, reference.SGD(), lambda step, loss, theta: gradient(loss, theta))
    assert_near(weights(module.net), expected)


# --- arguments and results of training steps


class ReturnsDict(TinyModule):
    def training_step(self, batch, batch_idx):
        return {"batch_size": len(batch[1]), "loss": super().training_step(batch, batch_idx), "prediction": batch[0]}


class WithoutBatchIdx(TinyModule):
    def training_step(self, batch):
        return self.loss(self.net, batch)


class Pops(TinyModule):
    """Empties the dictionary that it gets as its batch."""

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, (batch["inner"].pop("x"), batch.pop("y")))


class Kwargs(TinyModule):
    def training_step(self, *args, **kwargs):
        return self.loss(self.net, args[0] if args else kwargs["batch"])


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor

    def __iter__(self):
        return iter((self.x, self.y))


@pytest.mark.parametrize("kind", [Pair, Record, UserDict])
@pytest.mark.parametrize("name", SOME)
def test_types_of_batches(name, kind):
    def loss(net, batch):
        return cross_entropy(net, (batch["x"], batch["y"]) if kind is UserDict else batch)

    module = TinyModule(loss=loss)
    loader = DataLoader([kind(**{"x": x, "y": y}) for x, y in make_batches()], batch_size=None, collate_fn=lambda b: b)
    fit(module, METHODS[name].callback(), loader=loader, max_epochs=EPOCHS)
    assert_near(weights(module.net), by_hand(METHODS[name], windows_of(1, make_batches(), EPOCHS)))


@pytest.mark.parametrize("kind", [ReturnsDict, WithoutBatchIdx, Pops, Kwargs])
@pytest.mark.parametrize("name", SOME)
def test_forms_of_training_steps(name, kind):
    module, loader = kind(), make_loader()
    if kind is Pops:
        # the step empties its batches, so each epoch needs new ones
        loader = DataLoader([{"inner": {"x": x}, "y": y} for x, y in make_batches() * EPOCHS], batch_size=None)
    fit(module, METHODS[name].callback(), loader=loader, max_epochs=1 if kind is Pops else EPOCHS)
    assert_near(weights(module.net), by_hand(METHODS[name], windows_of(1, make_batches(), EPOCHS)))


class Holder:
    """A batch that is not a container, as in graph libraries."""

    def __init__(self, x, y):
        self.x, self.y = x, y


def assigns(net, batch):
    batch.x = batch.x * 2
    return cross_entropy(net, (batch.x, batch.y))


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_training_steps_may_assign_to_attributes_of_their_batch(scheme):
    module, doubled = TinyModule(loss=assigns), [(2 * x, y) for x, y in make_batches()]
    loader = DataLoader([Holder(x, y) for x, y in make_batches()], batch_size=None, collate_fn=lambda b: b)
    fit(module, METHODS[f"{scheme} GR"].callback(), loader=loader)
    assert_near(weights(module.net), by_hand(METHODS[f"{scheme} GR"], windows_of(1, doubled, 1)))


class SometimesNone(TinyModule):
    """Skips the micro-batches in ``skipped``."""

    skipped = ()

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("skipped", [(0,), (1, 2), (4,)])
@pytest.mark.parametrize("name", SOME)
def test_batches_without_a_loss_are_skipped(name, skipped):
    module = SometimesNone()
    module.skipped = skipped
    fit(module, METHODS[name].callback(), loader=make_loader(40), max_epochs=2)
    kept = [[batch] for i, batch in enumerate(make_batches(40)) if i not in skipped]
    assert_near(weights(module.net), by_hand(METHODS[name], kept * 2))


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("skipped", [(1,), (2,), (0, 5)], ids=["middle", "end", "ends"])
@pytest.mark.parametrize("name", SOME)
def test_batches_without_a_loss_are_left_out_of_their_window(name, skipped):
    module = SometimesNone()
    module.skipped = skipped
    fit(module, METHODS[name].callback(), loader=make_loader(48), max_epochs=2, accumulate_grad_batches=3)
    indexed = windows_of(3, list(enumerate(make_batches(48))), 2)
    windows = [[batch for i, batch in window if i not in skipped] for window in indexed]
    assert_near(weights(module.net), by_hand(METHODS[name], windows, parts=3))


# --- loaders, loops and stopping


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        x, y = make_data(40)
        return iter(list(zip(x, y, strict=True)))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_iterable_datasets(accumulate):
    module, loader = TinyModule(), DataLoader(Stream(), batch_size=8)
    fit(module, SAM(0.2), loader=loader, max_epochs=2, accumulate_grad_batches=accumulate)
    windows = windows_of(accumulate, make_batches(40), 2)
    assert_near(weights(module.net), by_hand(METHODS["SAM"], windows, parts=accumulate))


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"limit_train_batches": 2, "max_epochs": 3}, [0, 1] * 3), ({"max_steps": 4, "max_epochs": -1}, [0, 1, 2, 0])],
)
def test_limits(limits, steps):
    module, batches = TinyModule(), make_batches()
    trainer = fit(module, SAM(0.2), **limits)
    assert trainer.global_step == len(steps) == len(module.gradients)
    assert_near(weights(module.net), by_hand(METHODS["SAM"], [[batches[i]] for i in steps]))


def test_limit_in_the_middle_of_a_window():
    module = TinyModule()
    fit(module, SAM(0.2), loader=make_loader(40), limit_train_batches=3, max_epochs=2, accumulate_grad_batches=2)
    windows = windows_of(2, make_batches(40)[:3], 2)
    assert_near(weights(module.net), by_hand(METHODS["SAM"], windows, parts=2))


def test_a_second_fit_continues_from_the_first():
    module, callback = TinyModule(), GradientRegularization(0.03, 0.1)
    fit(module, callback)
    trainer = fit(module, callback, max_epochs=2)
    windows, method = windows_of(1, make_batches(), 1), METHODS["forward GR"]
    between = mlp()
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(by_hand(method, windows).values()), between.parameters()
    )
    assert_near(weights(module.net), by_hand(method, windows * 2, net=between))
    # the same Trainer can continue as well, also with a new optimizer
    before = copy.deepcopy(module.net)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, make_loader())
    assert_near(weights(module.net), by_hand(method, windows, net=before))


def test_validation_in_between_changes_nothing():
    class Validates(TinyModule):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.loss(self.net, batch))

    module, trainer = Validates(), make_trainer(SAM(0.2), max_epochs=2, val_check_interval=1)
    trainer.fit(module, make_loader(), make_loader(16))
    trainer.validate(module, make_loader(16), verbose=False)
    assert_near(weights(module.net), by_hand(METHODS["SAM"], windows_of(1, make_batches(), 2)))


def test_clipping_sees_the_final_gradient():
    module, method = TinyModule(), METHODS["forward GR"]
    fit(module, method.callback(), gradient_clip_val=0.05, max_epochs=EPOCHS)
    losses = [reference.loss_of(mlp(), cross_entropy, window) for window in windows_of(1, make_batches(), EPOCHS)]

    def clipped(step, loss, theta):
        g = method.gradient(loss, theta)
        factor = min(1.0, 0.05 / (reference.norm(g) + 1e-6))  # like torch's clip_grad_norm_, which adds 1e-6
        return {name: factor * value for name, value in g.items()}

    assert_near(weights(module.net), reference.train(mlp(), losses, reference.SGD(), clipped))


# --- optimizers


def test_learning_rate_schedulers():
    def halving(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}

    class Halving(reference.SGD):
        def __init__(self):
            super().__init__()
            self.steps = count()

        def step(self, theta, g):
            self.lr = 0.1 * 0.5 ** (next(self.steps) // 2)
            return super().step(theta, g)

    module = TinyModule(scheduler=halving)
    fit(module, METHODS["forward GR"].callback(), max_epochs=EPOCHS)
    assert_near(weights(module.net), by_hand(METHODS["forward GR"], windows_of(1, make_batches(), EPOCHS), Halving()))


def param_groups(params):
    first, *rest = params
    return torch.optim.SGD([{"params": [first], "lr": 0.3}, {"params": rest}], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, fused=True),
        param_groups,
    ],
    ids=["AdamW", "LBFGS", "fused", "groups"],
)
@pytest.mark.parametrize("name", SOME)
def test_other_optimizers_equal_a_plain_loop_bit_for_bit(name, optimizer):
    module = TinyModule(optimizer=optimizer)
    fit(module, METHODS[name].callback(), max_epochs=2)
    plain = TinyModule(optimizer=optimizer)
    fit(plain, max_epochs=2)
    assert_same(weights(module.net), loop(TinyModule(optimizer=optimizer), METHODS[name], make_batches(), 2))
    assert not torch.equal(module.net[0].weight, plain.net[0].weight)


class Counts(nn.Module):
    """A network whose output depends on the number of calls."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.count += 1
        return self.net(x) * (1 + self.count / 10)


@pytest.mark.parametrize("name", SOME)
def test_each_evaluation_of_lbfgs_has_its_own_second_pass(name):
    modules = [TinyModule(Counts(), optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)) for _ in range(2)]
    fit(modules[0], METHODS[name].callback())
    assert_same(weights(modules[0].net), loop(modules[1], METHODS[name], make_batches()))
    assert modules[0].net.count == modules[1].net.count == 9


def test_without_an_optimizer_nothing_moves():
    module = TinyModule(optimizer=lambda params: None)
    with pytest.warns(UserWarning, match="no optimizer"):
        fit(module, SAM(0.2))
    assert_same(weights(module.net), weights(mlp()))


# --- networks


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


class Tied(nn.Module):
    """A network that uses one weight matrix twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (layer.double() for layer in (nn.Linear(5, 5), nn.Linear(5, 5), mlp()))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.last = kind(1, 4, num_layers=2, batch_first=True).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.last(self.rnn(x.unsqueeze(-1))[0][:, -1])


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(8, 8, dtype=torch.float32)[:-1], nn.Linear(8, 3).double()

    def forward(self, x):
        return self.head(self.body(x.float()).double())


def frozen():
    net = mlp(8, 8)
    net[2].requires_grad_(False)
    return net


NETS = {
    "frozen": frozen,
    "unused": Unused,
    "tied": Tied,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "two dtypes": TwoDtypes,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", SOME)
def test_networks(name, net, optimizer):
    build, reference_optimizer = OPTIMIZERS[optimizer]
    start = NETS[net]()
    module = TinyModule(copy.deepcopy(start), optimizer=build)
    fit(module, METHODS[name].callback(), max_epochs=2)
    trained = {n: p for n, p in weights(module.net).items() if dict(start.named_parameters())[n].requires_grad}
    expected = by_hand(METHODS[name], windows_of(1, make_batches(), 2), reference_optimizer(), net=start)
    assert_near(trained, expected, 1e-5 if net == "two dtypes" else 1e-10)
    idle = {"frozen": ["2.weight", "2.bias"], "unused": ["unused.weight", "unused.bias"]}.get(net, [])
    for n in idle:
        assert torch.equal(weights(module.net)[n], weights(start)[n])
        assert dict(module.net.named_parameters())[n].grad is None


@pytest.mark.parametrize("name", SOME)
def test_parameters_outside_the_optimizer_are_not_perturbed(name):
    class OnlyLast(TinyModule):
        def configure_optimizers(self):
            return sgd(self.net[2].parameters())

    visited = outside.Record()
    module = OnlyLast(loss=lambda net, batch: visited.append(weights(net)) or cross_entropy(net, batch))
    fit(module, METHODS[name].callback(), max_epochs=2)
    start = mlp()
    for n in ("0.weight", "0.bias"):
        assert all(torch.equal(theta[n], weights(start)[n]) for theta in visited)
    start[0].requires_grad_(False)
    expected = by_hand(METHODS[name], windows_of(1, make_batches(), 2), net=start)
    assert_near({n: weights(module.net)[n] for n in expected}, expected)


# --- lifetime of a callback


def test_fit_leaves_nothing_behind():
    callback, module = SAM(0.2), TinyModule()
    trainer = fit(module, callback)
    assert "training_step" not in vars(trainer.strategy)
    assert vars(callback).keys() - {"log", "log_dict"} == vars(SAM(0.2)).keys()  # set by Lightning
    assert len(callback._runs) == 0


def test_an_exception_in_the_second_pass_restores_the_weights_and_leaves_nothing_behind():
    calls, callback = outside.Counter(), SAM(0.5)

    def fails(net, batch):
        if calls() == 1:
            assert not torch.equal(net[0].weight, mlp()[0].weight)
            raise ArithmeticError("in the second pass")
        return cross_entropy(net, batch)

    module, trainer = TinyModule(loss=fails), make_trainer(callback)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, make_loader())
    assert_same(weights(module.net), weights(mlp()))
    assert "training_step" not in vars(trainer.strategy)
    assert all(run.recorder is None for run in callback._runs.values())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_callbacks_can_be_copied_while_they_run(clone):
    class Clones(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            self.clone = clone(trainer.callbacks[0])

    clones = Clones()
    fit(TinyModule(), GradientRegularization(0.03, 0.1, exclude=["*.bias"]), clones)
    original, again = TinyModule(), TinyModule()
    fit(original, GradientRegularization(0.03, 0.1, exclude=["*.bias"]))
    fit(again, clones.clone)
    assert_same(weights(again.net), weights(original.net))


@pytest.mark.parametrize("name", METHODS)
def test_the_rule_of_each_callback(name):
    callback = METHODS[name].callback()
    assert isinstance(callback, TwoPass)
    assert callback.rule == METHODS[name].rule
