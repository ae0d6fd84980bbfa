"""Rejects unsupported setups before training starts, with one-line errors that suggest a fix."""

import inspect
from collections.abc import Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_gr._compat import (
    REFUSED_STRATEGIES,
    SUPPORTED_STRATEGIES,
    CallbackBase,
    MisconfigurationException,
    has_base_named,
    is_fsdp1,
)
from lightning_gr._fsdp1 import fsdp1_handles, fsdp1_tensors, shard_group
from lightning_gr.core.ahead import keeps_momentum, momenta_of
from lightning_gr.core.hooks import has_accumulation_hooks
from lightning_gr.core.rules import Update

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "NO_LOSS",
    "bypassed",
    "check_accumulation",
    "check_apart",
    "check_flooding",
    "check_fsdp1",
    "check_hooks",
    "check_manual",
    "check_momentum",
    "check_momentum_by_now",
    "check_overrides",
    "check_separable",
    "check_sharded",
    "check_sparse",
    "check_two_pass",
    "check_written",
    "overridden",
]


NO_LOSS = (
    "training_step returned None in a second pass, at displaced weights: that step keeps its clean gradient and counts"
    " as not regularized. If this happens often, use a smaller `epsilon` or `rho`"
)


_SHARDED = ("ModelParallelStrategy", "FSDPStrategy")


def check_overrides(kind: type, base: type) -> None:
    """Reject a subclass that overrides a hook without calling the package's, which would then not run.

    Args:
        kind: The class of a callback.
        base: The class of this package that it inherits from.

    Raises:
        MisconfigurationException: If a hook is overridden without calling the package's.
    """
    order = kind.__mro__
    ours = [cls for cls in order if cls.__module__.startswith("lightning_gr.")]
    hooks = {name for cls in ours for name in vars(cls) if hasattr(CallbackBase, name) and not name.startswith("__")}
    for cls in order[: order.index(base)]:
        for name in () if cls in ours else hooks & vars(cls).keys():
            code = getattr(inspect.unwrap(vars(cls)[name]), "__code__", None)
            if code is not None and not _mentions(code, name):
                raise MisconfigurationException(
                    f"{cls.__name__} overrides `{name}` without calling that of {base.__name__}, which does its work"
                    f" there: add `super().{name}(...)`"
                )


def _mentions(code: CodeType, name: str) -> bool:
    """Whether code refers to an attribute, as in ``super().on_train_start``, without running it."""
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return name in code.co_names or name in code.co_consts or any(_mentions(inner, name) for inner in nested)


def check_flooding(trainer: "Trainer", pl_module: "LightningModule", kind: type) -> None:
    """Reject a second flood level, and manual optimization without the mixin."""
    _check_alone(trainer, kind, "one flood level")
    _check_optimization(trainer, pl_module)


def check_two_pass(trainer: "Trainer", pl_module: "LightningModule", kind: type) -> None:
    """Reject setups in which a second pass is impossible or untested."""
    _check_alone(trainer, kind, "one method besides flooding")
    _check_optimization(trainer, pl_module)
    if not has_base_named(trainer.strategy, *SUPPORTED_STRATEGIES) or has_base_named(
        trainer.strategy, *REFUSED_STRATEGIES
    ):
        name = type(trainer.strategy).__name__
        raise MisconfigurationException(
            f"Gradient regularization does not work with {name}: the second pass is only supported on a single device,"
            " with DDP and with FSDP, so use `Trainer(strategy='auto')`, `'ddp'`, `'fsdp'` or `ModelParallelStrategy()`"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            "Gradient regularization needs the batch twice, but `training_step(self, dataloader_iter)` fetches it from"
            " the iterator itself: let it take `batch` instead"
        )


def check_accumulation(trainer: "Trainer", accumulation: str, ascent_sync: bool) -> None:
    """Reject a synchronized ascent for single micro-batches, whose gradients DDP does not reduce."""
    if accumulation == "micro_batch" and ascent_sync and trainer.world_size > 1:
        raise MisconfigurationException(
            "`accumulation='micro_batch'` on multiple devices ascends along each device's own gradient: set"
            " `ascent_sync=False`, or use `accumulation='window'`"
        )


def check_sharded(trainer: "Trainer", update: Update, ascent_sync: bool) -> None:
    """Reject settings that need all parameters on each rank if they are sharded."""
    if not has_base_named(trainer.strategy, *_SHARDED):
        return
    if update.curvature:
        raise MisconfigurationException(
            "`scheme='exact'` cannot differentiate twice through sharded parameters: use `scheme='central'`, which"
            " agrees with it to second order in epsilon"
        )
    if not ascent_sync and trainer.world_size > 1:
        raise MisconfigurationException(
            f"`ascent_sync=False` needs all parameters on each device, but {type(trainer.strategy).__name__} shards"
            " them: keep `ascent_sync=True`, or use `Trainer(strategy='ddp')`"
        )
    offload: Any = getattr(trainer.strategy, "cpu_offload", None)
    if getattr(offload, "offload_params", False):
        raise MisconfigurationException(
            "A second pass cannot add to gradients that FSDP offloads to the CPU: leave `cpu_offload` out, or use"
            " `ModelParallelStrategy` with FSDP2's `CPUOffloadPolicy`"
        )


def check_fsdp1(trainer: "Trainer") -> Any:
    """Reject FSDP1 models of which some parameters are spread over ranks and some are not, or over others.

    Returns:
        The process group over which all parameters are spread; None if they are whole.
    """
    model = trainer.strategy.model if is_fsdp1(trainer) else None
    groups = {id(group): group for group in map(shard_group, fsdp1_handles(model))}
    sharded = {id(param) for handle in fsdp1_handles(model) for param in fsdp1_tensors(handle)}
    ignored = any(p.requires_grad and id(p) not in sharded for o in trainer.optimizers for p in _parameters_of(o))
    if len(groups) > 1 or (groups and ignored):
        raise MisconfigurationException(
            "Some parameters are sharded by FSDP and some are not, or not over the same ranks, so there is no common"
            " norm: use one `sharding_strategy` for all units, and no `ignored_states` that are trained"
        )
    return next(iter(groups.values()), None)


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def check_apart(trainer: "Trainer", update: Update, name: str, accumulation: str, ascent_sync: bool) -> None:
    """Reject setups in which a rule does not get its gradients separately, each as a whole."""
    if update.is_linear and update.clip is None:
        return
    what = f"{name} combines its gradients itself" if update.clip is None else "`gradient_clip` clips each gradient"
    if not ascent_sync and trainer.world_size > 1:
        raise MisconfigurationException(
            f"{what}, but `ascent_sync=False` averages them over devices only when they are added up: use"
            " `ascent_sync=True`"
        )
    if accumulation == "micro_batch" and trainer.accumulate_grad_batches > 1:
        raise MisconfigurationException(
            f"{what}, but `accumulation='micro_batch'` adds up those of several micro-batches: use"
            " `accumulation='window'`"
        )
    if not update.is_linear and has_base_named(trainer.strategy, *_SHARDED):
        raise MisconfigurationException(
            f"{what}, which was not shown to be right where parameters are spread over ranks: use"
            " `Trainer(strategy='ddp')`, or a rule such as `SAMRule`"
        )


def check_hooks(params: Sequence[Tensor], local: bool) -> None:
    """Reject hooks that would see the sum of both gradients, because the first one is not reduced separately."""
    if local and any(map(has_accumulation_hooks, params)):
        raise MisconfigurationException(
            "With `ascent_sync=False` both gradients are accumulated before they are reduced, so a hook by"
            " `register_post_accumulate_grad_hook` cannot see each by itself: use `register_hook`, or"
            " `ascent_sync=True`"
        )


def check_written(writes_gradients: bool, local: bool) -> None:
    """Refuse code of the user's that writes to gradients where the first one is not reduced yet."""
    if writes_gradients and local:
        raise MisconfigurationException(
            "With `ascent_sync=False` both gradients are accumulated before they are reduced, so a hook"
            " `on_after_backward` or a training step that writes to gradients cannot see each by itself: use"
            " `ascent_sync=True`"
        )


def overridden(callback: object, hook: str) -> MisconfigurationException:
    """The error for a hook of ours that did not run."""
    return MisconfigurationException(
        f"`{hook}` of {type(callback).__name__} did not run, so nothing would be regularized: call"
        f" `super().{hook}(...)` in your override of `{hook}`"
    )


def bypassed(plugin: object) -> MisconfigurationException:
    """The error for a precision plugin whose hook, which starts the second pass, was replaced during training."""
    return MisconfigurationException(
        f"`post_backward` of {type(plugin).__name__} was replaced after training started, by something that does not"
        " call what was there before, so nothing was regularized: call that, or replace it before `Trainer.fit`"
    )


def check_separable(trainer: "Trainer", metrics: frozenset[str], accumulation: str, ascent_sync: bool) -> None:
    """Reject metrics, requested by name, that need a second gradient which is not available separately."""
    if not metrics:
        return
    names = " and ".join(repr(name) for name in sorted(metrics))
    if not ascent_sync and trainer.world_size > 1:
        raise MisconfigurationException(
            f"`metrics` contains {names}, which need each device's second gradient, but `ascent_sync=False` reduces it"
            " together with the first one: remove them, or use `ascent_sync=True`"
        )
    if accumulation == "micro_batch" and trainer.accumulate_grad_batches > 1:
        raise MisconfigurationException(
            f"`metrics` contains {names}, which need the second gradient alone, but `accumulation='micro_batch'` adds"
            " it to that of other micro-batches: remove them, or use `accumulation='window'`"
        )


def _check_alone(trainer: "Trainer", kind: type, what: str) -> None:
    names = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
    if len(names) > 1:
        raise MisconfigurationException(
            f"Expected at most {what} in a Trainer but got {' and '.join(names)}: remove all but one"
        )


def check_manual(trainer: "Trainer") -> None:
    """Reject FSDP1 with manual optimization, which plain Lightning cannot train either."""
    if is_fsdp1(trainer):
        raise MisconfigurationException(
            "FSDP1 cannot run a backward pass within `training_step`, also without this package: use automatic"
            " optimization, or `ModelParallelStrategy`"
        )


def _check_optimization(trainer: "Trainer", pl_module: "LightningModule") -> None:
    if not pl_module.automatic_optimization:
        check_manual(trainer)
    if not pl_module.automatic_optimization and not has_base_named(pl_module, "GradientRegularizationMixin"):
        name = type(pl_module).__name__
        raise MisconfigurationException(
            f"{name} uses manual optimization, which a callback alone cannot regularize: write"
            f" `class {name}(GradientRegularizationMixin, ...)` and call `self.regularized_step` in its"
            " `training_step`, or set `automatic_optimization = True`"
        )


def check_momentum(trainer: "Trainer") -> None:
    """Reject Momentum-SAM if an optimizer keeps no momentum, or not all of it on each device."""
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if has_base_named(optimizer, "ZeroRedundancyOptimizer"):
            raise MisconfigurationException(
                f"{name} spreads the momentum over devices, but Momentum-SAM needs it on each: use the optimizer that"
                " it wraps, or `SAM`"
            )
        if keeps_momentum(optimizer) is False:
            _refuse_without_momentum(name)


def check_momentum_by_now(optimizer: torch.optim.Optimizer) -> None:
    """The same, after the first step, for an optimizer of which it could not be found out before."""
    if optimizer.state and not any(momenta_of(optimizer, group["params"]) for group in optimizer.param_groups):
        _refuse_without_momentum(type(optimizer).__name__)


def _refuse_without_momentum(name: str) -> NoReturn:
    raise MisconfigurationException(
        f"Momentum-SAM looks ahead along the optimizer's momentum, but {name} keeps none: set its `momentum` (0.9,"
        " say), use an optimizer such as AdamW, or use `SAM`"
    )


def check_sparse(pl_module: "LightningModule", excluded: set[int]) -> None:
    """Reject embeddings with sparse gradients, for which no norm is implemented, unless they are excluded."""
    for name, module in pl_module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and id(module.weight) not in excluded:
            raise MisconfigurationException(
                f"`{name}.weight` gets sparse gradients, which cannot define a perturbation: create it with"
                f" `sparse=False` or exclude it with `exclude=['{name}.weight']`"
            )
