"""Finds hooks on parameters that only observe gradients, as experiment trackers do, and skips them in second passes."""

import dis
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_gr.core.hooks import ExchangedHooks, OwnHook
from lightning_gr.replay.contents import sample
from lightning_gr.replay.digest import digests

__all__ = ["ObservingHooks", "may_change"]


class ObservingHooks:
    """Distinguishes hooks that only observe a gradient from those that change it, by their effect in first passes.

    A hook that has changed a gradient, through its return value or in place, runs in all passes, since it is part of
    the training. So does a hook whose code could change a gradient, such as one that only clips large gradients. Other
    hooks do not run in second passes, because their side effects, such as a histogram sent to an experiment tracker,
    cannot be undone.
    """

    def __init__(self) -> None:
        self._observing: set[int] = set()
        self._changing: set[int] = set()
        self._tried: ExchangedHooks | None = None
        self.exactly = False

    def begin(self, params: Sequence[Tensor], *, exactly: bool) -> None:
        """Watch the hooks on ``params`` until :meth:`end`; ``exactly`` compares the full content of each gradient."""
        self.end()
        self.exactly = exactly
        self._tried = ExchangedHooks(params, self._trial)

    def end(self) -> None:
        """Stop watching. It is safe to call this again."""
        if self._tried is not None:
            self._tried.put_back()
            self._tried = None

    @contextmanager
    def watched(self, params: Sequence[Tensor], *, exactly: bool) -> Iterator[None]:
        """Watch the hooks during the backward pass of a first evaluation, see :meth:`begin`."""
        self.begin(params, exactly=exactly)
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def silenced(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Disable the hooks that only observe."""
        nothing = OwnHook()
        exchanged = ExchangedHooks(params, lambda number, *_: nothing if number in self._observing else None)
        try:
            yield
        finally:
            exchanged.put_back()

    def _trial(self, number: int, hook: Callable[[Tensor], Any], after: bool) -> OwnHook | None:
        if number not in self._changing and number not in self._observing and may_change(hook):
            self._changing.add(number)
        return None if number in self._changing else _Trial(self, number, hook, after)

    def note(self, number: int, *, changed: bool) -> None:
        """Record whether hook ``number`` changed a gradient."""
        self._observing.add(number)
        if changed:
            self._changing.add(number)
            self._observing.discard(number)


class _Trial(OwnHook):
    """Runs a hook and records whether it changes the gradient."""

    def __init__(self, hooks: ObservingHooks, number: int, hook: Callable[[Tensor], Any], after: bool) -> None:
        self.hooks, self.number, self.hook, self.after = hooks, number, hook, after

    def __call__(self, tensor: Tensor) -> Any:
        grad = tensor.grad if self.after else tensor
        before = self._look(tensor, grad)
        result = self.hook(tensor)
        left = tensor.grad if self.after else tensor
        changed = (result is not None and result is not grad) or left is not grad or self._look(tensor, grad) != before
        self.hooks.note(self.number, changed=changed)
        return result

    def _look(self, tensor: Tensor, grad: Tensor | None) -> Any:
        # including the version of the parameter, since an optimizer may step in a hook
        return tensor._version, None if grad is None else (grad._version, self._content(grad))

    def _content(self, grad: Tensor) -> Any:
        # a write through `.data` does not bump the version counter
        if self.hooks.exactly:
            return digests([grad])
        is_on_host = type(grad) is Tensor and grad.device.type == "cpu" and grad.layout == torch.strided
        return sample([grad]) if is_on_host else None


def may_change(hook: Callable[[Tensor], Any]) -> bool:
    """Whether the code of a hook could change the gradient, even if it has not done so yet.

    This is the case if it assigns to its argument (or to a ``grad``), calls an in-place method (with a trailing
    underscore) or passes ``out``, or if it has branches and may return something other than None or its argument. Code
    that it calls is not inspected.
    """
    code_and_argument = _code_of(hook)
    if code_and_argument is None:
        return False
    code, argument = code_and_argument
    steps = list(dis.get_instructions(code))
    stored = any(
        (step.opname.startswith("STORE_FAST") and step.argval == argument)
        or (step.opname == "STORE_ATTR" and step.argval in ("data", "grad"))
        for step in steps
    )
    in_place = any(name.endswith("_") and not name.startswith("_") for name in code.co_names)
    in_place |= any("out" in names for names in code.co_consts if isinstance(names, tuple))
    branches = any(step.opcode in (*dis.hasjrel, *dis.hasjabs) for step in steps)
    returns = [pair for pair in pairwise(steps) if pair[1].opname.startswith(("RETURN_VALUE", "RETURN_CONST"))]
    return stored or in_place or (branches and not all(_is_harmless(*pair, argument) for pair in returns))


def _code_of(hook: Callable[[Tensor], Any]) -> tuple[types.CodeType, str | None] | None:
    """The code of a function, method or callable object, and the name of its argument."""
    function: Any = hook.func if isinstance(hook, partial) else hook
    if not isinstance(function, (types.FunctionType, types.MethodType)):
        function = vars(type(function)).get("__call__")
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        return None
    skipped = function is not hook or isinstance(function, types.MethodType)
    return code, next(iter(code.co_varnames[skipped : skipped + 1]), None)


def _is_harmless(before: dis.Instruction, step: dis.Instruction, argument: str | None) -> bool:
    """Whether ``step`` always returns None or the ``argument``."""
    value = step if step.opname == "RETURN_CONST" else before
    if step.is_jump_target and value is before:
        return False
    is_constant = value.opname in ("RETURN_CONST", "LOAD_CONST")
    return value.argval is None if is_constant else "LOAD_FAST" in value.opname and value.argval == argument
