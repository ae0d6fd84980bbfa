"""Momentum-SAM in a Trainer: weights are moved in the forward and the backward pass only."""

import pytest
import pytorch_lightning as pl
import torch
from modules import Manual, TinyModule, assert_near, assert_same, cross_entropy, fit, make_loader, mlp, weights
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_gr import SAM, GradientRegularizationMixin, MomentumSAM, MomentumSAMRule, in_second_pass

RHO = 0.5
HOOKS = [
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_save_checkpoint",
]  # fmt: skip


class Watched(TinyModule):
    """Records the weights in the forward and the backward pass."""

    def __init__(self, **options):
        super().__init__(**options)
        self.forward_weights, self.backward_weights = [], []

    def training_step(self, batch, batch_idx):
        self.forward_weights.append(weights(self.net))
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(lambda grad: self.backward_weights.append(weights(self.net)))
        return loss


class Validated(Watched):
    def validation_step(self, batch, batch_idx):
        return self.loss(self.net, batch)


class Clean(pl.Callback):
    """Checks that in each hook the weights are those after the last optimizer step."""

    def __init__(self, net):
        self.net, self.seen, self.expected = net, [], None

    def setup(self, trainer, pl_module, stage):
        self.expected = weights(self.net)

    def on_train_batch_end(self, *args):
        self.expected = weights(self.net)

    def look(self, name):
        self.seen.append(name)
        if name != "on_train_batch_end":
            assert_same(weights(self.net), self.expected)


for hook in HOOKS:
    if hook != "on_train_batch_end":
        setattr(Clean, hook, lambda self, *args, name=hook, **kwargs: self.look(name))


@pytest.mark.parametrize("size", [1, 3])
def test_weights_are_only_moved_in_the_passes(size, tmp_path):
    module = Validated()
    looks = Clean(module.net)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, accumulate_grad_batches=size, callbacks=[looks, MomentumSAM(RHO)],
    )  # fmt: skip
    trainer.fit(module, make_loader(), make_loader())
    assert set(looks.seen) >= set(HOOKS) - {"on_train_batch_end"}
    assert len(module.forward_weights) == len(module.backward_weights) == 6
    for inside, back in zip(module.forward_weights, module.backward_weights, strict=True):
        assert_same(inside, back)


def test_distance_and_direction():
    """Weights are moved by the radius, along the last optimizer step."""
    module, starts = Watched(), []

    class Starts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            starts.append(weights(module.net))

    fit(module, Starts(), MomentumSAM(RHO), max_epochs=2)
    assert_same(module.forward_weights[0], starts[0])  # there is no momentum yet
    for step in range(1, len(starts)):
        moved = {n: module.forward_weights[step][n] - starts[step][n] for n in starts[step]}
        taken = {n: starts[step][n] - starts[step - 1][n] for n in starts[step]}
        norm = torch.cat([v.flatten() for v in taken.values()]).norm()
        assert_near(moved, {n: RHO * v / norm for n, v in taken.items()})


@pytest.mark.parametrize("where", ["forward", "backward", "before_backward"])
def test_weights_are_restored_after_an_error(where):
    class Fails(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1 and where == "forward":
                raise RuntimeError("broken")
            if batch_idx == 1 and where == "backward":
                loss.register_hook(self.fail)
            return loss

        def fail(self, grad):
            raise RuntimeError("broken")

        def on_train_batch_start(self, batch, batch_idx):
            self.before = weights(self.net)

        def on_before_backward(self, loss):
            if len(self.forward_weights) == 2 and where == "before_backward":
                raise RuntimeError("broken")

    module = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, MomentumSAM(RHO))
    assert_same(weights(module.net), module.before)
    assert not torch.equal(module.forward_weights[1]["0.weight"], module.before["0.weight"])


@pytest.mark.parametrize("metrics", ["default", "all"])
@pytest.mark.parametrize("manual", [False, True])
def test_a_checkpoint_saved_in_a_step_contains_the_clean_weights(manual, metrics, tmp_path):
    class Saves(Manual if manual else Watched):
        parts = 1

        def loss(self, net, batch):
            return cross_entropy(net, batch)

        def on_train_batch_start(self, batch, batch_idx):
            self.before = weights(self.net)

        def save(self):
            inside = weights(self.net)
            self.trainer.save_checkpoint(tmp_path / "in_step.ckpt")
            assert_same(weights(self.net), inside)
            saved = torch.load(tmp_path / "in_step.ckpt", weights_only=True)["state_dict"]
            assert_same({name.removeprefix("net."): value for name, value in saved.items()}, self.before)
            return inside

        def training_step(self, batch, batch_idx):
            if not manual:
                moved = not torch.equal(self.save()["0.weight"], self.before["0.weight"])
                assert moved == (self.global_step > 0 and not in_second_pass())
                return super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            return self.regularized_step(optimizer, lambda: (self.save(), cross_entropy(self.net, batch))[1])

    module = Saves()
    trainer = fit(module, MomentumSAM(RHO, metrics=metrics), max_epochs=2, log_every_n_steps=1)
    assert "save_checkpoint" not in vars(trainer)


class NoMomentum(torch.optim.LBFGS):
    """An optimizer for which it cannot be determined in advance whether it has a momentum."""

    def step(self, closure=None):
        if closure is None:
            raise TypeError("needs a closure")
        closure()
        self.state[next(iter(self.param_groups[0]["params"]))]["count"] = 1


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), "SGD"),
        (torch.optim.Adagrad, "Adagrad"),
        (lambda params: NoMomentum(params), "NoMomentum"),
    ],
)
def test_an_optimizer_without_momentum_is_refused(optimizer, name):
    module = Watched(optimizer=optimizer)
    with pytest.raises(
        MisconfigurationException, match=f"along the optimizer's momentum, but {name} keeps none"
    ) as said:
        fit(module, MomentumSAM(RHO))
    assert "\n" not in str(said.value)
    assert len(module.forward_weights) == (name == "NoMomentum")


@pytest.mark.parametrize("large", [True, False])
def test_an_optimizer_that_steps_unseen_in_the_backward_pass_is_refused(large, monkeypatch):
    """Restoring the weights would undo what it writes to them through ``.data``."""
    if large:
        monkeypatch.setattr("lightning_gr.core.storage.SMALLEST", 0)
    module = TinyModule()
    steps = []

    def step(param):
        steps.append(0)
        if len(steps) > 5:  # neither in the first step nor in one that is looked at more closely
            param.data.sub_(param.grad)

    module.net[0].weight.register_post_accumulate_grad_hook(step)
    with pytest.raises(RuntimeError, match="stepped in a hook during the backward pass"):
        fit(module, MomentumSAM(RHO), max_epochs=5)
    assert len(steps) == 6


def test_sam_in_addition_is_refused():
    with pytest.raises(MisconfigurationException, match="at most one method besides flooding"):
        fit(TinyModule(), MomentumSAM(RHO), SAM(0.1))


def test_excluded_parameters_are_not_moved():
    module = Watched()
    starts = []

    class Starts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            starts.append(weights(module.net))

    fit(module, Starts(), MomentumSAM(RHO, exclude=["*.bias"]))
    for inside, start in list(zip(module.forward_weights, starts, strict=True))[1:]:
        assert [n for n in start if torch.equal(inside[n], start[n])] == ["0.bias", "2.bias"]
        moved = torch.cat([(inside[n] - start[n]).flatten() for n in start])
        torch.testing.assert_close(moved.norm(), torch.tensor(RHO, dtype=moved.dtype))


def test_the_schedule():
    module, starts = Watched(), []

    class Starts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            starts.append(weights(module.net))

    fit(module, Starts(), MomentumSAM(RHO, start_step=2, interval=2, warmup_steps=8), max_epochs=3)
    moved = [
        torch.cat([(i[n] - s[n]).flatten() for n in s]).norm()
        for i, s in zip(module.forward_weights, starts, strict=True)
    ]
    expected = [0, 0, 0, 0, RHO * 2 / 8, 0, RHO * 4 / 8, 0, RHO * 6 / 8]
    torch.testing.assert_close(torch.stack(moved), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_a_radius_of_zero_is_plain_training():
    modules = [TinyModule(), TinyModule()]
    fit(modules[0], MomentumSAM(0.0))
    fit(modules[1])
    assert_same(weights(modules[0].net), weights(modules[1].net))


class Logged(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("gr/")})


@pytest.mark.parametrize("size", [1, 3])
def test_metrics(size, monkeypatch):
    """The gradient norm is that of the optimizer's gradient, and the sharpness is L(ahead) − L(θ)."""
    module, logged, clean = Watched(), Logged(), []

    class Losses(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                clean.append(cross_entropy(module.net, batch))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clean[-1] = outputs["loss"].detach() * size - clean[-1]

    fit(module, Losses(), MomentumSAM(RHO, metrics="all"), logged, log_every_n_steps=1, accumulate_grad_batches=size,
        max_epochs=2)  # fmt: skip
    row = logged.rows[-1]
    assert set(row) == {"gr/grad_norm", "gr/sharpness"}
    assert row["gr/sharpness"] == pytest.approx(float(torch.stack(clean[-size:]).mean()), rel=1e-5)
    assert abs(row["gr/sharpness"]) > 1e-4
    norm = torch.cat([g.flatten() for g in module.gradients[-1].values()]).norm()
    assert row["gr/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert len(module.forward_weights) == 6  # records of the pass for the clean loss are undone


def test_no_additional_pass_by_default():
    module, logged = Watched(), Logged()
    fit(module, MomentumSAM(RHO), logged, log_every_n_steps=1)
    assert len(module.forward_weights) == 3
    assert set(logged.rows[-1]) == {"gr/grad_norm"}
    with pytest.raises(ValueError, match="not to contain 'penalty' here, because there is a single pass"):
        MomentumSAM(metrics=["penalty"])


def test_manual_metrics():
    module = Manual()
    module.parts = 1
    logged = Logged()
    fit(module, MomentumSAM(RHO, metrics="all"), logged, log_every_n_steps=1, max_epochs=2)
    automatic, expected = TinyModule(), Logged()
    fit(automatic, MomentumSAM(RHO, metrics="all"), expected, log_every_n_steps=1, max_epochs=2)
    assert logged.rows[-1] == pytest.approx(expected.rows[-1])


def test_as_the_rule_of_a_single_call():
    """Without a callback, the mixin accepts the rule itself."""

    class ByRule(GradientRegularizationMixin, TinyModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.regularized_step(self.optimizers(), lambda: self.loss(self.net, batch), rule=MomentumSAMRule(RHO))

    by_rule, expected = ByRule(), TinyModule()
    fit(by_rule)
    fit(expected, MomentumSAM(RHO))
    assert_same(weights(by_rule.net), weights(expected.net))


class WithNorm(TinyModule):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("update", [False, True])
def test_statistics_of_batchnorm(update):
    """Statistics are those at the moved weights, unless they are recomputed at the end, which changes nothing else."""
    module, other = WithNorm(), WithNorm()
    fit(module, MomentumSAM(RHO, update_batchnorm=update), max_epochs=3)
    fit(other, MomentumSAM(RHO), max_epochs=3)
    assert_same(weights(module.net), weights(other.net))
    if update:
        torch.optim.swa_utils.update_bn(make_loader(), other)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])
    assert module.net[1].momentum == 0.1


def test_modules_and_batches_that_cannot_update_batchnorm():
    with pytest.raises(
        MisconfigurationException, match="runs the training data through `forward`, which TinyModule does"
    ):
        fit(TinyModule(), MomentumSAM(RHO, update_batchnorm=True))

    class OfDicts(WithNorm):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net, (batch["x"], batch["y"]))

    batches = DataLoader([{"x": x, "y": y} for x, y in make_loader()], batch_size=None)
    with pytest.raises(MisconfigurationException, match="got dict: leave `update_batchnorm` out"):
        fit(OfDicts(), MomentumSAM(RHO, update_batchnorm=True), loader=batches)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_a_loss():
    class Sometimes(TinyModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    for size in (1, 3):
        module = Sometimes()
        fit(module, MomentumSAM(RHO, metrics="all"), max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=size)
        assert all(p.isfinite().all() for p in module.parameters())


def test_adam_starts_as_without_the_callback():
    """Looking for a momentum must not create entries in the optimizer's state, which would break Adam."""
    module = TinyModule(mlp(), optimizer=torch.optim.Adam)
    fit(module, MomentumSAM(RHO), max_epochs=2)
    assert {len(state) for state in module.optimizers().state.values()} == {3}
