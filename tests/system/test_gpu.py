"""The most important results of the other tests, on a GPU; skipped without one."""

import pytest
import pytorch_lightning as pl
import torch
from launching import free_port
from modules import METHODS, TinyModule, assert_near, make_loader, mlp, weights
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_gr import SAM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]


def fit(module, *callbacks, accelerator="gpu", devices=1, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 2, "enable_model_summary": False, **quiet, **options}
    pl.Trainer(accelerator=accelerator, devices=devices, callbacks=list(callbacks), **options).fit(
        module, make_loader()
    )
    return {n: p.cpu() for n, p in weights(module.net).items()}


@pytest.fixture
def one_rank(monkeypatch):
    """Prepare for a NCCL process group of one rank, and destroy it afterwards."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_cpu(name):
    on_cpu = fit(TinyModule(), METHODS[name].callback(), accelerator="cpu")
    assert_near(fit(TinyModule(), METHODS[name].callback()), on_cpu, 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_ddp_with_nccl(name, one_rank):
    expected = fit(TinyModule(), METHODS[name].callback())
    assert_near(fit(TinyModule(), METHODS[name].callback(), strategy=DDPStrategy()), expected, 1e-9)


class Sharded(TinyModule):
    def configure_model(self):
        torch.distributed.fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def test_fsdp2_with_nccl(one_rank):
    module = Sharded()
    fit(module, SAM(0.2), strategy=ModelParallelStrategy(1, 1))
    whole = {n: p.detach().full_tensor().cpu() for n, p in module.net.named_parameters()}
    assert_near(whole, fit(TinyModule(), SAM(0.2)), 1e-9)


def test_fsdp1_is_refused(one_rank):
    with pytest.raises(MisconfigurationException, match=r"does not work with FSDPStrategy.*ModelParallelStrategy"):
        fit(TinyModule(), SAM(0.2), strategy=FSDPStrategy())


class Single(TinyModule):
    """A module in float32, for gradient scalers."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].float(), batch[1]), batch_idx)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision(precision):
    full = fit(Single(mlp().float()), SAM(0.05))
    start = {n: p.detach() for n, p in mlp().float().named_parameters()}
    mixed = fit(Single(mlp().float()), SAM(0.05), precision=precision)
    moved = torch.cat([(full[n] - start[n]).flatten() for n in start])
    error = torch.cat([(full[n] - mixed[n]).flatten() for n in start])
    assert error.norm() < 0.1 * moved.norm()


def test_the_second_pass_never_waits_for_the_device():
    class Watched(TinyModule):
        def on_before_backward(self, loss):
            torch.cuda.set_sync_debug_mode("error")

        def on_before_optimizer_step(self, optimizer):
            torch.cuda.set_sync_debug_mode("default")

    for name in METHODS:
        fit(Watched(), METHODS[name].callback())


def test_measuring_never_waits_for_the_device():
    """No metric waits between the backward pass and the optimizer step."""

    class Watched(TinyModule):
        def on_before_backward(self, loss):
            torch.cuda.set_sync_debug_mode("error")

        def on_before_optimizer_step(self, optimizer):
            torch.cuda.set_sync_debug_mode("default")

    for name in METHODS:
        fit(Watched(), METHODS[name].callback(metrics=["all", "grad_norm_by_layer"]), log_every_n_steps=1)
