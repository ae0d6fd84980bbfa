"""The contract for optimizers and callbacks that bypass the second pass, which must not fail silently."""

import functools
import warnings

import pytest
import pytorch_lightning as pl
import torch
from contract import (
    Batches,
    Situation,
    as_dict,
    build,
    check_gradient,
    check_no_trace,
    make_trainer,
    refused,
    report,
    same,
    seed,
    train,
)
from lightning_fabric.utilities.exceptions import MisconfigurationException
from oracle import FGR, HUGE, by_hand, sam
from pytorch_optimizer import AdaHessian, SophiaH
from torch import nn

from lightning_gr import (
    SAM,
    Flooding,
    GradientNormMonitor,
    GradientRegularization,
    GradientRegularizationMixin,
    SAMRule,
    SharpnessMonitor,
    regularized_backward,
)
from lightning_gr.callbacks.base import TwoPass

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True", "ignore:.torch.jit.\\w+. is deprecated"
)


class Plain(Situation):
    step = Situation.mse


# --- the graph of the gradient


class SecondOrder(Situation):
    step = Situation.mse
    optimizer = AdaHessian

    def backward(self, loss):
        loss.backward(create_graph=True)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


class Sophia(SecondOrder):
    optimizer = SophiaH


@pytest.mark.parametrize("callback", [SAM(0.1), GradientRegularization(), GradientRegularization(scheme="exact")])
@pytest.mark.parametrize("kind", [SecondOrder, Sophia])
def test_backward_with_create_graph_is_refused(kind, callback):
    seed()
    module = kind()
    with refused("create_graph"):
        make_trainer(callback).fit(module, Batches(module.make_batches()))


@pytest.mark.parametrize("kind", [SecondOrder, Sophia])
def test_backward_with_create_graph_works_without_a_second_pass(kind):
    seed()
    module = kind()
    make_trainer(SAM(0.1, start_step=100)).fit(module, Batches(module.make_batches()))
    assert module.trainer.global_step == 9


def test_backward_with_create_graph_is_refused_in_the_functional_form():
    net = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    with refused("create_graph"):
        regularized_backward(
            lambda: net(x).square().mean(), net, SAMRule(0.1), backward=lambda loss: loss.backward(create_graph=True)
        )


# --- optimizers in backward


class InBackward(Situation):
    """Updates each parameter as soon as its gradient is complete, and then drops the gradient."""

    step = Situation.mse

    def prepare(self):
        self.inner = {param: torch.optim.SGD([param], lr=0.1) for param in self.net.parameters()}

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(self.advance)

    def advance(self, param):
        self.inner[param].step()
        self.inner[param].zero_grad()


class Fused(InBackward):
    """Like a custom kernel such as LOMO's: version counters do not change, and gradients are dropped as they arrive."""

    def hook(self):
        for param in self.net.parameters():
            param.register_hook(
                lambda grad, param=param: param.data.add_(grad, alpha=-0.1).new_zeros(()).item() or None
            )
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


class KeepsGradients(InBackward):
    """Updates parameters but keeps their gradients, so that their norm can be logged."""

    def hook(self):
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(lambda p: p.data.add_(p.grad, alpha=-0.1))


class ByTorch(Situation):
    """torch's own helper."""

    step = Situation.mse

    def hook(self):
        from torch.distributed.optim import _apply_optimizer_in_backward

        _apply_optimizer_in_backward(torch.optim.SGD, self.net.parameters(), {"lr": 0.1})
        for param in self.net.parameters():
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


@pytest.mark.parametrize("form", ["automatic", "accumulation", "mixin", "functional"])
@pytest.mark.parametrize("kind", [InBackward, Fused, KeepsGradients, ByTorch])
def test_an_optimizer_in_backward_is_refused(kind, form):
    if kind is ByTorch and form != "automatic":
        pytest.skip("the same as InBackward in other forms")
    with refused("backward|hook"):
        train(kind, form, sam(0.1))


class WithoutGradients(Situation):
    """Some losses depend on no parameter, as in detectors for batches without objects."""

    none = frozenset({1, 2, 5})

    def prepare(self):
        self.calls = 0

    def step(self, batch):
        index, self.calls = self.calls, self.calls + 1
        return torch.zeros((), requires_grad=True) if index in self.none else self.mse(batch)


class NeverGradients(WithoutGradients):
    none = frozenset(range(9))


@pytest.mark.parametrize(("form", "expected"), [("automatic", (6, 9)), ("accumulation", (3, 3)), ("mixin", (6, 9))])
def test_a_loss_without_parameters_is_as_in_plain_training(form, expected):
    plain, found = train(WithoutGradients, form), train(WithoutGradients, form, HUGE)
    same("what is left", found.state, plain.state)
    assert [bool(g) for g in found.gradients] == [bool(g) for g in plain.gradients]
    assert report(found.trainer.callbacks[0]) == expected


@pytest.mark.parametrize("form", ["automatic", "accumulation", "mixin"])
def test_warns_if_no_step_could_be_regularized(form):
    with pytest.warns(UserWarning, match="SAM regularized no optimizer step, although [39] were due"):
        train(NeverGradients, form, sam(0.1))


# --- callbacks that are bypassed


def is_one_line(error, word):
    assert word in str(error)
    assert "\n" not in str(error)


class Forgets(SAM):
    """Overrides a hook without ``super()``."""

    def on_train_start(self, trainer, pl_module):
        self.started = True


class ForgetsBatch(SAM):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch_idx = batch_idx


class ForgetsBackward(SAM):
    def on_after_backward(self, trainer, pl_module):
        self.seen = True


@pytest.mark.parametrize("kind", [Forgets, ForgetsBatch, ForgetsBackward])
def test_a_hook_overridden_without_super_is_handled_or_refused(kind):
    """Training is either regularized, refused, or warned about with a report of no steps, but never silently plain."""
    expected = by_hand(Plain, "automatic", sam(0.3), 0.05)
    module = build(Plain, "automatic", 0.05)
    seed()
    batches = module.make_batches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            callback = kind(0.3)
            make_trainer(callback).fit(module, Batches(batches))
        except MisconfigurationException as error:
            is_one_line(error, "super")
            return
    if any("super" in str(warning.message) for warning in caught):
        assert report(callback)[0] == 0
        return
    same("weights", as_dict(dict(module.state_dict())), as_dict(dict(expected.module.state_dict())), 1e-9)


OURS = {
    kind: [name for name in vars(base) if hasattr(pl.Callback, name) and not name.startswith("__")]
    for kind, base in {
        SAM: TwoPass,
        GradientRegularization: TwoPass,
        Flooding: Flooding,
        GradientNormMonitor: GradientNormMonitor,
        SharpnessMonitor: SharpnessMonitor,
    }.items()
}


@pytest.mark.parametrize(("kind", "hook"), [(kind, hook) for kind, hooks in OURS.items() for hook in hooks])
def test_hooks_without_super_are_refused_and_with_super_accepted(kind, hook):
    def silent(self, *args):
        self.seen = True

    def wrapped(self, *args):
        return args

    class Mixed:
        """A mixin without a base class, listed before ours."""

    setattr(Mixed, hook, silent)
    arguments = (0.1,) if kind is Flooding else ()
    for bases in ((kind,), (Mixed, kind)):
        attributes = {hook: silent} if bases == (kind,) else {}
        with pytest.raises(MisconfigurationException, match=rf"`{hook}`.*super\(\)\.{hook}"):
            type("Mine", bases, attributes)(*arguments)
    source = f"class Mine(kind):\n    def {hook}(self, *args):\n        return super().{hook}(*args)"
    found = {"kind": kind}
    exec(source, found)
    found["Mine"](*arguments)
    decorated = functools.wraps(vars(found["Mine"])[hook])(wrapped)
    type("Mine", (kind,), {hook: decorated})(*arguments)


class Outer(Plain):
    """Trains another module in the middle of its training."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 4:
            inner = Plain(0.1)
            callbacks = [c for c in self.trainer.callbacks if isinstance(c, SAM)]
            make_trainer(*callbacks).fit(inner, Batches(inner.make_batches()))


def test_the_same_callback_in_an_inner_trainer_is_handled_or_refused():
    found = []
    for callbacks in ([sam(0.3).callback()], [sam(0.3).callback(), None]):
        module = build(Outer, "automatic", 0.05)
        seed()
        batches = module.make_batches()
        if None in callbacks:  # without inner training
            callbacks.remove(None)
            module.on_train_batch_start = lambda batch, batch_idx: None
        trainer = make_trainer(*callbacks)
        try:
            trainer.fit(module, Batches(batches))
        except MisconfigurationException as error:
            is_one_line(error, "Trainer")
            return
        found.append((as_dict(dict(module.state_dict())), report(callbacks[0])))
    same("weights", found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == (9, 9)


class OuterByHand(GradientRegularizationMixin, Outer):
    """Both modules optimize manually, where the steps of each optimizer are counted."""

    def training_step(self, batch, batch_idx):
        self.regularized_step(self.optimizers(), lambda: self.evaluate(batch))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 4:
            inner = InnerByHand(0.1)
            inner.automatic_optimization = False
            make_trainer(*self.trainer.callbacks).fit(inner, Batches(inner.make_batches()))
            REPORTS.append([report(c) for c in self.trainer.callbacks if isinstance(c, SAM)])


class InnerByHand(OuterByHand):
    def on_train_batch_start(self, batch, batch_idx):
        """Do not train a third module."""


REPORTS = []


def test_each_trainer_has_its_own_schedule_and_counts():
    REPORTS.clear()
    callbacks = [SAM(0.3, start_step=5), Flooding(0.0)]
    module = OuterByHand(0.05)
    module.automatic_optimization = False
    trainer = make_trainer(*callbacks)
    trainer.fit(module, Batches(module.make_batches()))
    assert REPORTS == [[(0, 4)]]
    assert report(callbacks[0]) == (4, 9)
    # only the losses of its own nine first passes count
    assert callbacks[1].counter.count == 9


# --- optimizers within the module


class Inner(Situation):
    """An inner optimizer that steps within ``forward``, as in vector-quantize-pytorch."""

    def prepare(self):
        self.codes = nn.Parameter(torch.zeros(2).double(), requires_grad=False)
        self.learned = torch.zeros(2).double().requires_grad_()
        self.inner = torch.optim.Adam([self.learned], lr=0.1)

    def step(self, batch):
        features = self.net(batch[0])
        with torch.enable_grad():
            (features.detach() - self.learned).square().mean().backward()
        self.inner.step()
        self.inner.zero_grad()
        return self.mse(batch) + (features - self.learned.detach()).square().mean()


@pytest.mark.parametrize("form", Inner.forms)
def test_an_optimizer_inside_the_step(form):
    check_no_trace(Inner, form)
    check_gradient(Inner, form, FGR)
