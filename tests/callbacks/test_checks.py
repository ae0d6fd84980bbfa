"""Errors: one line that says what was given and what to do, raised before training starts."""

import re

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from modules import (
    FIRST_ORDER,
    METHODS,
    TinyModule,
    assert_near,
    assert_same,
    cross_entropy,
    fit,
    make_batches,
    make_data,
    make_trainer,
    mlp,
    weights,
)
from outside import Record
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from torch import nn
from torch.utils.data import DataLoader

from lightning_gr import SAM, Flooding, GradientRegularization, GRRule, SAMRule, in_second_pass
from lightning_gr.core.schedule import Schedule

nan, inf = float("nan"), float("inf")
not_numbers = ["0.1", None, True, [0.1], nan, inf, -inf, -0.1, torch.tensor(0.1)]
not_counts = [-1, 1.0, "1", None, True, nan]
not_bools = ["false", 0, 1, None]
not_patterns = ["*.bias", 1, None, [1], ["*.bias", None], [["*.bias"]]]


# --- values: in __init__

VALUES = [
    *[
        (kind, "gamma", value, "a non-negative float")
        for kind in (GradientRegularization, GRRule)
        for value in not_numbers
    ],
    *[
        (kind, "epsilon", value, "a positive float")
        for kind in (GradientRegularization, GRRule)
        for value in [*not_numbers, 0, 0.0, -0.0]
    ],
    *[
        (kind, "scheme", value, "one of 'forward', 'backward', 'central', 'exact'")
        for kind in (GradientRegularization, GRRule)
        for value in ["Forward", "", None, 1, ["forward"]]
    ],
    *[(kind, "normalize", value, "True or False") for kind in (GradientRegularization, GRRule) for value in not_bools],
    *[(kind, "rho", value, "a non-negative float") for kind in (SAM, SAMRule) for value in not_numbers],
    *[(kind, "adaptive", value, "True or False") for kind in (SAM, SAMRule) for value in not_bools],
    *[(kind, "eta", value, "a non-negative float") for kind in (SAM, SAMRule) for value in not_numbers],
    *[(kind, "eta", 0.01, "0 without `adaptive=True`") for kind in (SAM, SAMRule)],
    *[(Flooding, "level", value, "a non-negative float") for value in not_numbers],
    *[
        (kind, name, value, "an integer of at least 0")
        for kind in (SAM, GradientRegularization, Schedule)
        for name in ("start_step", "warmup_steps")
        for value in not_counts
    ],
    *[
        (kind, "interval", value, "an integer of at least 1")
        for kind in (SAM, GradientRegularization, Schedule)
        for value in [*not_counts, 0]
    ],
    *[
        (kind, "lazy", value, "True or False")
        for kind in (GradientRegularization, SAM, Schedule)
        for value in not_bools
    ],
    *[(kind, "exclude", value, "a list of") for kind in (SAM, GradientRegularization) for value in not_patterns],
    *[
        (kind, "accumulation", value, "one of 'window', 'micro_batch'")
        for kind in (SAM, GradientRegularization)
        for value in ["micro-batch", "", None, True, ["window"]]
    ],
    *[(kind, "ascent_sync", value, "True or False") for kind in (SAM, GradientRegularization) for value in not_bools],
]


@pytest.mark.parametrize(("kind", "name", "value", "allowed"), VALUES)
def test_values(kind, name, value, allowed):
    with pytest.raises(ValueError, match="Expected argument") as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert re.fullmatch(rf"Expected argument `{name}` to be {re.escape(allowed)}.* but got .+", message)
    assert message.endswith(f"but got {value!r}")


@pytest.mark.parametrize("kind", [GradientRegularization, SAM, Flooding])
def test_a_typo_is_refused(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        kind(gama=0.1)


def test_flooding_needs_a_level():
    with pytest.raises(TypeError, match="level"):
        Flooding()


@pytest.mark.parametrize("exclude", [["*.bias"], ("*.bias",), {"*.bias"}, iter(["*.bias"])])
def test_exclude_takes_any_collection_of_patterns(exclude):
    assert SAM(exclude=exclude).exclude == ("*.bias",)


def test_integers_are_numbers():
    assert GradientRegularization(gamma=1, epsilon=2).rule == GRRule(1.0, 2.0)
    assert SAM(rho=1).rule == SAMRule(1.0)
    assert Flooding(1).level == 1.0


# --- context: at the start of fit


def refused(module, *callbacks, error=MisconfigurationException, loader=None, **kwargs):
    """Check that training is refused before the first training step, and return the message."""
    started = []
    original = module.training_step
    module.on_train_batch_start = lambda batch, batch_idx: started.append(batch_idx)
    before = weights(module)
    with pytest.raises(error) as caught:
        fit(module, *callbacks, loader=loader, **kwargs)
    assert started == []
    assert module.training_step == original
    assert_same(weights(module), before)
    message = str(caught.value)
    assert "\n" not in message
    return message


class MySAM(SAM):
    """A custom subclass."""


@pytest.mark.parametrize(
    ("callbacks", "names"),
    [
        ([SAM(), GradientRegularization()], "SAM and GradientRegularization"),
        ([GradientRegularization(), MySAM()], "GradientRegularization and MySAM"),
        ([SAM(), GradientRegularization(), MySAM()], "SAM and GradientRegularization and MySAM"),
        ([Flooding(0.1), MySAM(), SAM()], "MySAM and SAM"),
    ],
)
def test_two_methods(callbacks, names):
    message = refused(TinyModule(), *callbacks)
    assert message == f"Expected at most one method besides flooding in a Trainer but got {names}: remove all but one"


@pytest.mark.parametrize("kind", [SAM, GradientRegularization])
def test_the_same_method_twice_is_refused_by_lightning_itself(kind):
    """The Trainer's constructor raises, since both callbacks would have the same key in a checkpoint."""
    with pytest.raises(RuntimeError, match=f"more than one stateful callback of type `{kind.__name__}`"):
        make_trainer(kind(), kind())


def test_two_flood_levels():
    message = refused(TinyModule(), Flooding(0.1), SAM(), Flooding(0.2))
    assert message == "Expected at most one flood level in a Trainer but got Flooding and Flooding: remove all but one"


def test_callbacks_of_the_module_count_too():
    class Configures(TinyModule):
        def configure_callbacks(self):
            return [SAM()]

    assert "GradientRegularization and SAM" in refused(Configures(), GradientRegularization())


class Manual(TinyModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("callback", [SAM(), GradientRegularization(), Flooding(0.1)])
def test_manual_optimization(callback):
    message = refused(Manual(), callback)
    assert message.startswith("Manual uses manual optimization")
    assert "`automatic_optimization = True`" in message
    assert "`class Manual(GradientRegularizationMixin, ...)`" in message


class TakesIterator(TinyModule):
    def training_step(self, dataloader_iter):
        raise AssertionError("training has started")


dataloader_iter = pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")


@dataloader_iter
@pytest.mark.parametrize("callback", [SAM(), GradientRegularization()])
def test_steps_that_take_the_iterator(callback):
    message = refused(TakesIterator(), callback)
    assert "`training_step(self, dataloader_iter)`" in message
    assert message.endswith("let it take `batch` instead")


@dataloader_iter
def test_flooding_alone_works_with_steps_that_take_the_iterator():
    class Takes(TinyModule):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(self.net, batch)

    module, expected = Takes(), TinyModule()
    fit(module, Flooding(100.0))
    fit(expected, Flooding(100.0))
    assert_same(weights(module.net), weights(expected.net))


@pytest.mark.parametrize("callback", [SAM(exclude=["*.bias", "bias"]), GradientRegularization(exclude=["bias"])])
def test_unknown_patterns(callback):
    message = refused(TinyModule(), callback, error=ValueError)
    assert "`exclude`" in message
    assert "'bias' matches none of net.0.weight, net.0.bias, net.2.weight, net.2.bias;" in message
    assert "'*.bias'" in message


def tokens():
    x, y = make_data()
    return DataLoader(list(zip((x.abs() * 3).long().clamp(max=9), y, strict=True)), batch_size=8)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embeddings(kind):
    net = nn.Sequential(kind(10, 3, sparse=True), nn.Flatten())
    message = refused(TinyModule(net), SAM(), loader=tokens())
    assert message.startswith("`net.0.weight` gets sparse gradients")
    assert "`sparse=False`" in message
    assert "`exclude=['net.0.weight']`" in message


@pytest.mark.parametrize("scheme", ["forward", "central", "exact"])
def test_the_suggested_solution_for_sparse_embeddings_works(scheme):
    trained = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.EmbeddingBag(10, 3, sparse=sparse), nn.Linear(3, 3)).double()
        module = TinyModule(net, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        fit(module, GradientRegularization(0.1, 0.1, scheme=scheme, exclude=["net.0.weight"]), loader=tokens())
        trained.append(weights(net))
    assert_near(*trained, 1e-13)


REFUSED_STRATEGIES = [DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy]


def with_strategy(monkeypatch, strategy, *callbacks):
    """Create a Trainer with this strategy, even if the strategy's requirements are not installed."""
    trainer = make_trainer(*callbacks)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy.__new__(strategy))
    assert type(trainer.strategy) is strategy
    return trainer


@pytest.mark.parametrize("callback", [SAM, GradientRegularization])
@pytest.mark.parametrize("strategy", REFUSED_STRATEGIES)
def test_strategies_that_cannot_work(monkeypatch, strategy, callback):
    # uses the real classes: XLAStrategy is a subclass of DDPStrategy, but must not be accepted as one
    method = callback()
    trainer = with_strategy(monkeypatch, strategy, method)
    with pytest.raises(MisconfigurationException) as caught:
        method.setup(trainer, TinyModule(), "fit")
    message = str(caught.value)
    assert strategy.__name__ in message
    assert "use `Trainer(strategy='auto')`, `'ddp'`, `'fsdp'` or `ModelParallelStrategy()`" in message
    assert "\n" not in message


class MyStrategy(SingleDeviceStrategy):
    """A custom subclass."""


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, MyStrategy])
def test_strategies_that_work(monkeypatch, strategy):
    method = SAM()
    method.setup(with_strategy(monkeypatch, strategy, method), TinyModule(), "fit")


def test_a_strategy_is_refused_by_fit():
    stub = type("SingleDeviceXLAStrategy", (SingleDeviceStrategy,), {})  # the real one's name and base class
    message = refused(TinyModule(), SAM(), strategy=stub(device=torch.device("cpu")))
    assert "does not work with SingleDeviceXLAStrategy" in message


@pytest.mark.parametrize("callback", [SAM(exclude=["unknown"]), Flooding(0.1)])
def test_nothing_is_checked_without_training(callback):
    class Validates(Manual):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.loss(self.net, batch))

    (result,) = make_trainer(callback).validate(
        Validates(), DataLoader(make_batches(8), batch_size=None), verbose=False
    )
    assert result["loss"] == cross_entropy(mlp(), make_batches(8)[0]).item()


def test_a_frozen_module_fails_as_without_the_callback():
    def message(*callbacks):
        module = TinyModule(mlp().requires_grad_(False))
        with pytest.raises(RuntimeError) as caught:
            fit(module, *callbacks)
        return str(caught.value)

    assert message(SAM()) == message()


# --- at the first step


def writes_in_place(net, batch):
    x, y = batch
    return nn.functional.cross_entropy(net(x.mul_(2.0)), y)


@pytest.mark.parametrize("scheme", ["forward", "central", "exact"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_changed_in_place(scheme, accumulate):
    module = TinyModule(loss=writes_in_place)
    with pytest.raises(RuntimeError, match="changed a tensor of its batch in place") as caught:
        fit(module, GradientRegularization(scheme=scheme), accumulate_grad_batches=accumulate)
    assert "`x = batch['x'].clone()`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert module.gradients == []
    assert_same(weights(module.net), weights(mlp()))


def test_a_tensor_in_an_attribute_of_a_batch_that_is_changed_in_place():
    class Holder:
        def __init__(self, x, y):
            self.x, self.y = x, y

    module = TinyModule(loss=lambda net, batch: writes_in_place(net, (batch.x, batch.y)))
    loader = DataLoader([Holder(x, y) for x, y in make_batches()], batch_size=None, collate_fn=lambda batch: batch)
    with pytest.raises(RuntimeError, match="changed a tensor of its batch in place"):
        fit(module, SAM(), loader=loader)


def test_a_batch_may_be_changed_in_place_without_a_second_pass():
    modules = [TinyModule(loss=writes_in_place) for _ in range(2)]
    fit(modules[0], Flooding(0.1), SAM(start_step=100))
    fit(modules[1], Flooding(0.1))
    assert_same(weights(modules[0].net), weights(modules[1].net))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_second_pass_without_a_loss_leaves_the_clean_gradient(name):
    """Such as when a step returns None for a loss that is not finite, which may happen at displaced weights only."""

    class Clean(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not in_second_pass() and batch_idx == len(starts):
                starts.append(weights(self.net))
            moved = any(not torch.equal(p, starts[-1][n]) for n, p in self.net.named_parameters())
            return None if moved else loss

    starts, module, plain = Record(), Clean(), TinyModule()
    callback = METHODS[name].callback()
    with pytest.warns(UserWarning, match="returned None in a second pass") as caught:
        fit(module, callback)
    assert sum("second pass" in str(warning.message) for warning in caught) == 1  # instead of once per step
    assert len(starts) == 3
    fit(plain)
    assert_near(weights(module.net), weights(plain.net), 1e-14)
    assert (callback.report.regularized, callback.report.steps) == (0, 3)
