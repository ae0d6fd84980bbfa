"""Callbacks that only monitor: the gradient norm of each step, and the sharpness every few epochs."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_gr._compat import (
    REFUSED_STRATEGIES,
    CallbackBase,
    MisconfigurationException,
    gradients_are_scaled,
    has_base_named,
    will_log,
)
from lightning_gr._validate import check_bool, check_choice, check_int, check_number
from lightning_gr.callbacks.checks import check_fsdp1, check_overrides
from lightning_gr.callbacks.ranks import sharding
from lightning_gr.callbacks.recorder import loss_scale, surroundings_of
from lightning_gr.core.sharding import plain_are_shards
from lightning_gr.core.tensors import global_norm
from lightning_gr.core.two_pass import NoLossError, extract_loss
from lightning_gr.report.measurement import layer_norms, layers_of
from lightning_gr.report.step_log import StepLog
from lightning_gr.sharpness.estimates import HessianEigenvalue, HessianTrace, estimate_trace, lanczos
from lightning_gr.sharpness.hessian import HESSIAN_METHODS, HessianMethod, HessianProducts

if TYPE_CHECKING:
    from lightning_gr._compat import AnyModule as LightningModule
    from lightning_gr._compat import AnyTrainer as Trainer

__all__ = ["GradientNormMonitor", "SharpnessMonitor"]


class GradientNormMonitor(CallbackBase):  # type: ignore[misc]
    """Logs the norm of the gradient passed to the optimizer, before the Trainer clips it, without changing training.

    It works with automatic and manual optimization and any strategy. With 16-mixed, the gradient is unscaled; with DDP,
    it is the mean over devices; with FSDP2, it is that of the full model. The norm is computed on the device, on the
    steps that Lightning logs. Combined with :class:`~lightning_gr.GradientRegularization` or
    :class:`~lightning_gr.SAM`, it is the norm of the regularized gradient, while ``gr/grad_norm`` is that of the clean
    one.

    Args:
        by_layer: Whether to also log the norm of each layer, as ``grad_norm/NAME``.
        prefix: The prefix of the keys. With multiple optimizers, it is followed by ``optimizer_0/`` and so on.
        prog_bar: Whether to show the norm in the progress bar.

    Raises:
        ValueError: If an argument has the wrong type.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[GradientNormMonitor()], logger=False, accelerator="cpu")
    """

    def __init__(self, by_layer: bool = False, *, prefix: str = "", prog_bar: bool = False) -> None:
        super().__init__()
        check_overrides(type(self), GradientNormMonitor)
        check_bool("by_layer", by_layer)
        check_bool("prog_bar", prog_bar)
        self.by_layer = by_layer
        self.prefix, self.prog_bar = prefix, prog_bar
        self.step_log = self._new_log()
        self._values: dict[str, Tensor] = {}

    def _new_log(self) -> StepLog:
        return StepLog(self.prefix, ("grad_norm",) if self.prog_bar else ())

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Discard the values of an earlier run."""
        self.step_log = self._new_log()
        self._values = {}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the unscaled gradient that is passed to the optimizer."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if will_log(trainer):
            with sharding(trainer, check_fsdp1(trainer)):
                self._measure(trainer, pl_module, optimizer, params)

    def _measure(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        optimizer: torch.optim.Optimizer,
        params: Sequence[Tensor],
    ) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        if not grads and not plain_are_shards():
            return
        scale = loss_scale(trainer, pl_module.device) if gradients_are_scaled(optimizer) else None
        norm = global_norm(grads, like=params)
        values = {"grad_norm": norm if scale is None else norm / scale}
        if self.by_layer:
            ids = {id(param) for param in params}
            layers = {n: [p for p in ps if id(p) in ids] for n, ps in layers_of(pl_module).items()}
            present = {name: ps for name, ps in layers.items() if ps}
            values |= {f"grad_norm/{name}": value for name, value in layer_norms(present, scale).items()}
        several = len(trainer.optimizers) > 1
        group = f"optimizer_{trainer.optimizers.index(optimizer)}/" if several else ""
        self._values |= {group + name: value for name, value in values.items()}

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the values measured in this step."""
        if self._values or will_log(trainer):
            self.step_log.log(trainer, pl_module, self._values)
            self._values = {}


class SharpnessMonitor(CallbackBase):  # type: ignore[misc]
    """Logs the largest eigenvalue and the trace of the training loss's Hessian, every few epochs on a fixed batch.

    ``hessian/eigenvalue`` is λ from Lanczos iteration until ‖H u − λ u‖ ≤ ``tolerance`` · λ. ``hessian/trace`` is
    Hutchinson's estimate, and ``hessian/trace_error`` its standard error. The loss is that of ``training_step`` on the
    first training batch of the run for which it returns one, in eval mode (no dropout, BatchNorm with its running
    statistics) and without autocast. Training stays bit for bit as it is without the monitor. Each product with the
    Hessian takes about two passes over the batch. With DDP, H is the Hessian of the mean loss over the batches of all
    ranks, so each product is averaged over ranks. Hooks on parameters (``register_hook``) do not run in the meantime,
    since their effect on gradients is not part of the loss.

    For a different batch or loss, for example in manual optimization, override :meth:`loss`.

    Args:
        every_n_epochs: Measure after every ``every_n_epochs``-th epoch.
        eigenvalue: Whether to measure the largest eigenvalue.
        trace: Whether to measure the trace.
        max_iterations: The maximum number of products for the eigenvalue.
        tolerance: The relative residual at which the iteration for the eigenvalue stops.
        samples: The number of products for the trace.
        method: ``"auto"``, ``"double_backward"`` or ``"finite_difference"``, see
            :class:`~lightning_gr.sharpness.hessian.HessianProducts`.
        seed: The seed of the random vectors, which are the same for each measurement.
        prefix: The prefix of the keys.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At the start of ``fit``, if parameters are sharded, or in manual optimization if
            :meth:`loss` is not overridden.

    Source: See :func:`~lightning_gr.hessian_eigenvalue` and :func:`~lightning_gr.hessian_trace`.

    Example::

        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[SharpnessMonitor(every_n_epochs=5)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        *,
        eigenvalue: bool = True,
        trace: bool = True,
        max_iterations: int = 100,
        tolerance: float = 1e-2,
        samples: int = 30,
        method: HessianMethod = "auto",
        seed: int = 0,
        prefix: str = "hessian/",
    ) -> None:
        super().__init__()
        check_overrides(type(self), SharpnessMonitor)
        for name, number in (("every_n_epochs", every_n_epochs), ("max_iterations", max_iterations)):
            check_int(name, number, minimum=1)
        check_int("samples", samples, minimum=2)
        check_int("seed", seed, minimum=0)
        check_bool("eigenvalue", eigenvalue)
        check_bool("trace", trace)
        check_number("tolerance", tolerance, positive=True)
        check_choice("method", method, HESSIAN_METHODS)
        self.every_n_epochs, self.eigenvalue, self.trace = every_n_epochs, eigenvalue, trace
        self.max_iterations, self.tolerance, self.samples = max_iterations, tolerance, samples
        self.method, self.seed, self.prefix = method, seed, prefix
        self._batch: Any = None
        self._batch_idx = 0
        self._has_loss = False  # whether training_step returned a loss for that batch
        self.results: list[tuple[int, HessianEigenvalue | None, HessianTrace | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Omit the state of the current run."""
        return {**vars(self), "_batch": None, "results": []}

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Raise if this Trainer or module is not supported."""
        if stage != "fit":
            return
        if has_base_named(trainer.strategy, "ModelParallelStrategy", "FSDPStrategy", *REFUSED_STRATEGIES):
            raise MisconfigurationException(
                f"SharpnessMonitor needs all parameters on each device, but {type(trainer.strategy).__name__} shards"
                " them: measure a checkpoint on one device with `lightning_gr.hessian_eigenvalue`, or use"
                " `Trainer(strategy='ddp')`"
            )
        if not pl_module.automatic_optimization and type(self).loss is SharpnessMonitor.loss:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} uses manual optimization, so its `training_step` does not just return a"
                " loss: override `SharpnessMonitor.loss(self, pl_module, batch)`"
            )

    def loss(self, pl_module: "LightningModule", batch: Any) -> Any:
        """Compute the loss whose Hessian is measured. Override this for a different loss.

        Args:
            pl_module: The module, in eval mode.
            batch: The first training batch of the run for which ``training_step`` returned a loss, on the device.
        """
        params = inspect.signature(pl_module.training_step).parameters
        return pl_module.training_step(batch, self._batch_idx) if len(params) > 1 else pl_module.training_step(batch)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Discard the batch and the results of an earlier run."""
        self._batch, self._has_loss, self.results = None, False, []

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keep a copy of the first batch."""
        if self._batch is None:
            self._batch, self._batch_idx = copy.deepcopy(batch), batch_idx

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Discard the batch if ``training_step`` returned no loss for it, so that the next one is kept."""
        if not self._has_loss:
            by_step = pl_module.automatic_optimization and type(self).loss is SharpnessMonitor.loss
            self._has_loss = not by_step or extract_loss(outputs) is not None
            if not self._has_loss:
                self._batch = None

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Measure and log, if this epoch is due."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self._batch is not None and not trainer.barebones:
            try:
                values = self._measure(trainer, pl_module)
            except NoLossError:
                if trainer.world_size > 1:
                    raise  # the other ranks wait for this one
                rank_zero_warn(
                    "training_step returned None in eval mode or at displaced weights, on a batch for which it returned"
                    " a loss in training, so its sharpness is not measured: override `SharpnessMonitor.loss`"
                )
                return
            tensors = {self.prefix + name: torch.tensor(v, device=pl_module.device) for name, v in values.items()}
            several = trainer.world_size > 1
            pl_module.log_dict(tensors, on_step=False, on_epoch=True, batch_size=1, sync_dist=several)

    def _measure(self, trainer: "Trainer", pl_module: "LightningModule") -> dict[str, float]:
        products = HessianProducts(
            # copied each time, since the step may change its batch in place
            lambda: self.loss(pl_module, copy.deepcopy(self._batch)),
            pl_module,
            method=self.method,
            surroundings=surroundings_of(trainer, pl_module),
            average=_average_over_ranks if trainer.world_size > 1 else None,
        )
        plugin = trainer.precision_plugin
        context = nullcontext() if has_base_named(plugin, "MixedPrecision") else plugin.train_step_context()
        value = trace = None
        with _in_eval_mode(pl_module), context, products:
            if self.eigenvalue:
                value = lanczos(
                    products, max_iterations=self.max_iterations, tolerance=self.tolerance, generator=self._generator()
                )
            if self.trace:
                trace = estimate_trace(
                    products, max_samples=self.samples, min_samples=self.samples, generator=self._generator()
                )
        self.results.append((trainer.current_epoch, value, trace))
        values = {} if value is None else {"eigenvalue": value.value}
        return values if trace is None else values | {"trace": trace.value, "trace_error": trace.standard_error}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Free the batch."""
        self._batch = None


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put all submodules into eval mode, and restore each one's own flag afterwards."""
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in flags:
            submodule.training = False
        yield
    finally:
        for submodule, flag in flags:
            submodule.training = flag


def _average_over_ranks(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
    torch._foreach_div_(list(tensors), torch.distributed.get_world_size())
