"""Manual optimization with the mixin equals automatic optimization with the callback and a reference implementation."""

import copy
import pickle

import pytest
import pytorch_lightning as pl
import reference
import torch
from modules import (
    FIRST_ORDER,
    METHODS,
    SOME,
    TinyModule,
    assert_near,
    assert_same,
    cross_entropy,
    fit,
    gradients,
    make_batches,
    make_loader,
    make_trainer,
    mlp,
    sgd,
    weights,
)
from outside import Record
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr import SAM, Flooding, GradientRegularization, GradientRegularizationMixin, SAMRule, in_second_pass

each_method = pytest.mark.parametrize("name", METHODS)


class Manual(GradientRegularizationMixin, TinyModule):
    """TinyModule with manual optimization; ``options`` are passed to ``regularized_step``."""

    def __init__(self, *args, **options):
        super().__init__(*args)
        self.automatic_optimization = False
        self.options, self.losses = options, []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.losses.append(self.regularized_step(optimizer, lambda: self.loss(self.net, batch), **self.options))


def noisy():
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


def by_hand(name, epochs=2):
    windows = [[batch] for batch in make_batches()] * epochs
    losses = [reference.loss_of(mlp(), cross_entropy, window) for window in windows]
    return reference.train(mlp(), losses, reference.SGD(), lambda _, *at: METHODS[name].gradient(*at))


# --- the same as in automatic optimization


@each_method
def test_equals_the_callback_bit_for_bit(name):
    states = []
    for kind in (TinyModule, Manual):
        module = kind(noisy())
        torch.manual_seed(1)
        fit(module, METHODS[name].callback(warmup_steps=4), Flooding(1.0), max_epochs=3)
        states.append({**module.net.state_dict(), "draw": torch.rand(3)})
    assert_same(states[1], states[0])


@each_method
def test_equals_the_reference(name):
    module = Manual()
    fit(module, METHODS[name].callback(), max_epochs=2)
    assert_near(weights(module.net), by_hand(name))


def test_without_a_callback_it_is_plain_training():
    plain, manual = TinyModule(noisy()), Manual(noisy())
    for module in (plain, manual):
        torch.manual_seed(1)
        fit(module, max_epochs=2)
    assert_same(manual.net.state_dict(), plain.net.state_dict())


def test_returns_the_clean_loss():
    module, plain = Manual(), []
    net = mlp()
    fit(module, SAM(0.5), Flooding(5.0))
    plain = [cross_entropy(net, batch).item() for batch in make_batches()]
    assert module.losses[0].item() == plain[0]
    assert not module.losses[0].requires_grad


@pytest.mark.parametrize("accumulation", ["one call", "several calls"])
@pytest.mark.parametrize("name", SOME)
def test_micro_batches_are_one_large_batch(name, accumulation):
    """With a list of closures; several calls instead add up their separate gradients."""

    class Accumulates(Manual):
        def training_step(self, batch, batch_idx):
            x, y = batch
            parts = [lambda at=at: self.loss(self.net, (x[at::2], y[at::2])) for at in (0, 1)]
            if accumulation == "one call":
                self.regularized_step(self.optimizers(), parts)
                return
            self.optimizers().zero_grad()
            for part in parts:
                self.regularized_backward(lambda part=part: part() / 2, self.optimizers())
            self.optimizers().step()

    module = Accumulates()
    fit(module, METHODS[name].callback(), max_epochs=2)
    windows = [[(x[0::2], y[0::2]), (x[1::2], y[1::2])] for x, y in make_batches()] * 2
    gradient, one = METHODS[name].gradient, accumulation == "one call"

    def by_parts(_, window, theta):
        groups = [window] if one else [[part] for part in window]
        parts = [gradient(reference.loss_of(mlp(), cross_entropy, group, 2), theta) for group in groups]
        return {n: sum(part[n] for part in parts) for n in theta}

    assert_near(weights(module.net), reference.train(mlp(), windows, reference.SGD(), by_parts))


def test_several_calls_add_up_along_the_same_direction():
    """Each call uses the direction of its own loss, regardless of what is in ``.grad``."""
    module, seen = Manual(), []

    def step(batch, batch_idx):
        for _ in range(2):
            module.regularized_backward(lambda: module.loss(module.net, batch), module.optimizers())
            seen.append(gradients(module.net))
        module.optimizers().zero_grad()

    module.training_step = step
    fit(module, SAM(0.3), limit_train_batches=1)
    assert_near(seen[1], {n: 2 * g for n, g in seen[0].items()})


# --- several optimizers


PASSES = {}  # not in the module, where records of a second pass would be undone


class GAN(GradientRegularizationMixin, pl.LightningModule):
    """Two linear players, each with its own optimizer."""

    def __init__(self, generator_rule="trainer", toggles=True):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(4), mlp(4, seed=3)
        self.generator_rule, self.toggles = generator_rule, toggles
        PASSES.update(g=[], d=[])

    def generator_loss(self, x):
        PASSES["g"].append(in_second_pass())
        return -self.discriminator(self.generator(x).repeat(1, 2)[:, :5]).square().mean()

    def discriminator_loss(self, x):
        PASSES["d"].append(in_second_pass())
        fake = self.generator(x).detach().repeat(1, 2)[:, :5]
        return self.discriminator(fake).square().mean() - self.discriminator(x).mean()

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        with d.toggle_model():
            self.regularized_step(d, lambda: self.discriminator_loss(batch[0]))
            assert all(p.grad is None for p in self.generator.parameters()) or self.global_step > 1
        if self.toggles:
            with g.toggle_model():
                self.regularized_step(g, lambda: self.generator_loss(batch[0]), rule=self.generator_rule)
        else:
            self.regularized_step(g, lambda: self.generator_loss(batch[0]), rule=self.generator_rule)

    def configure_optimizers(self):
        return sgd(self.generator.parameters()), torch.optim.Adam(self.discriminator.parameters(), lr=0.01)


def gan_by_hand(regularize_generator):
    """Train both players by hand in float64."""
    module = GAN()
    optimizers = module.configure_optimizers()
    for x, _ in make_batches():
        for which, net, loss_fn in (
            (1, module.discriminator, module.discriminator_loss),
            (0, module.generator, module.generator_loss),
        ):
            names = [n for n, _ in net.named_parameters()]
            start = weights(net)

            def gradient_at(theta, net=net, loss_fn=loss_fn, names=names, x=x):
                net.load_state_dict(theta)
                found = torch.autograd.grad(loss_fn(x), list(net.parameters()))
                return dict(zip(names, found, strict=True))

            g = gradient_at(start)
            if which == 1 or regularize_generator:
                norm = reference.norm(g)
                g = gradient_at({n: start[n] + 0.2 * g[n] / norm for n in names})
                net.load_state_dict(start)
            for n, p in net.named_parameters():
                p.grad = g[n]
            optimizers[which].step()
    return weights(module)


@pytest.mark.parametrize("toggles", [True, False])
@pytest.mark.parametrize("rule", ["trainer", None])
def test_two_optimizers(rule, toggles):
    expected = gan_by_hand(rule == "trainer")
    module = GAN(rule, toggles)
    fit(module, SAM(0.2))
    assert_near(weights(module), expected)
    assert PASSES["d"] == [False, True] * 3
    assert PASSES["g"] == ([False, True] if rule == "trainer" else [False]) * 3


def test_a_schedule_counts_the_steps_of_each_optimizer():
    module = GAN()
    fit(module, SAM(0.2, start_step=1, interval=2), max_epochs=2)
    assert PASSES["d"] == PASSES["g"] == [False, False, True] * 3


def test_a_schedule_continues_after_resuming(tmp_path):
    trainer = make_trainer(SAM(0.2, start_step=1, interval=2))
    trainer.fit(GAN(), make_loader())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = GAN()
    make_trainer(SAM(0.2, start_step=1, interval=2), max_epochs=2).fit(
        again, make_loader(), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert PASSES["d"] == [False, True, False, False, True]


def test_rule_and_level_of_a_single_call():
    module, expected = Manual(rule=SAMRule(0.2), level=0.0), Manual()
    fit(module, GradientRegularization(0.1, 0.1), Flooding(9.0), max_epochs=2)
    fit(expected, SAM(0.2), max_epochs=2)
    assert_same(weights(module.net), weights(expected.net))


def test_excluded_parameters_keep_the_clean_gradient():
    automatic, manual = TinyModule(), Manual()
    for module in (automatic, manual):
        fit(module, SAM(0.2, exclude=["*.bias"]), max_epochs=2)
    assert_same(weights(manual.net), weights(automatic.net))


@each_method
def test_some_parameters_of_an_optimizer(name):
    """The other parameters keep the clean gradient, as if they were excluded."""

    class Backbone(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.regularized_backward(lambda: self.loss(self.net, batch), self.net[0].parameters())
            optimizer.step()

    automatic, manual = TinyModule(), Backbone()
    fit(automatic, METHODS[name].callback(exclude=["net.2.*"]), max_epochs=2)
    fit(manual, METHODS[name].callback(), max_epochs=2)
    assert_same(weights(manual.net), weights(automatic.net))


# --- precision and clipping


def clipped(kind, precision="64-true", **options):
    module = Manual(None, **options) if kind == "manual" else TinyModule()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module.net = mlp(dtype=dtype)
    loader = make_loader(dtype=dtype)
    fit(module, SAM(0.2), loader=loader, max_epochs=2, precision=precision, **({} if kind == "manual" else options))
    return weights(module.net)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_clipping_equals_clipping_by_the_trainer(precision, algorithm):
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    assert_same(clipped("manual", precision, **options), clipped("automatic", precision, **options))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_under_a_gradient_scaler(algorithm):
    """The threshold applies to unscaled gradients, so the result is the same as with a scale of 1."""
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    ends = []
    for scale in (1.0, 2.0**12):
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        module = Manual(mlp(dtype=torch.float32), **options)
        fit(module, SAM(0.2), loader=make_loader(dtype=torch.float32), max_epochs=2, plugins=[plugin])
        ends.append(weights(module.net))
    start = weights(mlp(dtype=torch.float32))
    moved = [{n: end[n] - start[n] for n in end} for end in ends]
    assert_near(moved[1], moved[0], 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_compiled_equals_uncompiled(name):
    torch._dynamo.reset()
    compiled, plain = Manual(mlp()), Manual(mlp())
    compiled.net = torch.compile(compiled.net, backend="aot_eager")
    for module in (compiled, plain):
        fit(module, METHODS[name].callback(), max_epochs=2)
    assert_near(weights(compiled.net._orig_mod), weights(plain.net))


@pytest.mark.parametrize("bad_pass", [False, True])
def test_overflow_under_a_gradient_scaler_skips_the_step(bad_pass):
    """An overflow in either pass lowers the scale, and the weights stay finite."""
    seen = Record()

    def loss(net, batch):
        bad = len(seen) == 1 and in_second_pass() == bad_pass
        seen.extend([1] * (in_second_pass() or bad))
        return cross_entropy(net, batch) * (torch.inf if bad else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    module = Manual(mlp(dtype=torch.float32), loss)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, SAM(0.2), loader=make_loader(dtype=torch.float32), max_epochs=2, plugins=[plugin])
    assert scaler.get_scale() == 2.0**11
    assert all(p.isfinite().all() for p in module.net.parameters())


# --- errors, hooks and copies


def test_an_error_leaves_clean_weights():
    module = Manual()

    def loss(net, batch):
        if in_second_pass():
            raise ValueError("broken")
        return cross_entropy(net, batch)

    module.loss = loss
    with pytest.raises(ValueError, match="broken"):
        fit(module, SAM(0.2))
    assert_same(weights(module.net), weights(mlp()))


def test_hooks_run_and_values_are_logged_once():
    class Logs(Manual):
        def training_step(self, batch, batch_idx):
            def loss_fn():
                loss = self.loss(self.net, batch)
                self.log("loss", loss, on_epoch=True, on_step=False)
                return {"loss": loss}

            self.regularized_step(self.optimizers(), loss_fn)

    counts = []
    for callbacks in ([], [SAM(0.0001)]):
        seen = []

        class Counts(pl.Callback):
            def on_before_backward(self, *_, seen=seen):
                seen.append("before")

            def on_after_backward(self, *_, seen=seen):
                seen.append("after")

            def on_before_optimizer_step(self, *_, seen=seen):
                seen.append("step")

        module = Logs()
        trainer = fit(module, *callbacks, Counts())
        counts.append((seen, round(trainer.callback_metrics["loss"].item(), 3), trainer.global_step))
    assert counts[0] == counts[1]


def test_copies_and_pickles():
    class Copies(Manual):
        def on_train_batch_end(self, *_):
            copy.deepcopy(self.net)
            self.clone = pickle.loads(pickle.dumps(vars(self)["_lightning_gr"]))

    module, expected = Copies(), Manual()
    fit(module, SAM(0.2))
    fit(expected, SAM(0.2))
    assert_same(weights(module.net), weights(expected.net))


class Wrong(Manual):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def training_step(self, batch, batch_idx):
        self.call(self, self.optimizers(), lambda: self.loss(self.net, batch))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, o, f: m.regularized_step(sgd(m.parameters()), f), MisconfigurationException, "one of `self.optim"),
        (lambda m, o, f: m.regularized_backward(f, [nn.Parameter(torch.ones(2))]), MisconfigurationException, "1 p"),
        (lambda m, o, f: m.regularized_backward(f, []), MisconfigurationException, "Expected all 0 parameters given"),
        (lambda m, o, f: m.regularized_step(m.parameters(), f), MisconfigurationException, "one of `self.optim"),
        (lambda m, o, f: m.regularized_step(o, lambda: f().detach()), ValueError, "a loss with a graph but got"),
        (lambda m, o, f: m.regularized_step(o, lambda: None), ValueError, "a loss with a graph but got NoneType"),
        (lambda m, o, f: m.regularized_step(o, []), ValueError, "a function or a list of functions"),
        (lambda m, o, f: m.regularized_step(o, f, rule="SAM"), ValueError, "argument `rule` to be a GRRule"),
        (lambda m, o, f: m.regularized_step(o, f, level=-1), ValueError, "argument `level`"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        fit(Wrong(call), SAM(0.2))


def test_automatic_optimization_is_refused():
    module = Wrong(lambda m, o, f: m.regularized_step(o, f))
    module.automatic_optimization = True
    with pytest.raises(MisconfigurationException, match="`regularized_step` needs manual optimization"):
        fit(module, SAM(0.2))


def test_outside_of_training_is_refused():
    with pytest.raises(MisconfigurationException, match="only works in `training_step`"):
        Manual().regularized_backward(lambda: None, None)
