"""Assumptions of the compatibility layer about Lightning and torch; docstrings name the private APIs."""

import _signal
import _thread
import inspect
import signal
import threading

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from modules import TinyModule, fit, make_trainer
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn

from lightning_gr import _compat
from lightning_gr._compat import (
    forget_logged,
    gradients_are_scaled,
    hook_tables,
    is_error_node,
    is_python_thread,
    is_writer,
    lightning_attributes,
    logged_results,
    loggers_and_methods,
    namespace_of,
    overrides_hook,
    signal_handler,
    spawns_ranks,
    storage_uses,
    torchs_own_methods,
    trainer_parts,
    will_log,
    with_hooks,
    wrap_after_backward,
    writing_methods,
)


def test_fused_optimizers_declare_that_they_unscale_gradients():
    """`_step_supports_amp_scaling` of torch's optimizers."""
    weight = [nn.Parameter(torch.zeros(2))]
    assert gradients_are_scaled(torch.optim.Adam(weight, fused=True))
    assert not gradients_are_scaled(torch.optim.Adam(weight))


def test_lightning_accesses_each_experiment_before_training():
    """`_call_setup_hook` of Lightning creates them, so accessing them again creates none."""
    asked = []

    class Counts(DummyLogger):
        @property
        def experiment(self):
            asked.append(len(steps))
            return super().experiment

    steps = []
    trainer = fit(TinyModule(loss=lambda net, batch: steps.append(batch) or net(batch[0]).sum()), logger=Counts())
    assert asked[0] == 0
    assert steps
    assert trainer.logger.experiment in [owner for owner, _ in loggers_and_methods(trainer)]


def test_writers_are_recognized_by_name():
    class SummaryWriter:
        def add_scalar(self): ...
        def get_logdir(self): ...

    class Own(SummaryWriter): ...

    assert is_writer(Own())
    assert not is_writer(pl.Trainer)
    assert writing_methods(Own()) == ["add_scalar"]


def test_attributes_of_the_trainer_that_a_step_may_change():
    """`max_epochs`, `max_steps` and the dictionaries of metrics are in the expected places."""
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    parts = trainer_parts(trainer)
    assert {"should_stop", "limit_val_batches"} <= parts["trainer"].keys()
    assert "max_epochs" in parts["trainer.fit_loop"]
    assert "max_steps" in parts["trainer.fit_loop.epoch_loop"]
    trainer.callback_metrics["mine"] = 1
    assert {"mine": 1} in [value for value in parts["trainer.logged"].values() if isinstance(value, dict)]


def test_hooks_after_a_backward_pass_run_in_the_precision_plugin():
    """`Precision.post_backward`, found on the instance."""
    ran = []

    class Hooked(TinyModule):
        def on_after_backward(self):
            ran.append("hook")

        def on_train_start(self):
            def wrapper(*args):
                ran.append("before")
                result = original(*args)
                ran.append("after")
                return result

            original, self.unwrap = wrap_after_backward(self.trainer, wrapper)

        def on_train_end(self):
            self.unwrap()

    trainer = fit(Hooked(), limit_train_batches=1)
    assert ran == ["before", "hook", "after"]
    assert "post_backward" not in vars(trainer.precision_plugin)


def test_hooks_of_the_user():
    assert not overrides_hook(TinyModule(), "on_after_backward")
    assert not overrides_hook(pl.Callback(), "on_after_backward")
    assert overrides_hook(type("Own", (pl.Callback,), {"on_after_backward": print})(), "on_after_backward")


def test_the_namespace_of_a_class():
    import lightning.pytorch

    assert namespace_of() == namespace_of(pl.LightningModule, torch.nn.Module) == "pytorch_lightning"
    assert namespace_of(type("Own", (lightning.pytorch.LightningModule,), {})) == "lightning.pytorch"


def test_aliases_of_a_storage_count_while_they_exist():
    """`torch._C._storage_Use_Count`."""
    param = nn.Parameter(torch.zeros(3))
    assert storage_uses(param) == 1
    alias = param.data
    assert storage_uses(param) == 2
    del alias
    assert storage_uses(param) == 1


def test_the_node_that_raises_is_recognized_by_its_name():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(1, requires_grad=True)
    (g,) = torch.autograd.grad(Once.apply(x) * x, x, create_graph=True)
    nodes, waiting = [], [g.grad_fn]
    while waiting:
        nodes.append(waiting.pop())
        waiting += [node for node, _ in nodes[-1].next_functions if node is not None]
    assert [is_error_node(node) for node in nodes].count(True) == 1


def test_attributes_set_by_lightning_are_not_the_users():
    """Instance attributes of a new LightningModule and of torch's Module."""
    own = vars(TinyModule()).keys() - lightning_attributes()
    assert own == {"loss", "optimizer", "scheduler", "gradients"}


def test_results_that_log_writes_to():
    """`trainer._results`, whose entries contain their key, and whether the Trainer will log in this step."""
    found = []

    class Looks(TinyModule):
        def training_step(self, batch, batch_idx):
            self.log("mine", 2.0 + batch_idx)
            self.log("other", 1.0)
            found.append((will_log(self.trainer), {r.meta.name for r in logged_results(self).values()}))
            forget_logged(self.trainer, {"mine"})
            found.append({r.meta.name: r.value.item() for r in logged_results(self).values()})
            return super().training_step(batch, batch_idx)

    fit(Looks(), log_every_n_steps=2)
    assert [due for due, _ in found[::2]] == [False, True, False]
    assert found[0][1] == {"mine", "other"}
    assert {values["other"] for values in found[1::2]} == {1.0}
    assert 2.0 not in {values["mine"] for values in found[1::2]}
    assert logged_results(TinyModule()) is None


def test_foreign_threads_are_distinguished_from_pythons():
    """`threading._DummyThread`, which represents threads that a library has started."""
    found, done = [is_python_thread()], threading.Event()

    def ask():
        found.append(is_python_thread())
        threading.current_thread()  # as `logging` does
        found.append(is_python_thread())
        done.set()

    _thread.start_new_thread(ask, ())
    done.wait(10)
    thread = threading.Thread(target=lambda: found.append(is_python_thread()))
    thread.start()
    thread.join()
    assert found == [True, False, False, True]


def test_hooks_can_be_replaced_in_the_tables_of_a_tensor():
    """`Tensor._backward_hooks` and `_post_accumulate_grad_hooks` are read by C++ in each backward pass."""
    weight, seen = nn.Parameter(torch.ones(2)), []
    assert hook_tables(weight) == [{}, {}]
    first = weight.register_hook(lambda grad: seen.append("first"))
    last = weight.register_post_accumulate_grad_hook(lambda param: seen.append("last"))
    for table, name in zip(hook_tables(weight), ("other", "other last"), strict=True):
        (number,) = table
        table[number] = lambda tensor, name=name: seen.append(name)
    weight.sum().backward()
    assert seen == ["other", "other last"]
    assert first.id != last.id
    first.remove()
    last.remove()
    assert hook_tables(weight) == [{}, {}]


def test_tensor_subclasses_can_be_handled_by_torch_itself():
    """`torch._C.DisableTorchFunctionSubclass`: results are plain tensors, and `__torch_function__` is not called."""

    class Asks(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise TypeError("asked")

    tensor = torch.zeros(2).as_subclass(Asks)
    with torchs_own_methods():
        assert type(torch.Tensor.detach(tensor)) is torch.Tensor
        assert type(tensor.data) is torch.Tensor
    with pytest.raises(TypeError, match="asked"):
        torch.Tensor.detach(tensor)


def test_tensors_with_hooks_of_either_kind_are_found():
    tensors = [nn.Parameter(torch.ones(2)) for _ in range(5)]
    tensors[1].register_hook(print)
    tensors[3].register_post_accumulate_grad_hook(print)
    tensors[4].register_hook(print).remove()
    assert list(map(id, with_hooks(tensors))) == [id(tensors[1]), id(tensors[3])]
    assert [any(hook_tables(tensor)) for tensor in tensors] == [False, True, False, True, False]


def test_ddp_keeps_hooks_with_their_states():
    class Model:
        _comm_hooks = [(print, None), (print, True), (print, []), (print, dist.ProcessGroup(0, 1))]  # noqa: RUF012

    assert _compat.comm_hook_states(Model()) == [[]]
    assert _compat.has_comm_hooks(Model())
    assert _compat.comm_hook_states(nn.Linear(1, 1)) == []
    assert not _compat.has_comm_hooks(nn.Linear(1, 1))
    assert "self._comm_hooks.append((hook, state))" in inspect.getsource(nn.parallel.DistributedDataParallel)


def test_a_single_device_is_not_fsdp1():
    assert not _compat.is_fsdp1(make_trainer())


def test_signal_handlers_equal_those_of_the_public_function():
    """`_signal.getsignal`, which skips the conversion to an enum."""
    assert [signal_handler(n) for n in signal.valid_signals()] == [signal.getsignal(n) for n in signal.valid_signals()]
    assert signal_handler.__globals__["_getsignal"] is _signal.getsignal


@pytest.mark.parametrize(("strategy", "spawns"), [("ddp_spawn", True), ("ddp_fork", True), ("auto", False)])
def test_strategies_that_start_their_ranks_in_fit(strategy, spawns):
    """`_MultiProcessingLauncher` of Lightning."""
    devices = 1 if strategy == "auto" else 2
    trainer = pl.Trainer(strategy=strategy, devices=devices, accelerator="cpu", logger=False)
    assert spawns_ranks(trainer) is spawns
