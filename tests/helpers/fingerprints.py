"""Flattens everything reachable from an object into a dictionary from paths to plain values, and compares two."""

import ctypes
import math
import random
import types
import weakref
from array import array
from collections import UserDict, deque
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

# attributes that Lightning and the package set on a module for their own use
FOREIGN = {
    "_trainer",
    "_fabric",
    "_fabric_optimizers",
    "_current_fx_name",
    "_param_requires_grad_state",
    "_metric_attributes",
    "_automatic_optimization",
    "_lightning_gr",
    "_jit_is_scripting",
}
PLAIN = (type(None), bool, int, str, bytes, complex, range, slice, torch.dtype, torch.device, torch.Size, torch.layout)
CODE = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType)
FRAMEWORKS = (
    "builtins",
    "torch",
    "pytorch_lightning",
    "lightning",
    "torchmetrics",
    "lightning_gr",
    "contract",
    "typing",
)


def fingerprint(*roots):
    """Return everything reachable from ``roots``, with copies of tensors and arrays; aliases differ from copies."""
    walk = _Walk(roots)
    for index, root in enumerate(roots):
        walk.take(f"<{index}>", root)
        if isinstance(root, nn.Module):
            walk.take_classes(f"<{index}>", type(root))
    return walk.found


class _Walk:
    def __init__(self, roots):
        self.found, self.known, self.alive = {}, {}, []
        modules = [root for root in roots if isinstance(root, nn.Module)]
        self.trained = {id(p) for module in modules for p in module.parameters()}

    def note(self, path, value):
        self.found[path] = value

    def take(self, path, value):
        if isinstance(value, float):
            self.note(path, value)
        elif isinstance(value, np.generic):
            self.note(path, value.item())
        elif isinstance(value, PLAIN):
            self.note(path, value)
        elif isinstance(value, CODE):
            self.note(path, ("code", getattr(value, "__qualname__", getattr(value, "__name__", ""))))
            owner = getattr(value, "__self__", None)
            if isinstance(owner, np.random.Generator | np.random.RandomState | random.Random | list | dict):
                self.take(path + ".self", owner)
        elif id(value) in self.known:
            self.note(path, ("same as", self.known[id(value)]))
        else:
            self.known[id(value)] = path
            self.alive.append(value)
            self.take_new(path, value)

    def take_new(self, path, value):
        for kinds, method in self.kinds:
            if isinstance(value, kinds):
                getattr(self, method)(path, value)
                return
        self.note(path, ("object", type(value).__name__))
        self.take_attributes(path, value)

    def take_attributes(self, path, value):
        own = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            names = vars(cls).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if not name.startswith("__") and hasattr(value, name):
                    own.setdefault(name, getattr(value, name))
        for name, item in own.items():
            if name in FOREIGN:
                continue
            # the keys of hooks come from a counter for the whole process
            hooks = "hooks" in name and isinstance(item, Mapping)
            self.take(f"{path}.{name}", list(item.values()) if hooks else item)

    def take_classes(self, path, cls):
        for base in cls.__mro__:
            if base.__module__.split(".")[0] in FRAMEWORKS or base.__qualname__ == cls.__qualname__ != base.__name__:
                continue
            for name, item in vars(base).items():
                if not name.startswith("_") and not callable(item) and not isinstance(item, (property, staticmethod)):
                    self.take(f"{path}::{base.__name__}.{name}", item)

    # --- by kind

    def of_tensor(self, path, value):
        if torch.nn.parameter.is_lazy(value):
            self.note(path, "lazy")
            return
        with torch._C.DisableTorchFunctionSubclass():  # subclasses from libraries may reject methods
            detached = torch.Tensor.detach(value)
        meta = (type(value).__name__, value.dtype, value.layout, value.requires_grad, value.is_nested)
        self.note(path + "!", meta)
        if value.is_nested:
            self.note(path, [part.clone() for part in detached.unbind()])
        elif value.layout == torch.strided:
            plain = detached.dequantize() if value.is_quantized else detached
            self.note(path, plain if value.is_meta else plain.clone())
        else:
            self.note(path, detached.to_dense().clone())
        if value.is_leaf and value.grad is not None and id(value) not in self.trained:
            self.take(path + ".grad", value.grad)
        for name, item in vars(value).items():
            self.take(f"{path}.{name}", item)

    def of_array(self, path, value):
        if value.dtype.hasobject:
            self.take(path, value.tolist())
        else:
            self.note(path, value.copy())

    def of_generator(self, path, value):
        if isinstance(value, torch.Generator):
            self.note(path, value.get_state())
        elif isinstance(value, np.random.Generator):
            self.take(path, value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self.take(path, value.get_state())
        else:
            self.take(path, value.getstate())

    def of_mapping(self, path, value):
        for index, (key, item) in enumerate(value.items()):
            shown = repr(key) if isinstance(key, (str, int, float, bytes, tuple)) else f"#{index}"
            if not isinstance(key, (str, int, float, bytes, tuple)):
                self.take(f"{path}key{shown}", key)
            self.take(f"{path}[{shown}]", item)
        self.note(path + "!", (type(value).__name__, [repr(key) for key in value if isinstance(key, (str, int))]))
        self.take_attributes(path, value)

    def of_sequence(self, path, value):
        self.note(path + "!", (type(value).__name__, len(value), getattr(value, "maxlen", None)))
        for index, item in enumerate(value):
            self.take(f"{path}[{index}]", item)
        self.take_attributes(path, value)

    def of_raw(self, path, value):
        self.note(path, bytes(value))

    def of_function(self, path, value):
        self.note(path, ("function", value.__qualname__))
        for index, cell in enumerate(value.__closure__ or ()):
            self.take(f"{path}()[{index}]", cell.cell_contents)

    def of_method(self, path, value):
        self.note(path, ("method", value.__func__.__qualname__))
        self.take(path + ".self", value.__self__)

    def of_partial(self, path, value):
        self.take(path + ".call", [value.func, value.args, value.keywords])

    def of_skip(self, path, value):
        self.note(path, ("skipped", type(value).__name__))

    kinds = (
        (torch.Tensor, "of_tensor"),
        (np.ndarray, "of_array"),
        ((torch.Generator, np.random.Generator, np.random.RandomState, random.Random), "of_generator"),
        ((dict, UserDict, types.MappingProxyType), "of_mapping"),
        ((list, tuple, deque, set, frozenset, array), "of_sequence"),
        ((bytearray, memoryview, ctypes._SimpleCData, ctypes.Array), "of_raw"),
        ((pl.Trainer, weakref.ref), "of_skip"),
        (types.FunctionType, "of_function"),
        (types.MethodType, "of_method"),
        (partial, "of_partial"),
    )


def differences(actual, expected, rtol=0.0):
    """Return the paths at which two fingerprints differ; tensors and floats may differ by ``rtol``."""
    paths = [*expected, *(path for path in actual if path not in expected)]
    missing = object()
    return [
        f"{path}: {_short(actual.get(path, 'missing'))} instead of {_short(expected.get(path, 'missing'))}"
        for path in paths
        if not _equal(actual.get(path, missing), expected.get(path, missing), rtol)
    ]


def _short(value):
    text = " ".join(repr(value).split())
    return text if len(text) < 120 else text[:117] + "..."


def _equal(a, b, rtol):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or _near(a, b, rtol))
    if isinstance(a, np.ndarray):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and (a.tobytes() == b.tobytes() or _arrays_near(a, b, rtol))
    if isinstance(a, float):
        return (
            a == b or (math.isnan(a) and math.isnan(b)) or (rtol > 0 and math.isclose(a, b, rel_tol=rtol, abs_tol=rtol))
        )
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(x, y, rtol) for x, y in zip(a, b, strict=True))
    return a == b


def _near(a, b, rtol):
    if torch.equal(a, b):
        return True
    floating = a.is_floating_point() or a.is_complex()
    return bool(floating and torch.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True))


def _arrays_near(a, b, rtol):
    return bool(rtol and a.dtype.kind in "fc" and np.allclose(a, b, rtol=rtol, atol=rtol))
