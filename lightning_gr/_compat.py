"""The only file that knows of Lightning's namespaces and versions."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core import rank_zero
from torch import Tensor, nn

__all__ = [
    "REFUSED_STRATEGIES",
    "SUPPORTED_STRATEGIES",
    "CallbackBase",
    "forget_logged",
    "gradients_are_scaled",
    "is_a",
    "is_error_node",
    "lightning_attributes",
    "logged_results",
    "namespace_of",
    "skips_backward",
    "storage_uses",
    "will_log",
]

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
# these inherit from supported ones
REFUSED_STRATEGIES = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy")


def _namespaces() -> list[Any]:
    """``pytorch_lightning``, and ``lightning.pytorch`` if installed: the same code, but other classes."""
    log = rank_zero.log
    names = ["pytorch_lightning"]
    if importlib.util.find_spec("lightning") is not None and importlib.util.find_spec("lightning.pytorch") is not None:
        names.append("lightning.pytorch")
    modules = [importlib.import_module(name) for name in names]
    # the namespace that is imported last takes the other's log lines: leave them with the one that the user imported
    if log.name.startswith(tuple(names)):
        rank_zero.log = log
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


def is_a(instance: object, *class_names: str) -> bool:
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


def storage_uses(tensor: Tensor) -> int:
    """How many tensors, arrays and other users share the storage of ``tensor``, itself included."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1


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


def gradients_are_scaled(optimizer: object) -> bool:
    """Whether an optimizer takes gradients that carry a gradient scaler's factor, as the fused ones of torch do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
