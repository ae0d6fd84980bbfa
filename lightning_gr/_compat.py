"""The only file that knows of Lightning's namespaces and versions."""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core import rank_zero
from torch import Tensor, nn

__all__ = [
    "REFUSED_STRATEGIES",
    "SUPPORTED_STRATEGIES",
    "CallbackBase",
    "forget_logged",
    "gradient_scaler",
    "gradients_are_scaled",
    "has_base_named",
    "has_forward_hooks",
    "is_error_node",
    "lightning_attributes",
    "logged_results",
    "loggers_and_methods",
    "namespace_of",
    "pre_backward",
    "skips_backward",
    "static_graph",
    "stop_progress_bars",
    "storage_uses",
    "unsynced",
    "will_log",
    "wrap_training_step",
]

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
# these inherit from supported ones
REFUSED_STRATEGIES = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy")


def _namespaces() -> list[Any]:
    """``pytorch_lightning``, and ``lightning.pytorch`` if installed: the same code, but other classes."""
    log, category = rank_zero.log, rank_zero.rank_zero_deprecation_category
    names = ["pytorch_lightning"]
    if importlib.util.find_spec("lightning") is not None and importlib.util.find_spec("lightning.pytorch") is not None:
        names.append("lightning.pytorch")
    modules = [importlib.import_module(name) for name in names]
    # the namespace that is imported last takes the other's log lines: leave them with the one that the user imported
    if log.name.startswith(tuple(names)):
        rank_zero.log, rank_zero.rank_zero_deprecation_category = log, category
    return modules


if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
    from pytorch_lightning import Trainer
else:
    _NAMESPACES = _namespaces()
    CallbackBase = type(
        "CallbackBase",
        tuple(namespace.Callback for namespace in _NAMESPACES),
        {"__doc__": "A callback for the Trainer of each installed namespace.", "__module__": __name__},
    )


def namespace_of(*classes: type) -> str:
    """The namespace to which one of ``classes`` belongs; ``"pytorch_lightning"`` if none says otherwise."""
    modules = [base.__module__ for cls in classes for base in cls.__mro__]
    return (
        "lightning.pytorch"
        if any(f"{module}.".startswith("lightning.pytorch.") for module in modules)
        else "pytorch_lightning"
    )


def has_base_named(instance: object, *class_names: str) -> bool:
    """Whether one of the classes of ``instance`` has one of these names, in whichever namespace it lives."""
    return any(cls.__name__ in class_names for cls in type(instance).__mro__)


def is_error_node(node: Any) -> bool:
    """Whether a node of an autograd graph is the one that ``once_differentiable`` puts there, to raise if visited."""
    return str(node.name()) == "torch::autograd::Error"


def skips_backward(trainer: "Trainer") -> bool:
    """Whether this epoch has no backward pass: StochasticWeightAveraging's last one, for BatchNorm's statistics."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def lightning_attributes() -> frozenset[str]:
    """The instance attributes that Lightning itself gives a module and its metrics; ours to leave alone."""
    names: set[str] = set(vars(nn.Module()))
    for namespace in _namespaces():
        names |= set(vars(namespace.LightningModule()))
    return frozenset(names)


def logged_results(module: nn.Module | None) -> Any:
    """Where ``LightningModule.log`` writes to in the end; None outside a Trainer."""
    return getattr(getattr(module, "_trainer", None), "_results", None)


def storage_uses(tensor: Tensor) -> int | None:
    """How many tensors, arrays and other users share the storage of ``tensor``, itself included; None if torch is mute.

    Relies on torch's private counter, which is no promise.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = tensor.untyped_storage()
    return None if count is None else int(count(storage._cdata)) - 1


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether code that is not the module's own runs in its forward pass. Relies on the names of torch's tables."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def static_graph(model: object) -> bool:
    """Whether DDP learns its graph in the first iteration, and then only if it reduces there."""
    return bool(getattr(model, "static_graph", False))


def gradient_scaler(trainer: "Trainer") -> Any:
    """The gradient scaler of the precision plugin, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def wrap_training_step(
    trainer: "Trainer", wrapper: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[[], None]]:
    """Let ``wrapper`` stand before the strategy's ``training_step``, which is where its arguments can be seen.

    Returns:
        What was there before, another wrapper or the method itself, and a function that puts it back. Where somebody
        else has wrapped ours since, that one stays.
    """
    strategy: Any = trainer.strategy
    own = vars(strategy)
    before, original = own.get("training_step"), strategy.training_step
    own["training_step"] = wrapper

    def unwrap() -> None:
        if own.get("training_step") == wrapper:
            own.pop("training_step")
            if before is not None:
                own["training_step"] = before

    return original, unwrap


def pre_backward(trainer: "Trainer", loss: Tensor) -> None:
    """Prepare the strategy for a backward pass that does not go through it, as DDP's search for unused parameters."""
    strategy: Any = trainer.strategy
    strategy.pre_backward(loss)


def unsynced(trainer: "Trainer") -> AbstractContextManager[Any]:
    """A context in which gradients are not reduced over devices, forward and backward pass alike."""
    strategy: Any = trainer.strategy
    return strategy.block_backward_sync() if has_base_named(strategy, "ParallelStrategy") else nullcontext()


def loggers_and_methods(trainer: "Trainer") -> list[tuple[Any, list[str]]]:
    """The loggers, and the experiments that they write to, with those of their methods that write.

    Relies on the name ``_experiment``: asking for ``experiment`` would create one.
    """
    found: list[tuple[Any, list[str]]] = []
    for logger in trainer.loggers:
        found.append(
            (logger, [n for n in dir(type(logger)) if n.startswith(("log_", "save", "after_save", "finalize"))])
        )
        experiment = getattr(logger, "__dict__", {}).get("_experiment")
        if experiment is not None:
            kind = type(experiment)
            public = [n for n in dir(kind) if not n.startswith("_") and callable(getattr(kind, n, None))]
            found.append((experiment, public))
    return found


def will_log(trainer: "Trainer") -> bool:
    """Whether Lightning writes to the loggers after this training batch, as far as all ranks agree about it.

    Its own condition, but for ``trainer.should_stop``, which one rank may set before the others.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if trainer.barebones or not every:
        return False
    stepped: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return (stepped + 1) % every == 0 or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def forget_logged(trainer: "Trainer", keys: set[str]) -> None:
    """Let Lightning not write the last value of ``keys`` again on a step that has none."""
    for metric in (trainer._results or {}).values():
        if metric.meta.name in keys:
            metric.reset()


def stop_progress_bars(trainer: "Trainer") -> None:
    """Let nothing be printed inside a live bar.

    Rich's lives until its own teardown, which comes after ours; stopping it twice is harmless. Relies on the attribute
    ``progress`` of Lightning's callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if has_base_named(callback, "RichProgressBar") and getattr(callback, "progress", None) is not None:
            callback.progress.stop()


def gradients_are_scaled(optimizer: object) -> bool:
    """Whether an optimizer takes gradients that carry a gradient scaler's factor, as the fused ones of torch do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
