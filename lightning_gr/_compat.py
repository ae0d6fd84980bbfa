"""The only file that uses private APIs of Lightning and torch, or depends on their versions and namespaces.

Each private API is wrapped in one function, which states what it relies on and has a test in ``tests/test_compat.py``.
"""

import inspect
import operator
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gr._namespaces import import_namespaces
from lightning_gr._repr import as_typed

__all__ = [
    "REFUSED_STRATEGIES",
    "SUPPORTED_STRATEGIES",
    "CallbackBase",
    "MisconfigurationException",
    "comm_hook_states",
    "forget_logged",
    "gradient_scaler",
    "gradients_are_scaled",
    "has_base_named",
    "has_comm_hooks",
    "has_forward_hooks",
    "hook_tables",
    "is_error_node",
    "is_fsdp1",
    "is_python_thread",
    "is_writer",
    "lightning_attributes",
    "logged_results",
    "loggers_and_methods",
    "namespace_of",
    "overrides_hook",
    "pre_backward",
    "signal_handler",
    "skips_backward",
    "static_graph",
    "stepped_twin",
    "stop_progress_bars",
    "storage_uses",
    "torchs_own_methods",
    "trainer_parts",
    "unsynced",
    "will_log",
    "with_hooks",
    "wrap_after_backward",
    "wrap_backward",
    "wrap_save_checkpoint",
    "wrap_training_step",
    "writing_methods",
]

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy", "FSDPStrategy")
# these inherit from supported strategies
REFUSED_STRATEGIES = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy")


_NAMESPACES: list[Any] = import_namespaces()
if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Trainer

    # Unknown to type checkers, which then accept our callbacks, and what users derive from them, in programs of either
    # namespace. A base class of both would not do: each hook of a subclass would violate the other one's signature.
    CallbackBase: Any
    AnyTrainer = Any
    AnyModule = Any
else:
    CallbackBase = type(
        "CallbackBase",
        tuple(namespace.Callback for namespace in _NAMESPACES),
        {
            "__doc__": "A callback that works in the Trainer of each installed namespace.",
            "__module__": __name__,
            "__repr__": as_typed,
        },
    )
    MisconfigurationException = type(
        "MisconfigurationException",
        tuple(namespace.utilities.exceptions.MisconfigurationException for namespace in _NAMESPACES),
        {"__doc__": "Lightning's error, in each installed namespace.", "__module__": __name__},
    )


def namespace_of(*classes: type) -> str:
    """The namespace that one of ``classes`` belongs to, ``"pytorch_lightning"`` by default."""
    modules = [base.__module__ for cls in classes for base in cls.__mro__]
    return (
        "lightning.pytorch"
        if any(f"{module}.".startswith("lightning.pytorch.") for module in modules)
        else "pytorch_lightning"
    )


def has_base_named(instance: object, *class_names: str) -> bool:
    """Whether ``instance`` has a class or base class with one of these names, in either namespace."""
    return any(cls.__name__ in class_names for cls in type(instance).__mro__)


def is_error_node(node: Any) -> bool:
    """Whether an autograd node is the one that ``once_differentiable`` inserts to raise an error when visited."""
    return str(node.name()) == "torch::autograd::Error"


def is_python_thread() -> bool:
    """Whether Python started this thread, and not a library of C++ such as autograd.

    Relies on Python's private class for threads of others, which it makes when one of them asks for itself.
    """
    own = threading.get_ident()
    kind = getattr(threading, "_DummyThread", ())
    return any(each.ident == own and not isinstance(each, kind) for each in threading.enumerate())


def signal_handler(number: int) -> Any:
    """The handler of a signal; a number for those that Python does not handle.

    Relies on ``_signal``, the part of ``signal`` written in C: without its search for an enum, it takes a fortieth of
    the time, which adds up over 60 signals.
    """
    return _getsignal(number)


_getsignal: Callable[[int], Any] = getattr(sys.modules.get("_signal"), "getsignal", signal.getsignal)


def skips_backward(trainer: "Trainer") -> bool:
    """Whether this epoch has no backward pass, like the one that StochasticWeightAveraging adds for BatchNorm."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def lightning_attributes() -> frozenset[str]:
    """The instance attributes that Lightning and torch themselves set on a module; they are not the user's state."""
    names: set[str] = set(vars(nn.Module()))
    for namespace in _NAMESPACES:
        if namespace.__name__ in sys.modules:  # the others are hidden, and no module is of their classes
            names |= set(vars(namespace.LightningModule()))
    return frozenset(names)


def logged_results(module: nn.Module | None) -> Any:
    """The object in which ``LightningModule.log`` stores values; None outside a Trainer. Relies on ``_results``."""
    return getattr(getattr(module, "_trainer", None), "_results", None)


def storage_uses(tensor: Tensor) -> int | None:
    """The number of tensors, arrays and other users that share the storage of ``tensor``, including itself.

    Relies on torch's private counter; returns None if this version of torch does not have it.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = tensor.untyped_storage()
    return None if count is None else int(count(storage._cdata)) - 1


def torchs_own_methods() -> AbstractContextManager[Any]:
    """Let what is asked of a tensor be answered by torch, with tensors of its own class, and not by a subclass.

    Such a class may label its rows and refuse to be cloned without the labels. It relies on torch's private switch for
    ``__torch_function__``. Methods that are overridden in Python are to be called unbound (``Tensor.clone(x)``);
    classes with a ``__torch_dispatch__`` (DTensor) stay what they are.
    """
    return torch._C.DisableTorchFunctionSubclass()


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module's forward pass runs hooks. Relies on the names of torch's hook dictionaries."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def hook_tables(tensor: Tensor) -> list[dict[int, Callable[..., Any]]]:
    """The hooks on a tensor by the number of their handle, which no other hook of the process has.

    Those of ``register_hook`` come first, then those of ``register_post_accumulate_grad_hook``. Relies on the names of
    torch's tables, and on that what is exchanged in them is what runs.
    """
    tables = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return [{} if table is None else table for table in tables]


def with_hooks(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``tensors`` that have hooks, see :func:`hook_tables`."""
    tables = operator.attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
    kept = list(tensors)
    return [tensor for tensor, (one, other) in zip(kept, map(tables, kept), strict=True) if one or other]


def static_graph(model: object) -> bool:
    """Whether DDP records its graph in the first iteration, which only works if gradients are reduced in it."""
    return bool(getattr(model, "static_graph", False))


def has_comm_hooks(model: object) -> bool:
    """Whether DDP reduces gradients by a communication hook. Relies on the list that DDP keeps of its hooks."""
    return bool(getattr(model, "_comm_hooks", ()))


def comm_hook_states(model: object) -> list[object]:
    """The objects registered with DDP's communication hooks, except for process groups and such, which keep nothing."""
    states = [state for _, state in getattr(model, "_comm_hooks", ())]
    return [s for s in states if not isinstance(s, _CONSTANTS) and not has_base_named(s, "ProcessGroup")]


_CONSTANTS = (type(None), bool, int, float, str, bytes)


def gradient_scaler(trainer: "Trainer") -> Any:
    """The gradient scaler of the precision plugin, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def overrides_hook(owner: object, name: str) -> bool:
    """Whether a module or callback has a hook that is not Lightning's own, which does nothing."""
    definers = [cls for cls in type(owner).__mro__ if name in vars(cls)]
    own = bool(definers) and not definers[0].__module__.startswith(("pytorch_lightning.", "lightning.pytorch."))
    return own or name in getattr(owner, "__dict__", {})


Wrapped = tuple[Callable[..., Any], Callable[[], None]]


def wrap_training_step(trainer: "Trainer", wrapper: Callable[..., Any]) -> Wrapped:
    """Replace the strategy's ``training_step`` with ``wrapper``, which then sees its arguments.

    Returns:
        The original, which is the method itself or another wrapper, and a function that restores it. If ``wrapper`` has
        been wrapped in the meantime, that function leaves the outer wrapper in place.
    """
    return _wrap(trainer.strategy, "training_step", wrapper)


def wrap_backward(trainer: "Trainer", wrapper: Callable[..., Any]) -> Wrapped:
    """Replace the precision plugin's ``backward``, the backward pass without the hooks around it, with ``wrapper``.

    Returns:
        See :func:`wrap_training_step`.
    """
    return _wrap(trainer.precision_plugin, "backward", wrapper)


def wrap_after_backward(trainer: "Trainer", wrapper: Callable[..., Any]) -> Wrapped:
    """Replace the precision plugin's ``post_backward``, which runs the hooks ``on_after_backward``, with ``wrapper``.

    Returns:
        See :func:`wrap_training_step`.
    """
    return _wrap(trainer.precision_plugin, "post_backward", wrapper)


def wrap_save_checkpoint(trainer: "Trainer", wrapper: Callable[..., Any]) -> Wrapped:
    """Replace ``trainer.save_checkpoint`` with ``wrapper``.

    Returns:
        See :func:`wrap_training_step`.
    """
    return _wrap(trainer, "save_checkpoint", wrapper)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> Wrapped:
    attributes = vars(owner)
    before, original = attributes.get(name), getattr(owner, name)
    attributes[name] = wrapper

    def unwrap() -> None:
        if attributes.get(name) == wrapper:
            attributes.pop(name)
            if before is not None:
                attributes[name] = before

    return original, unwrap


def pre_backward(trainer: "Trainer", loss: Tensor) -> None:
    """Prepare the strategy for a backward pass that bypasses it, such as DDP's search for unused parameters."""
    strategy: Any = trainer.strategy
    strategy.pre_backward(loss)


def unsynced(trainer: "Trainer") -> AbstractContextManager[Any]:
    """A context manager in which gradients are not reduced over devices. It must cover forward and backward pass.

    With FSDP1, they are reduced in each backward pass of ours: its ``no_sync`` leaves gradients of another shape, and
    keeps gathered weights that do not follow where the shards are moved.
    """
    strategy: Any = trainer.strategy
    if is_fsdp1(trainer):
        return nullcontext()
    return strategy.block_backward_sync() if has_base_named(strategy, "ParallelStrategy") else nullcontext()


def loggers_and_methods(trainer: "Trainer") -> list[tuple[Any, list[str]]]:
    """The loggers and their experiments, each with the names of the methods that write.

    Accessing ``experiment`` creates none: Lightning itself has accessed each one before training starts.
    """
    pairs: list[tuple[Any, list[str]]] = []
    for logger in trainer.loggers:
        pairs.append(
            (logger, [n for n in dir(type(logger)) if n.startswith(("log_", "save", "after_save", "finalize"))])
        )
        experiment = getattr(logger, "experiment", None)
        if experiment is not None:
            pairs.append((experiment, writing_methods(experiment)))
    return pairs


def is_writer(value: object) -> bool:
    """Whether ``value`` is a client of a service or a file for metrics, which a module may hold directly."""
    return has_base_named(value, "SummaryWriter") or type(value).__module__.startswith(
        ("wandb.", "mlflow.", "comet_ml.")
    )


def writing_methods(writer: object) -> list[str]:
    """The public methods of a client, except for getters."""
    kind = type(writer)
    names = [name for name in dir(kind) if not name.startswith(("_", "get", "is_", "has_"))]
    return [name for name in names if callable(getattr(kind, name, None))]


def trainer_parts(trainer: "Trainer") -> dict[str, dict[str, Any]]:
    """The attributes of the Trainer's parts that a training step may write to, by path.

    Relies on the names of the loops, and on that of the connector that holds what has been logged.
    """
    parts: dict[str, Any] = {
        "trainer": trainer,
        "trainer.fit_loop": trainer.fit_loop,
        "trainer.fit_loop.epoch_loop": trainer.fit_loop.epoch_loop,
        "trainer.logged": trainer._logger_connector,
    }
    return {path: vars(part) for path, part in parts.items()}


def will_log(trainer: "Trainer") -> bool:
    """Whether Lightning writes to the loggers after this training batch, decided identically on all ranks.

    This is Lightning's own condition without ``trainer.should_stop``, which ranks may set at different times.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if trainer.barebones or not every:
        return False
    stepped: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return (stepped + 1) % every == 0 or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def forget_logged(trainer: "Trainer", keys: set[str]) -> None:
    """Keep Lightning from logging the previous value of ``keys`` again on a step without a new one."""
    for metric in (trainer._results or {}).values():
        if metric.meta.name in keys:
            metric.reset()


def stop_progress_bars(trainer: "Trainer") -> None:
    """Stop Rich progress bars, so that the following output is not printed inside a live one.

    Lightning stops them in its own teardown, which runs after ours; stopping them twice is harmless. Relies on the
    attribute ``progress`` of Lightning's callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if has_base_named(callback, "RichProgressBar") and getattr(callback, "progress", None) is not None:
            callback.progress.stop()


def stepped_twin(optimizer: torch.optim.Optimizer, group: dict[str, Any], state: Any) -> torch.optim.Optimizer:
    """A twin of ``optimizer`` for one parameter group, after one step; hooks and schedulers do not see that step.

    Relies on ``Optimizer`` keeping all that it has in ``__dict__``, and on the wrappers of ``step`` naming what they
    wrap, as ``functools.wraps`` does.

    Args:
        optimizer: The optimizer, which does not change.
        group: Replaces the optimizer's parameter groups.
        state: What the twin keeps per parameter, by name, before its step.
    """
    kind = type(optimizer)
    twin: Any = object.__new__(kind)
    kept = defaultdict(dict, {param: dict(state) for param in group["params"] if state})
    vars(twin).update(vars(optimizer), state=kept, param_groups=[group])
    vars(twin).pop("step", None)  # a scheduler's wrapper
    inspect.unwrap(kind.step)(twin)
    return twin  # type: ignore[no-any-return]


def gradients_are_scaled(optimizer: object) -> bool:
    """Whether an optimizer unscales gradients itself, as torch's fused optimizers do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_fsdp1(trainer: "Trainer") -> bool:
    """Whether the strategy shards parameters with FSDP1 (``strategy="fsdp"``)."""
    return has_base_named(trainer.strategy, "FSDPStrategy")


def spawns_ranks(trainer: "Trainer") -> bool:
    """Whether the Trainer starts its ranks within each `fit`, and ends them with it (spawn and fork, notebooks)."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"
