"""A pass that leaves no trace: random numbers, buffers, attributes, metrics, logs and signals."""

import random
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gr._compat import logged_results
from lightning_gr.core.sharding import local_parts

__all__ = ["ModuleState", "RandomState", "StatefulModules", "deferred_signals", "in_second_pass", "second_pass"]

_in_second_pass = False


def in_second_pass() -> bool:
    """Whether the code that asks runs inside a second pass, for side effects that nobody can intercept.

    Logging through ``self.log``, buffers, metrics, random numbers and the attributes of modules are taken care of;
    what a ``training_step`` writes to a file, a global variable or a logger's experiment is not.

    Example::

        >>> def training_step(self, batch):
        ...     loss = self.loss(batch)
        ...     if not in_second_pass():
        ...         self.history_file.write(f"{loss}")
        ...     return loss
        >>> in_second_pass()
        False
    """
    return _in_second_pass


class RandomState:
    """The state of the generators that a training step may draw from: torch (CPU, ``devices``), NumPy, Python.

    Args:
        devices: Accelerators whose default generators are in use. Reading their state does not synchronize.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._numpy = np.random.get_state()
        self._python = random.getstate()
        self._devices = [(d, torch.get_device_module(d).get_rng_state(*_index(d))) for d in devices]

    def restore(self) -> None:
        """Let all generators continue from here."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    # Apple's GPU is alone and its functions take no device
    return () if device.type == "mps" else (device,)


# Attributes that hold more than this many entries are not copied in every step; a list is still cut back to its length.
_MOST_ENTRIES = 1024
_CONTAINERS = (list, dict, set, deque, defaultdict)


_FRAMEWORKS = ("builtins", "torch.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "torchmetrics.")


class _Container:
    """What a list, dict, set or deque held, one level of dict values deep; its entries are not copied."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.length = len(owner)
        self.copy = owner.copy() if self.length <= _MOST_ENTRIES else None
        values = owner.values() if isinstance(owner, dict) and self.copy is not None else ()
        self.inner = [_Container(value) for value in values if type(value) in _CONTAINERS]

    def restore(self) -> None:
        if self.copy is None:
            if isinstance(self.owner, list):
                del self.owner[self.length :]
        elif isinstance(self.owner, list):
            self.owner[:] = self.copy
        else:
            self.owner.clear()
            (self.owner.extend if isinstance(self.owner, deque) else self.owner.update)(self.copy)
        for container in self.inner:
            container.restore()


class StatefulModules:
    """The modules below ``root`` that a forward pass may change, found once and not in every step.

    Args:
        root: The module whose tree is looked through; None stands for no module at all.
        foreign: Names of attributes that belong to the framework and are left alone.
        before: What was found earlier, which knows what is written to.
    """

    def __init__(
        self,
        root: nn.Module | None,
        foreign: frozenset[str] = frozenset(),
        before: "StatefulModules | None" = None,
    ) -> None:
        modules = list(root.modules()) if root is not None else []
        self.buffers = [(m, name) for m in modules for name, b in m.named_buffers(recurse=False) if _is_written(b)]
        self.written: list[tuple[nn.Module, str]] = [] if before is None else before.written
        self.metrics = [m for m in modules if _is_metric(m)]
        self.others = [m for m in modules if not _is_metric(m) and _has_attributes(m)]
        self.class_containers = _class_containers(root)
        named = [(m, name, p) for m in modules for name, p in m.named_parameters(recurse=False)]
        self.frozen = [(m, name, p) for m, name, p in named if not p.requires_grad and _can_be_marked(p)]
        self.foreign = foreign | frozenset(vars(nn.Module()))

    def note_written(self, before: "ModuleState") -> None:
        """Treat as buffers, from now on, what a first pass that began at ``before`` wrote to in place.

        Those are frozen parameters (a momentum encoder that ``training_step`` updates) and tensors in attributes. They
        are not copied before they are seen to change: a frozen backbone may be larger than all the rest. To be called
        before weights are perturbed, which an attribute may be a view of.
        """
        known = {(id(module), name) for module, name in self.written}
        self.written += [(module, name) for module, name in before.written() if (id(module), name) not in known]


def _has_attributes(module: nn.Module) -> bool:
    # what torch.nn's own modules change in a forward pass are buffers, but for weights that are made in a hook
    return not type(module).__module__.startswith("torch.nn.") or bool(module._forward_pre_hooks)


def _class_containers(root: nn.Module | None) -> list[Any]:
    """Containers that the classes of ``root`` hold and not the instance, as in ``losses = []`` in a class body."""
    classes = [cls for cls in type(root).__mro__ if not cls.__module__.startswith(_FRAMEWORKS)]
    named = [item for cls in classes for item in vars(cls).items()]
    return [value for name, value in named if type(value) in _CONTAINERS and not name.startswith("__")]


def _can_be_marked(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_inference()


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Something that changes when ``tensor`` is written to, also through ``.data = …``."""
    return tensor._version, tensor.data_ptr()


def _is_written(buffer: Tensor) -> bool:
    # an expanded buffer (position ids, masks) cannot be written to in place
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _is_state(value: Any) -> TypeGuard[Tensor]:
    # not what is being trained, even if it was frozen before
    return isinstance(value, Tensor) and not value.requires_grad


def _is_metric(module: nn.Module) -> bool:
    # by what is used of it, not by class: importing torchmetrics here would cost a second for users of the plain form
    return hasattr(module, "metric_state") and hasattr(module, "add_state")


class ModuleState:
    """What modules hold besides parameters, now: the values of buffers and plain attributes (containers included)."""

    def __init__(self, modules: StatefulModules) -> None:
        names = modules.buffers + modules.written
        self._buffers = [(m, name, b) for m, name in names if _is_state(b := getattr(m, name, None))]
        self._values = [buffer.detach().clone() for _, _, buffer in self._buffers]
        self._attributes = [(m, self._read(m, modules.foreign)) for m in modules.others]
        self._containers = [
            _Container(value) for _, own in self._attributes for value in own.values() if type(value) in _CONTAINERS
        ] + [_Container(value) for value in modules.class_containers]
        self._watched = modules.frozen + [
            (m, n, v) for m, own in self._attributes for n, v in own.items() if _is_state(v) and _can_be_marked(v)
        ]
        self._marks = [_mark(tensor) for _, _, tensor in self._watched]
        self._foreign = modules.foreign

    def written(self) -> list[tuple[nn.Module, str]]:
        """Which frozen parameters and tensors in attributes were written to in place since."""
        now = zip(self._watched, self._marks, strict=True)
        return [(module, name) for (module, name, tensor), mark in now if _mark(tensor) != mark]

    @staticmethod
    def _read(module: nn.Module, foreign: frozenset[str]) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if name not in foreign}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back: the same objects, with the values that they had."""
        for module, name, buffer in self._buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
        if self._values:
            torch._foreach_copy_(local_parts([buffer for _, _, buffer in self._buffers]), local_parts(self._values))
        for module, own in self._attributes:
            _replace(vars(module), own, set(self._read(module, self._foreign)) - own.keys())
        for container in self._containers:
            container.restore()


def _replace(attributes: dict[str, Any], old: dict[str, Any], new_names: set[str]) -> None:
    for name in new_names:
        del attributes[name]
    attributes.update(old)


@contextmanager
def _stand_in_metrics(metrics: Sequence[nn.Module]) -> Iterator[None]:
    """Let metrics work on stand-ins: clones of tensor states, empty lists for list states, which may be long."""
    saved = [(metric, dict(vars(metric))) for metric in metrics]
    try:
        for metric in metrics:
            states: dict[str, Tensor | list[Tensor]] = metric.metric_state  # type: ignore[assignment]
            vars(metric).update({n: [] if isinstance(s, list) else s.detach().clone() for n, s in states.items()})
        yield
    finally:
        for metric, attributes in saved:
            _replace(vars(metric), attributes, vars(metric).keys() - attributes.keys())


def _mute(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``self.log`` and its like."""


@contextmanager
def _muted(owner: object | None, names: Sequence[str]) -> Iterator[None]:
    """Shadow the methods ``names`` of ``owner`` by one that does nothing."""
    attributes = vars(owner) if owner is not None else {}
    shadowed = {name: attributes[name] for name in names if name in attributes}
    attributes.update(dict.fromkeys(names, _mute))
    try:
        yield
    finally:
        for name in names:
            del attributes[name]
        attributes.update(shadowed)


@contextmanager
def _flagged() -> Iterator[None]:
    global _in_second_pass
    _in_second_pass = True
    try:
        yield
    finally:
        _in_second_pass = False


@contextmanager
def second_pass(
    modules: StatefulModules,
    before: ModuleState,
    devices: Sequence[torch.device] = (),
    *,
    muted: nn.Module | None = None,
    names: Sequence[str] = ("log", "log_dict", "print"),
) -> Iterator[None]:
    """Run the body as if it had never happened, from the module state that the first pass started from.

    Args:
        modules: What may change.
        before: The state at the beginning of the first pass: the second one sees the same function.
        devices: Accelerators in use, see :class:`RandomState`.
        muted: The module whose methods ``names`` do nothing meanwhile.
        names: Methods of ``muted``.
    """
    random_state, after = RandomState(devices), ModuleState(modules)
    with ExitStack() as stack:
        stack.callback(random_state.restore)
        stack.callback(after.restore)
        before.restore()
        stack.enter_context(_stand_in_metrics(modules.metrics))
        stack.enter_context(_muted(muted, names))
        # `self.log` may also be reached through a reference that was taken before
        stack.enter_context(_muted(logged_results(muted), ("log", "reset")))
        stack.enter_context(_flagged())
        yield


# Ctrl-C and timers are there to interrupt a pass, and save no checkpoint: what they raise restores the weights.
_NEVER_HELD = ("SIGINT", "SIGKILL", "SIGSTOP", "SIGALRM", "SIGVTALRM", "SIGPROF")
_SIGNALS = sorted(int(number) for number in signal.valid_signals() - {getattr(signal, n, None) for n in _NEVER_HELD})


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold back the Python handlers of signals during the body and call them afterwards, in order of arrival.

    Lightning saves a checkpoint from inside such a handler (SIGTERM, SIGUSR1 or whichever signal a cluster requeues
    by), at whatever bytecode the main thread is, so it must not run while weights are perturbed. Blocking the signal
    (``pthread_sigmask``) is not enough: another thread takes it and the handler still runs in the main thread. A
    signal without a Python handler keeps its disposition.
    """
    arrived: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    signal.signal(number, hold)
        yield
    finally:
        with ExitStack() as stack:  # calls each, even if one of them raises
            for number, handler in handlers.items():
                # a handler that user code installed meanwhile stays
                if signal.getsignal(number) is hold:
                    signal.signal(number, handler)
            for number in reversed(arrived):
                stack.callback(handlers[number], number, None)
