"""Callbacks that only look: the gradient norm of each step, and the sharpness every few epochs."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gr._compat import (
    REFUSED_STRATEGIES,
    CallbackBase,
    gradients_are_scaled,
    has_base_named,
    will_log,
)
from lightning_gr._validate import check_bool, check_choice, check_int, check_number
from lightning_gr.callbacks.checks import check_overrides
from lightning_gr.callbacks.recorder import loss_scale, surroundings_of
from lightning_gr.core.tensors import global_norm
from lightning_gr.core.two_pass import NoLossError, extract_loss
from lightning_gr.report.measurement import layer_norms, layers_of
from lightning_gr.report.step_log import StepLog
from lightning_gr.sharpness.estimates import HessianEigenvalue, HessianTrace, estimate_trace, lanczos
from lightning_gr.sharpness.hessian import HESSIAN_METHODS, HessianMethod, HessianProducts

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["GradientNormMonitor", "SharpnessMonitor"]


class GradientNormMonitor(CallbackBase):
    """Log the norm of the gradient that the optimizer gets, before the Trainer clips it, and change nothing.

    Works with any optimization and strategy: under 16-mixed the norm is that without the scaler's factor, under DDP
    that of the mean gradient, with FSDP2 that of the whole model. It is computed on the device, on the steps that
    Lightning logs. Beside :class:`~lightning_gr.GradientRegularization` or :class:`~lightning_gr.SAM` it is the norm of
    the regularized gradient, where ``gr/grad_norm`` is that of the clean one.

    Args:
        by_layer: Whether to log the norm of each layer, too, as ``grad_norm/NAME``.
        prefix: What the keys begin with, before ``grad_norm``. With several optimizers, ``optimizer_0/`` and so on
            follows it.
        prog_bar: Whether to show the norm in the progress bar, too.

    Raises:
        ValueError: If an argument is of another type.

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
        """Forget an earlier run."""
        self.step_log = self._new_log()
        self._values = {}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradient as the optimizer gets it, without a scaler's factor."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = [param.grad for param in params if param.grad is not None]
        if not grads or not will_log(trainer):
            return
        scale = loss_scale(trainer, pl_module.device) if gradients_are_scaled(optimizer) else None
        norm = global_norm(grads)
        values = {"grad_norm": norm if scale is None else norm / scale}
        if self.by_layer:
            own = {id(param) for param in params}
            layers = {n: [p for p in ps if id(p) in own] for n, ps in layers_of(pl_module).items()}
            present = {name: ps for name, ps in layers.items() if ps}
            values |= {f"grad_norm/{name}": value for name, value in layer_norms(present, scale).items()}
        several = len(trainer.optimizers) > 1
        group = f"optimizer_{trainer.optimizers.index(optimizer)}/" if several else ""
        self._values |= {group + name: value for name, value in values.items()}

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what this step measured."""
        if self._values or will_log(trainer):
            self.step_log.log(trainer, pl_module, self._values)
            self._values = {}


class SharpnessMonitor(CallbackBase):
    """Log the largest eigenvalue and the trace of the Hessian of the training loss, every few epochs on a fixed batch.

    ``hessian/eigenvalue`` is λ, by Lanczos iteration until ‖H u − λ u‖ ≤ ``tolerance`` · λ; ``hessian/trace`` is
    Hutchinson's estimate with ``hessian/trace_error``, its standard error. Both are those of the loss of
    ``training_step`` on the first training batch of the run that has one, in eval mode (dropout off, BatchNorm by its
    running statistics) and without autocast. Measuring leaves no trace: training is bit for bit what it is without. It
    takes about two passes over the batch per product with the Hessian. On several devices with DDP, H is that of the
    mean over the batches of all ranks, for which each product is averaged over them. Hooks on parameters
    (``register_hook``) do not run meanwhile: what they make of a gradient is no part of the loss.

    For another batch or another loss (in manual optimization, say), override :meth:`loss`.

    Args:
        every_n_epochs: After every how many epochs to measure.
        eigenvalue: Whether to measure the largest eigenvalue.
        trace: Whether to measure the trace.
        max_iterations: The most products for the eigenvalue.
        tolerance: Relative residual at which the eigenvalue is good enough.
        samples: The number of products for the trace.
        method: ``"auto"``, ``"double_backward"`` or ``"finite_difference"``, see
            :class:`~lightning_gr.sharpness.hessian.HessianProducts`.
        seed: Of the random vectors; the same ones each time.
        prefix: What the keys begin with.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: At the start of ``fit``, if parameters are spread over ranks, or in manual
            optimization without a :meth:`loss` of your own.

    Source: as of :func:`~lightning_gr.hessian_eigenvalue` and :func:`~lightning_gr.hessian_trace`.

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
        self._has_loss = False  # whether that batch is known to have one
        self.results: list[tuple[int, HessianEigenvalue | None, HessianTrace | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one run."""
        return {**vars(self), "_batch": None, "results": []}

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Check the context."""
        if stage != "fit":
            return
        if has_base_named(trainer.strategy, "ModelParallelStrategy", "FSDPStrategy", *REFUSED_STRATEGIES):
            raise MisconfigurationException(
                f"SharpnessMonitor needs all parameters on each device, but {type(trainer.strategy).__name__} spreads"
                " them: measure a checkpoint on one device with `lightning_gr.hessian_eigenvalue`, or use"
                " `Trainer(strategy='ddp')`"
            )
        if not pl_module.automatic_optimization and type(self).loss is SharpnessMonitor.loss:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes manually, so its `training_step` is no function that returns a"
                " loss: override `SharpnessMonitor.loss(self, pl_module, batch)`"
            )

    def loss(self, pl_module: "LightningModule", batch: Any) -> Any:
        """The loss whose Hessian is measured; override it for another one.

        Args:
            pl_module: The module, in eval mode.
            batch: The first training batch of the run for which ``training_step`` returned a loss, on the device.
        """
        takes = inspect.signature(pl_module.training_step).parameters
        return pl_module.training_step(batch, self._batch_idx) if len(takes) > 1 else pl_module.training_step(batch)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Forget an earlier run."""
        self._batch, self._has_loss, self.results = None, False, []

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batch."""
        if self._batch is None:
            self._batch, self._batch_idx = copy.deepcopy(batch), batch_idx

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the next batch if this one has no loss."""
        if not self._has_loss:
            by_step = pl_module.automatic_optimization and type(self).loss is SharpnessMonitor.loss
            self._has_loss = not by_step or extract_loss(outputs) is not None
            if not self._has_loss:
                self._batch = None

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Measure and log."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self._batch is not None and not trainer.barebones:
            try:
                values = self._measure(trainer, pl_module)
            except NoLossError:
                if trainer.world_size > 1:
                    raise  # the others wait for this one
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
            # a copy each time: the step may change its batch in place
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
        found = {} if value is None else {"eigenvalue": value.value}
        return found if trace is None else found | {"trace": trace.value, "trace_error": trace.standard_error}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Drop the batch."""
        self._batch = None


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Each module's own flag, also where some are in eval mode already."""
    flags = [(each, each.training) for each in module.modules()]
    try:
        for each, _ in flags:
            each.training = False
        yield
    finally:
        for each, flag in flags:
            each.training = flag


def _average_over_ranks(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
    torch._foreach_div_(list(tensors), torch.distributed.get_world_size())
