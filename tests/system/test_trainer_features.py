"""Regularized training with features of torch and the Trainer, against training without them or the reference."""

import time

import pytest
import pytorch_lightning as pl
import reference
import torch
from modules import (
    FIRST_ORDER,
    METHODS,
    SOME,
    SOME_MOVING,
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
    weights,
)
from outside import Record
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

from lightning_gr import SAM, in_second_pass

each_method = pytest.mark.parametrize("name", SOME)
both_orders = pytest.mark.parametrize("order", [1, -1], ids=["ours first", "ours last"])
older = not hasattr(lightning, "WeightAveraging")
since_2_6 = pytest.mark.skipif(older, reason="has no WeightAveraging, and skips batches after a search")


def in_windows(batches, size=1, epochs=1):
    return [batches[i : i + size] for i in range(0, len(batches), size)] * epochs


def by_hand(name, windows, *, parts=1, net=None, optimizer=None, then=lambda gradient: gradient):
    """Return the weights after one step per window; ``then`` is applied to each final gradient."""
    net = mlp() if net is None else net
    losses = [reference.loss_of(net, cross_entropy, window, parts) for window in windows]
    gradient = METHODS[name].gradient
    return reference.train(net, losses, optimizer or reference.SGD(), lambda _, *at: then(gradient(*at)))


def path(name, epochs, **options):
    """Return the initial weights and those after each step of some epochs."""
    windows = in_windows(make_batches(), epochs=epochs)
    return [by_hand(name, windows[:steps], **options) for steps in range(len(windows) + 1)]


def loss_at(position):
    """Return the loss of one batch as a function of the weights."""
    return reference.loss_of(mlp(), cross_entropy, [make_batches()[position]])


def sgd_without_momentum(params):
    return torch.optim.SGD(params, lr=0.1)


class Validates(TinyModule):
    validated = ()

    def validation_step(self, batch, batch_idx):
        self.validated = (*self.validated, weights(self.net))


# --- torch.compile and gradient checkpointing


class Mixed(nn.Module):
    """Has dropout, random numbers and a buffer, in a part that is called through ``wrap``."""

    def __init__(self, wrap):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout, self.wrap = nn.Dropout(0.4), wrap
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def part(self, h):
        self.calls += 1
        return self.dropout(self.norm(h).tanh()) * torch.rand_like(h)

    def forward(self, x):
        return self.last(self.wrap(self.part, self.first(x)))


def train_mixed(callback=None, compiler=None, part=None, lr=0.1, wrap=lambda function, h: function(h)):
    """Train a ``Mixed`` network; return its weights with the next random numbers, and its buffers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Mixed(wrap)
    module = TinyModule(torch.compile(net, backend=compiler) if part == "net" else net)
    module.optimizer = lambda params: torch.optim.SGD(params, lr)
    model = torch.compile(module, backend=compiler) if part == "module" else module
    fit(model, *([callback] if callback else []), max_epochs=3)
    return {**weights(net), "draw": torch.rand(4)}, dict(net.named_buffers())


AHEAD_OF_TIME = [pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in FIRST_ORDER]


@pytest.mark.parametrize("part", ["module", "net"])
@pytest.mark.parametrize(("name", "backend"), [*((name, "eager") for name in SOME), *AHEAD_OF_TIME])
def test_compiled_equals_uncompiled(name, backend, part):
    callback = METHODS[name].callback()
    for actual, expected in zip(train_mixed(callback, backend, part), train_mixed(callback), strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("part", ["module", "net"])
@pytest.mark.parametrize("name", SOME_MOVING)
def test_the_second_pass_runs_the_graph_of_the_first(name, part):
    graphs, runs, passes = Record(), Record(), 1 + len(METHODS[name].rule.update().probes)

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: runs.append(1) or graph.forward(*args)

    train_mixed(METHODS[name].callback(), backend, part)
    assert (len(graphs), len(runs)) == (1, 9 * passes)


@pytest.mark.launch  # the compiler of torch 2.6 starts a process
def test_exact_with_aot_autograd_is_refused_and_leaves_weights_unchanged():
    module = TinyModule()
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        fit(torch.compile(module, backend="aot_eager"), METHODS["exact GR"].callback())
    assert_same(weights(module.net), weights(mlp()))


CHECKPOINTED = [*[(name, False) for name in SOME], ("forward GR", True), ("central norm penalty", True)]


@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTED)
def test_gradient_checkpointing(name, reentrant):
    def wrap(function, h):
        return checkpoint(function, h, use_reentrant=reentrant)

    callback = METHODS[name].callback()
    assert_same(train_mixed(callback, wrap=wrap)[0], train_mixed(callback)[0])
    # a tiny step gives the gradient of the first pass, provided that the random numbers are the same
    assert_near(train_mixed(SAM(1e-13), wrap=wrap)[0], train_mixed(wrap=wrap)[0])
    standing, plain = (train_mixed(given, wrap=wrap, lr=0.0) for given in (callback, None))
    assert_same(standing[0], plain[0])
    assert_same(standing[1], plain[1])


# --- callbacks that use weights and losses


@since_2_6
@both_orders
@each_method
def test_moving_average(name, order):
    module, averaging = Validates(), lightning.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
    trainer = make_trainer(*[METHODS[name].callback(), averaging][::order], max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, make_loader(), make_loader(8))
    averages = path(name, 2)[1:]
    for step in range(1, 6):
        averages[step] = reference.combine(0.8, averages[step - 1], 0.2, averages[step])
    assert_near(module.validated[0], averages[2])
    assert_near(weights(module.net), averages[5])


@both_orders
@each_method
def test_stochastic_weight_averaging(name, order):
    module, visited = TinyModule(), path(name, 3)
    averaging = lightning.StochasticWeightAveraging(0.1, swa_epoch_start=2, annealing_epochs=1)
    fit(module, *[METHODS[name].callback(), averaging][::order], max_epochs=4)
    mean = {n: sum(visited[step][n] for step in (3, 6, 9)) / 3 for n in visited[0]}  # at the starts of epochs
    assert_near(weights(module.net), mean)


def test_the_private_flag_of_the_statistics_epoch_exists():
    assert make_trainer().fit_loop._skip_backward is False


@both_orders
def test_the_epoch_for_batch_statistics_of_averaged_weights_has_no_second_pass(order):
    module, passes = TinyModule(nn.Sequential(mlp(), nn.BatchNorm1d(3).double())), Record()
    module.loss = lambda net, batch: passes.append(in_second_pass()) or cross_entropy(net, batch)
    averaging = lightning.StochasticWeightAveraging(0.1, swa_epoch_start=1, annealing_epochs=1)
    fit(module, *[SAM(0.2), averaging][::order], max_epochs=2)
    # Lightning ends that epoch with a step along the last gradient before it
    assert_same(module.gradients[6], module.gradients[5])
    assert passes == [False, True] * 6 + [False] * 3


@both_orders
@each_method
def test_early_stopping_and_checkpoints_follow_the_clean_loss(name, order, tmp_path):
    class Logs(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    visited = path(name, 4)
    losses = [sum(loss_at(i)(visited[3 * epoch + i]).item() for i in range(3)) / 3 for epoch in range(4)]
    early = lightning.EarlyStopping("train_loss", stopping_threshold=(losses[1] + losses[2]) / 2)
    saves = lightning.ModelCheckpoint(tmp_path, "{epoch}", monitor="train_loss", save_top_k=-1)
    callbacks = [METHODS[name].callback(), early, saves][::order]
    trainer = fit(Logs(), *callbacks, max_epochs=4, enable_checkpointing=True)
    assert trainer.current_epoch == 3
    assert [loss.item() for loss in saves.best_k_models.values()] == pytest.approx(losses[:3], rel=1e-10)
    saved = torch.load(saves.best_model_path, weights_only=False)["state_dict"]
    assert_near({n.removeprefix("net."): value for n, value in saved.items()}, visited[9])


# --- Trainers that use some batches only, tune, or fit repeatedly


@pytest.mark.parametrize("limit", [{"overfit_batches": 2}, {"fast_dev_run": 2}, {"limit_train_batches": 0.7}], ids=str)
def test_only_some_batches(limit):
    module, epochs = TinyModule(), 1 if "fast_dev_run" in limit else 2
    fit(module, SAM(0.2), max_epochs=2, **limit)
    assert_near(weights(module.net), by_hand("SAM", in_windows(make_batches()[:2], epochs=epochs)))


class Tunable(TinyModule):
    """Has a learning rate and a batch size that tuners can set."""

    def __init__(self):
        super().__init__(optimizer=lambda params: torch.optim.SGD(params, self.lr, momentum=0.9))
        self.lr, self.batch_size = 0.1, 8

    def train_dataloader(self):
        return make_loader(96, self.batch_size)

    def assert_trained(self, searched):
        assert [self.lr != 0.1, self.batch_size != 8] == [searched == "lr", searched == "batch_size"]
        windows = in_windows(make_batches(96, self.batch_size), epochs=2)
        assert_near(weights(self.net), by_hand("SAM", windows, optimizer=reference.SGD(self.lr)))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lr", "batch_size"])
def test_a_tuner_has_no_effect_on_later_training(what, tmp_path):
    module, trainer = Tunable(), make_trainer(SAM(0.2), max_epochs=2, default_root_dir=tmp_path)
    if what == "lr":
        Tuner(trainer).lr_find(module, num_training=20)
    else:
        Tuner(trainer).scale_batch_size(module, max_trials=4, steps_per_trial=1)
    trainer.fit(module)
    module.assert_trained(what)


@pytest.mark.slow
@since_2_6
@both_orders
@pytest.mark.parametrize("what", ["lr", "batch_size"])
def test_searches_within_a_fit(what, order, tmp_path):
    rate, size = lightning.LearningRateFinder(num_training_steps=20), lightning.BatchSizeFinder(max_trials=4)
    module, finder = Tunable(), rate if what == "lr" else size
    make_trainer(*[SAM(0.2), finder][::order], max_epochs=2, default_root_dir=tmp_path).fit(module)
    module.assert_trained(what)


@each_method
def test_barebones(name):
    module, options = TinyModule(), {"max_epochs": 2, "accelerator": "cpu"}
    pl.Trainer(barebones=True, callbacks=[METHODS[name].callback()], **options).fit(module, make_loader())
    assert_near(weights(module.net), by_hand(name, in_windows(make_batches(), epochs=2)))


def test_epochs_added_later_equal_those_of_a_single_fit():
    callback = SAM(0.2, start_step=1, interval=2, warmup_steps=4)
    long, short = TinyModule(optimizer=sgd_without_momentum), TinyModule(optimizer=sgd_without_momentum)
    trainer = fit(short, callback)
    fit(TinyModule(mlp(4)), callback, accumulate_grad_batches=2)  # the callback is used by another Trainer in between
    trainer.fit_loop.max_epochs = 3
    trainer.fit(short, make_loader())
    fit(long, callback, max_epochs=3)
    assert_same(weights(short.net), weights(long.net))


# --- options of the Trainer, and hooks before the step


def clip_value(gradient):
    return {name: value.clamp(-0.02, 0.02) for name, value in gradient.items()}


def clip_norm(gradient):
    return {name: value * min(1.0, 0.05 / (reference.norm(gradient) + 1e-6)) for name, value in gradient.items()}


CLIPS = [(0.02, "value", clip_value, 1), (0.02, "value", clip_value, 2), (0.05, "norm", clip_norm, 2)]


@pytest.mark.parametrize(("limit", "kind", "then", "size"), CLIPS)
@each_method
def test_clipping_sees_the_final_gradient(name, limit, kind, then, size):
    module, options = TinyModule(), {"gradient_clip_val": limit, "gradient_clip_algorithm": kind}
    fit(module, METHODS[name].callback(), max_epochs=2, accumulate_grad_batches=size, **options)
    assert_near(weights(module.net), by_hand(name, in_windows(make_batches(), size, 2), parts=size, then=then))


@both_orders
@each_method
def test_hooks_before_the_step_see_the_final_gradient_once(name, order):
    seen = []

    class Looks(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(gradients(pl_module.net))

    class Clips(TinyModule):
        def configure_gradient_clipping(self, optimizer, **_):
            seen.append(gradients(self.net))
            self.clip_gradients(optimizer, 0.02, "value")

    module, visited = Clips(), path(name, 1, then=clip_value)
    fit(module, *[METHODS[name].callback(), Looks()][::order])
    assert len(seen) == 6
    for step in range(3):
        assert_near(seen[2 * step], METHODS[name].gradient(loss_at(step), visited[step]))
        assert_same(module.gradients[step], seen[2 * step])
        assert_same(seen[2 * step + 1], seen[2 * step])
    assert_near(weights(module.net), visited[3])


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("options", [{"val_check_interval": 0.34, "inference_mode": False}, {"detect_anomaly": True}])
@each_method
def test_options(name, options):
    module, trainer = Validates(), make_trainer(METHODS[name].callback(), max_epochs=2, **options)
    trainer.fit(module, make_loader(), make_loader(8))
    assert_near(weights(module.net), by_hand(name, in_windows(make_batches(), epochs=2)))


def test_the_time_limit_is_reached_in_a_second_pass():
    module = TinyModule(loss=lambda *args: time.sleep(0.1 * in_second_pass()) or cross_entropy(*args))
    fit(module, SAM(0.2), max_epochs=2, max_time={"milliseconds": 100})
    assert_near(weights(module.net), path("SAM", 1)[1])


def test_a_profiler_counts_the_same_as_without_the_callback():
    counts = []
    for callbacks in ([], [SAM(0.2)]):
        profiler = pl.profilers.SimpleProfiler()
        fit(TinyModule(), *callbacks, profiler=profiler)
        counts.append({k: len(v) for k, v in profiler.recorded_durations.items() if "SAM" not in k})
        second_pass = counts[-1].pop("[lightning_gr] second pass", 0)
        assert second_pass == 3 * len(callbacks)
    assert counts[0]["[Strategy]SingleDeviceStrategy.training_step"] == 3
    assert counts[1] == counts[0]


# --- data and finetuning


class Doubled(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch[0], batch[1]


@each_method
def test_data_modules(name):
    module = TinyModule()
    make_trainer(METHODS[name].callback(), max_epochs=2).fit(module, datamodule=Doubled())
    assert_near(weights(module.net), by_hand(name, in_windows([(2 * x, y) for x, y in make_batches()], epochs=2)))


class Several(TinyModule):
    """Adds up the losses of several loaders, one of which may be exhausted, and returns them as well."""

    def training_step(self, batch, batch_idx):
        losses = {key: self.loss(self.net, part) for key, part in batch.items() if part is not None}
        return {**losses, "loss": sum(losses.values())}


@pytest.mark.parametrize(("mode", "steps"), [(None, 3), ("max_size_cycle", 3), ("max_size", 3), ("min_size", 2)])
@each_method
def test_several_loaders(name, mode, steps):
    long, short = make_batches(), make_batches(16, seed=2)
    windows = [[long[0], short[0]], [long[1], short[1]], [long[2]] if mode == "max_size" else [long[2], short[0]]]
    loaders, module = {"long": make_loader(), "short": make_loader(16, seed=2)}, Several()
    loaders = pl.utilities.CombinedLoader(loaders, mode) if mode else loaders
    fit(module, METHODS[name].callback(), loader=loaders, max_epochs=2)
    assert_near(weights(module.net), by_hand(name, windows[:steps] * 2))


@both_orders
@each_method
def test_unfrozen_layers_are_regularized(name, order):
    same_rate = {"lambda_func": lambda epoch: 1.0, "backbone_initial_ratio_lr": 1.0, "should_align": False}
    module = TinyModule(optimizer=lambda params: sgd_without_momentum([p for p in params if p.requires_grad]))
    module.backbone = module.net[0]
    finetuning = lightning.BackboneFinetuning(unfreeze_backbone_at_epoch=1, **same_rate)
    fit(module, *[METHODS[name].callback(), finetuning][::order], max_epochs=3)
    net, windows = mlp(), in_windows(make_batches())
    net[0].requires_grad_(False)
    net.load_state_dict(by_hand(name, windows, net=net, optimizer=reference.SGD(momentum=0.0)), strict=False)
    net[0].requires_grad_(True)
    assert_near(weights(module.net), by_hand(name, windows * 2, net=net, optimizer=reference.SGD(momentum=0.0)))
