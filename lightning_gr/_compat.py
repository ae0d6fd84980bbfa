"""The only file that knows of Lightning's namespaces and versions."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero
from torch import nn

__all__ = [
    "REFUSED_STRATEGIES",
    "SUPPORTED_STRATEGIES",
    "CallbackBase",
    "is_a",
    "lightning_attributes",
    "namespace_of",
    "skips_backward",
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


def skips_backward(trainer: "Trainer") -> bool:
    """Whether this epoch has no backward pass: StochasticWeightAveraging's last one, for BatchNorm's statistics."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def lightning_attributes() -> frozenset[str]:
    """The instance attributes that Lightning itself gives a module and its metrics; ours to leave alone."""
    names: set[str] = set(vars(nn.Module()))
    for namespace in _namespaces():
        names |= set(vars(namespace.LightningModule()))
    return frozenset(names)
