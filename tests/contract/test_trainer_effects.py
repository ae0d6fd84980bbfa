"""The contract for effects on the Trainer: logs, printing, checkpoints, ``should_stop``, schedulers."""

import pytest
import pytorch_lightning as pl
import torch
from contract import (
    LIGHTNING,
    Batches,
    Situation,
    build,
    check_no_trace,
    contract,
    make_trainer,
    over,
    same,
    train,
    witness,
)
from oracle import FGR, HUGE
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger

from lightning_gr import GradientRegularizationMixin

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")


class InTrainer(Situation):
    """Has side effects on its Trainer while it computes its loss."""

    forms, has_oracle = LIGHTNING, False

    def step(self, batch):
        loss = self.mse(batch)
        self.affect(loss)
        return loss

    def affect(self, loss):
        raise NotImplementedError


class Decays(InTrainer):
    """A learning rate set by hand."""

    def affect(self, loss):
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.9 * group["lr"] + 1e-30
            group["decay"] = group.get("decay", 1.0) * 0.9


class DecaysByLoss(InTrainer):
    """A rate that depends on the loss, through Lightning's wrapper."""

    def affect(self, loss):
        optimizer = self.optimizers()
        optimizer.param_groups[0]["weight_decay"] = float(loss.detach()) * 1e-9


class Scheduled(InTrainer):
    """A scheduler that is stepped in the training step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    def affect(self, loss):
        self.lr_schedulers().step()


class Plateau(InTrainer):
    """The module's own scheduler, which depends on the loss."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["lr"] = 1e-30
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, eps=0.0)
        return optimizer

    def affect(self, loss):
        self.schedule.step(loss.detach())


class OptimizerState(InTrainer):
    """Changes the optimizer's state: resets momentum, and keeps a counter there."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def affect(self, loss):
        state = self.trainer.optimizers[0].state[self.net.weight]
        state["seen"] = state.get("seen", 0) + 1
        STATES.append(state["seen"])
        self.notes = [*getattr(self, "notes", []), state["seen"]]


class StateInPlace(OptimizerState):
    """Writes in place to a tensor of the optimizer's state."""

    def affect(self, loss):
        state = self.trainer.optimizers[0].state[self.net.weight]
        state.setdefault("trace", torch.ones(3000)).mul_(0.9)
        witness(state["trace"])
        self.notes = [*getattr(self, "notes", []), float(state["trace"][7])]


class NewState(OptimizerState):
    """Clears the optimizer's state, as after a change of tasks."""

    def affect(self, loss):
        optimizer = self.trainer.optimizers[0]
        witness(len(optimizer.state))
        optimizer.state.clear()
        optimizer.restarts = getattr(optimizer, "restarts", 0) + 1
        witness(optimizer.restarts)


class TrainerAttributes(InTrainer):
    """Extends the training, changes limits, and sets a custom attribute."""

    def affect(self, loss):
        trainer = self.trainer
        trainer.fit_loop.max_epochs += 1
        trainer.fit_loop.epoch_loop.max_steps = max(trainer.max_steps, 0) + 5
        trainer.seen = getattr(trainer, "seen", 0) + 1
        trainer.losses = [*getattr(trainer, "losses", []), float(loss.detach())]
        trainer.by_step = getattr(trainer, "by_step", {})
        trainer.by_step[len(trainer.losses)] = trainer.limit_val_batches
        trainer.limit_val_batches *= 0.9
        witness((trainer.max_epochs, trainer.max_steps, trainer.seen, len(trainer.by_step)))
        if len(trainer.by_step) == 9:
            trainer.should_stop = True


class Data(pl.LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches, self.difficulty = batches, 1.0

    def train_dataloader(self):
        return Batches(self.batches)


class Stops(InTrainer):
    """Requests to stop if the loss is very large, which only happens at the moved weights."""

    def affect(self, loss):
        if loss > 100:
            self.trainer.should_stop = True


class Logs(InTrainer):
    """Logs in every way that the module offers."""

    def affect(self, loss):
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"a": loss.detach() * 2}, on_epoch=True)


class CallbackMetrics(InTrainer):
    """Writes metrics without ``self.log``."""

    def affect(self, loss):
        self.trainer.callback_metrics["mine"] = loss.detach()
        self.trainer.callback_metrics["calls"] = self.trainer.callback_metrics.get("calls", torch.zeros(())) + 1
        self.trainer.logged_metrics["most"] = max(loss.detach(), self.trainer.logged_metrics.get("most", 0 * loss))
        self.trainer.progress_bar_metrics["now"] = float(loss.detach())


class MetricsInPlace(InTrainer):
    """Writes to a metric in place."""

    def affect(self, loss):
        metrics = self.trainer.callback_metrics
        metrics.setdefault("calls", torch.zeros(())).add_(1)
        witness(metrics["calls"])


STATES = []

test_leaves_no_trace, _ = contract(
    Decays,
    DecaysByLoss,
    Scheduled,
    Plateau,
    OptimizerState,
    NewState,
    StateInPlace,
    TrainerAttributes,
    Stops,
    Logs,
    CallbackMetrics,
    MetricsInPlace,
)
del _


@pytest.mark.parametrize("form", LIGHTNING)
def test_the_datamodule(form):
    """Attributes of the datamodule are restored."""

    class Curriculum(InTrainer):
        def affect(self, loss):
            self.trainer.datamodule.difficulty *= 1.1
            witness(self.trainer.datamodule.difficulty)

    seen = []
    for method in (None, HUGE):
        module = build(Curriculum, form, mixin=form == "mixin" and method is not None)
        data = Data(module.make_batches())
        callbacks = [] if method is None else [method.callback()]
        make_trainer(*callbacks, accumulate_grad_batches=3 if form == "accumulation" else 1).fit(module, data)
        seen.append(data.difficulty)
    assert seen == [pytest.approx(1.1**9)] * 2


@over(OptimizerState)
def test_the_state_of_the_optimizer(kind, form):
    counts = []
    for method in (None, HUGE):
        STATES.clear()
        found = train(kind, form, method)
        counts.append(found.trainer.optimizers[0].state[found.module.net.weight]["seen"])
    assert counts == [9, 9]


# --- checkpoints


class Saves(InTrainer):
    """Overwrites its checkpoint in each step."""

    def affect(self, loss):
        self.trainer.save_checkpoint(PLACE["path"] / f"{PLACE['name']}.ckpt")


class SavesTheBest(InTrainer):
    """Names checkpoints by their loss, so that one of a second pass would be another file."""

    def affect(self, loss):
        self.trainer.save_checkpoint(PLACE["path"] / f"{PLACE['name']} {float(loss.detach()):.6f}.ckpt", True)


PLACE = {}


@over(Saves, SavesTheBest)
def test_checkpoints_contain_the_clean_weights(kind, form, tmp_path):
    folders = []
    for index, method in enumerate((None, HUGE)):
        PLACE.update(path=tmp_path / str(index), name="good")
        found = train(kind, form, method)
        files = {path.name: path for path in sorted(PLACE["path"].iterdir())}
        folders.append({name: torch.load(path, weights_only=False)["state_dict"] for name, path in files.items()})
        for state in folders[-1].values():
            assert torch.equal(state["net.weight"], found.module.net.weight)
    assert folders[0].keys() == folders[1].keys()


# --- loggers that are called directly


class Recording(Logger):
    """A logger that keeps everything it gets, like a remote service."""

    def __init__(self):
        super().__init__()
        self.rows, self.run = [], Run()

    name = version = "recording"

    @property
    def experiment(self):
        return self.run

    def log_metrics(self, metrics, step=None):
        # Lightning adds the epoch to what the callback logs
        direct = {k: v for k, v in metrics.items() if not k.startswith("gr/") and k != "epoch"}
        if direct:
            self.rows.append((direct, step))

    def log_hyperparams(self, *args, **kwargs):
        """Ignore hyperparameters."""


class Run:
    """A client such as wandb's or a SummaryWriter, which cannot take back what it has sent."""

    def log(self, values):
        SENT.append(values)

    def add_scalar(self, name, value, step):
        SENT.append((name, value, step))


SENT = []


class ByLogger(InTrainer):
    def affect(self, loss):
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)


class ByExperiment(InTrainer):
    def affect(self, loss):
        self.logger.experiment.add_scalar("loss", float(loss.detach()), self.global_step)
        self.logger.experiment.log({"loss": float(loss.detach())})


class OwnWriter(InTrainer):
    """The module's own writer, in a dictionary."""

    def prepare(self):
        self.tools = {"writer": SummaryWriter()}

    def affect(self, loss):
        self.tools["writer"].add_scalar("loss", float(loss.detach()), self.global_step)


class SummaryWriter(Run):
    """Recognized by its name, like TensorBoard's."""


class ByAllLoggers(InTrainer):
    def affect(self, loss):
        for logger in self.trainer.loggers:
            logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
            logger.experiment.log({"loss": float(loss.detach())})


class KeptExperiment(InTrainer):
    """Keeps a reference to the experiment: ``self.writer``."""

    def on_train_start(self):
        self.writer = self.logger.experiment

    def affect(self, loss):
        self.writer.add_scalar("loss", float(loss.detach()), self.global_step)


@over(ByLogger, ByExperiment, ByAllLoggers, KeptExperiment, OwnWriter)
def test_loggers_that_are_called_directly_get_one_row(kind, form):
    seen = []
    for method in (None, HUGE):
        SENT.clear()
        logger = Recording()
        train(kind, form, method, logger=logger, log_every_n_steps=1)
        seen.append((logger.rows, list(SENT)))
    assert len(seen[0][0] + seen[0][1]) >= 9
    assert seen[1] == seen[0]


class ByCSV(InTrainer):
    """A logger of Lightning whose experiment has state."""

    def affect(self, loss):
        self.logger.experiment.log_metrics({"direct": float(loss.detach())}, self.global_step)


@over(ByCSV)
def test_a_csv_logger(kind, form, tmp_path):
    texts = []
    for index, method in enumerate((None, FGR)):
        train(kind, form, method, logger=CSVLogger(tmp_path, version=index), log_every_n_steps=100)
        lines = (tmp_path / "lightning_logs" / f"version_{index}" / "metrics.csv").read_text().splitlines()
        texts.append(lines)
    assert len(texts[0]) == len(texts[1]) >= 3
    assert texts[0] == texts[1]


def test_printing_is_muted(capsys):
    class Prints(InTrainer):
        def affect(self, loss):
            self.print("a line")

    outputs = []
    for method in (None, HUGE):
        capsys.readouterr()
        train(Prints, "automatic", method)
        outputs.append(capsys.readouterr().out.count("a line"))
    assert outputs == [9, 9]


def test_several_optimizers_with_the_mixin():
    """A closure for one optimizer steps the scheduler of the other one."""

    class Both(GradientRegularizationMixin, InTrainer):
        def configure_optimizers(self):
            first = torch.optim.SGD([self.net.weight], lr=0.0)
            second = torch.optim.SGD([self.net.bias], lr=0.1)
            return [first, second], [torch.optim.lr_scheduler.StepLR(second, 1, 0.5)]

        def training_step(self, batch, batch_idx):
            def loss_fn():
                self.lr_schedulers().step()
                self.optimizers()[0].param_groups[0]["seen"] = self.lr_schedulers().last_epoch
                return self.mse(batch)

            self.regularized_step(self.optimizers()[0], loss_fn)

    module = Both()
    module.automatic_optimization = False
    trainer = make_trainer(HUGE.callback())
    trainer.fit(module, Batches(module.make_batches()))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 9
    assert trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**9)
    assert trainer.optimizers[0].param_groups[0]["seen"] == 9


def test_the_comparison_of_trainers_detects_effects_of_steps():
    """Otherwise the tests above would be meaningless."""
    plain = train(Decays, "automatic")
    assert plain.trainer.optimizers[0].param_groups[0]["decay"] == pytest.approx(0.9**9)
    with pytest.raises(pytest.fail.Exception):
        same("learning rates", {"lr": plain.trainer.optimizers[0].param_groups[0]["lr"]}, {"lr": 0.0})
    check_no_trace(Logs, "automatic", FGR, log_every_n_steps=1)
