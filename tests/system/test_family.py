"""Rules that keep state between steps or use the optimizer's, in all forms, against references in float64."""

import pytest
import reference
import torch
from accelerator import treated_as_accelerator
from modules import (
    STATEFUL,
    TinyModule,
    adamw,
    assert_near,
    assert_same,
    cross_entropy,
    fit,
    make_batches,
    make_loader,
    make_trainer,
    mlp,
    sgd,
    weights,
)
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_gr import (
    SAM,
    Flooding,
    GradientRegularization,
    GradientRegularizationMixin,
    TwoPass,
    in_second_pass,
    regularized_backward,
)
from lightning_gr.rules import FriendlySAMRule, GSAMRule, State

EPOCHS = 4
OPTIMIZERS = {"SGD": (sgd, reference.SGD), "AdamW": (adamw, lambda: reference.Adam(decay=0.1))}

each_rule = pytest.mark.parametrize("name", STATEFUL)
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Manual(GradientRegularizationMixin, TinyModule):
    """TinyModule with manual optimization."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.regularized_step(self.optimizers(), lambda: self.loss(self.net, batch))


def by_hand(name, optimizer, size=1, level=None):
    batches = make_batches()
    windows = [batches[i : i + size] for i in range(0, len(batches), size)] * EPOCHS
    losses = [reference.loss_of(mlp(), cross_entropy, window, len(window), level) for window in windows]
    return reference.train_with(mlp(), losses, OPTIMIZERS[optimizer][1](), STATEFUL[name].reference())


def by_function(name, optimizer):
    net, state = mlp(), State()
    steps = OPTIMIZERS[optimizer][0](net.parameters())
    for batch in make_batches() * EPOCHS:
        steps.zero_grad()
        loss_fn = lambda batch=batch: cross_entropy(net, batch)  # noqa: E731
        regularized_backward(loss_fn, net, STATEFUL[name].rule, optimizer=steps, state=state)
        steps.step()
    return weights(net)


@each_optimizer
@each_rule
@pytest.mark.parametrize("size", [1, 3])
def test_equals_the_reference(name, optimizer, size):
    module = TinyModule(optimizer=OPTIMIZERS[optimizer][0])
    fit(module, STATEFUL[name].callback(), max_epochs=EPOCHS, accumulate_grad_batches=size)
    assert_near(weights(module.net), by_hand(name, optimizer, size))


@each_optimizer
@each_rule
def test_other_forms_equal_the_reference(name, optimizer):
    manual = Manual(optimizer=OPTIMIZERS[optimizer][0])
    fit(manual, STATEFUL[name].callback(), max_epochs=EPOCHS)
    expected = by_hand(name, optimizer)
    assert_near(weights(manual.net), expected)
    assert_near(by_function(name, optimizer), expected)


@each_rule
def test_together_with_flooding(name):
    module = TinyModule()
    fit(module, STATEFUL[name].callback(), Flooding(1.0), max_epochs=EPOCHS)
    assert_near(weights(module.net), by_hand(name, "SGD", level=1.0))


@each_rule
def test_the_accelerator_branch(name):
    with treated_as_accelerator() as asked:
        module = TinyModule()
        fit(module, STATEFUL[name].callback(), max_epochs=EPOCHS)
    assert asked.called
    assert_near(weights(module.net), by_hand(name, "SGD"))


# --- 16-mixed


FP32 = torch.float32


def half(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000))


@each_rule
def test_the_loss_scale_does_not_matter(name):
    modules = [TinyModule(mlp(dtype=FP32)) for _ in range(3)]
    for module, plugins in zip(modules, [[half(2.0**6)], [half(2.0**12)], []], strict=True):
        fit(module, STATEFUL[name].callback(), loader=make_loader(dtype=FP32), plugins=plugins, max_epochs=EPOCHS)
    low, high, single = modules
    assert_near(low.gradients[-1], high.gradients[-1], 1e-3)
    assert_near(low.gradients[-1], single.gradients[-1], 0.05)


@pytest.mark.parametrize("at_second", [False, True])
@each_rule
def test_a_step_that_overflows_is_skipped_and_leaves_no_trace(name, at_second):
    """The rule's state comes from successful steps only."""
    if name == "Momentum-SAM" and at_second:
        pytest.skip("it has no second pass")

    class Overflows(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 if batch_idx == 1 and in_second_pass() == at_second else loss

    module, callback, plugin = Overflows(mlp(dtype=FP32)), STATEFUL[name].callback(), half(2.0**8)
    fit(module, callback, loader=make_loader(dtype=FP32), plugins=[plugin])
    skips = name != "LookSAM" or not at_second  # LookSAM has no second pass in the second step
    assert plugin.scaler.get_scale() == (2.0**7 if skips else 2.0**8)
    assert all(param.isfinite().all() for param in module.parameters())
    with callback.state.of(list(module.net.parameters())):
        kept = callback.state.snapshot()
    assert all(vector.isfinite().all() for vectors in kept.values() for vector in vectors)


# --- gradient_clip


def clipped_by_hand(scheme, clip, step, loss, theta):
    g0 = reference.clipped(reference.plain(loss, theta), clip[0])
    if scheme == "SAM":
        return reference.clipped(reference.moved(loss, theta, 0.2, reference.unit(g0)), clip[1])
    ahead = reference.clipped(reference.moved(loss, theta, 0.1, g0), clip[1])
    if scheme == "forward":
        return reference.combine(1 - 0.3, g0, 0.3, ahead)
    behind = reference.clipped(reference.moved(loss, theta, -0.1, g0), clip[1])
    return reference.combine(1.0, g0, 0.15, reference.combine(1.0, ahead, -1.0, behind))


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("scheme", ["forward", "central", "SAM"])
@pytest.mark.parametrize("clip", [(0.2, 0.1), (100.0, 0.15), (0.1, 100.0), 100.0])
def test_gradient_clip(scheme, clip, host):
    module, kind = TinyModule(), GradientRegularization
    callback = SAM(0.2, gradient_clip=clip) if scheme == "SAM" else kind(0.03, 0.1, scheme=scheme, gradient_clip=clip)
    if host:
        fit(module, callback)
    else:
        with treated_as_accelerator():
            fit(module, callback)
    both = clip if isinstance(clip, tuple) else (clip, clip)
    losses = [reference.loss_of(mlp(), cross_entropy, [batch]) for batch in make_batches()]
    expected = reference.train(mlp(), losses, reference.SGD(), lambda *at: clipped_by_hand(scheme, both, *at))
    assert_near(weights(module.net), expected)


def test_a_threshold_that_is_never_reached_changes_nothing():
    modules = [TinyModule(), TinyModule()]
    fit(modules[0], SAM(0.2))
    fit(modules[1], SAM(0.2, gradient_clip=1e6))
    assert_same(weights(modules[0].net), weights(modules[1].net))


def test_a_stateful_rule_needs_a_state():
    net = mlp()
    with pytest.raises(ValueError, match="Expected `state` with a rule that keeps 'average'"):
        regularized_backward(lambda: cross_entropy(net, make_batches()[0]), net, STATEFUL["Friendly-SAM"].rule)


def test_looking_ahead_needs_an_optimizer():
    net = mlp()
    with pytest.raises(ValueError, match="Expected `optimizer` with a rule that looks ahead"):
        regularized_backward(lambda: cross_entropy(net, make_batches()[0]), net, STATEFUL["Momentum-SAM"].rule)


def test_weights_and_momentum_stay_unchanged():
    net = mlp()
    optimizer, state = sgd(net.parameters()), State()
    for batch in make_batches():
        for member in STATEFUL.values():
            before, momenta = weights(net), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
            loss_fn = lambda batch=batch: cross_entropy(net, batch)  # noqa: E731
            regularized_backward(loss_fn, net, member.rule, optimizer=optimizer, state=state)
            assert_same(weights(net), before)
            after = [s["momentum_buffer"] for s in optimizer.state.values()]
            assert all(torch.equal(a, b) for a, b in zip(after, momenta, strict=True))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"ascent_sync": False}, {"devices": 2, "strategy": "ddp"}, "but `ascent_sync=False` averages them"),
        ({"accumulation": "micro_batch"}, {"accumulate_grad_batches": 2}, "but `accumulation='micro_batch'` adds up"),
    ],
)
@pytest.mark.parametrize("rule", [GSAMRule(), FriendlySAMRule(), None])
def test_methods_that_need_each_gradient_as_a_whole(rule, options, trainer, message):
    """An error is raised before training."""
    callback = SAM(0.1, gradient_clip=1.0, **options) if rule is None else TwoPass(rule, **options)
    who = "`gradient_clip` clips each gradient" if rule is None else f"{rule.name} combines its gradients itself"
    with pytest.raises(MisconfigurationException, match=f"{who}, {message}") as caught:
        callback.setup(make_trainer(callback, **trainer), TinyModule(), "fit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clip", [0.0, -1.0, (1.0,), (1.0, 2.0, 3.0), "much", (1.0, True), float("inf")])
def test_a_wrong_clip_is_refused(clip):
    with pytest.raises(ValueError, match="Expected argument `gradient_clip` to be a positive float"):
        SAM(gradient_clip=clip)
