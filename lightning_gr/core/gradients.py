"""Manages ``.grad`` around a pass: stashes it, hides it from a training step, or keeps it from changing."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_gr._compat import hook_tables, storage_uses, with_hooks
from lightning_gr.core.hooks import Zero, has_accumulation_hooks, without_hooks
from lightning_gr.core.sharding import is_distributed, local_parts
from lightning_gr.core.tensors import is_lazy

__all__ = [
    "BackwardCheck",
    "StashedGradients",
    "TensorMarks",
    "check_graphless",
    "gradients_apart",
    "hidden_gradients",
    "may_step",
    "own_gradient",
    "unchanged_gradients",
]


class TensorMarks:
    """What tells whether some tensors are other ones, or have been written to, since a moment.

    Args:
        tensors: The tensors, or None where there is none.
        thorough: Whether to read them as well, which shows a write through ``.data``.
    """

    def __init__(self, tensors: Sequence[Tensor | None], thorough: bool = False) -> None:
        self._tensors = list(tensors)
        self._versions = _versions(self._tensors)
        self._norms = _norms(self._tensors) if thorough else []

    def differ(self, now: Sequence[Tensor | None]) -> bool:
        """Compare with what is there ``now``, in the same order."""
        return (
            any(map(operator.is_not, now, self._tensors))
            or _versions(now) != self._versions
            or (bool(self._norms) and _differ(self._norms, _norms(now)))
        )


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor._version for tensor in tensors]


def may_step(params: Sequence[Tensor]) -> list[Tensor]:
    """Those of ``params`` with hooks that run after accumulation, in which an optimizer may step."""
    return [param for param in with_hooks(params) if has_accumulation_hooks(param)]


class BackwardCheck:
    """Detects optimizers that step during a backward pass, after which the second pass would start from other weights.

    Args:
        params: The parameters to regularize, before the backward pass.
        thorough: Whether to read all of them as well, which shows a write through ``.data``, and not only those with
            hooks that run after accumulation, where such optimizers step.
    """

    def __init__(self, params: Sequence[Tensor], thorough: bool = False) -> None:
        # a lazy parameter is written by the evaluation, which gives it its shape
        self._params = [param for param in params if not is_lazy(param)]
        self._read = self._params if thorough else may_step(self._params)
        self._marks, self._values = TensorMarks(self._params), TensorMarks(self._read, thorough=True)

    def done(self) -> None:
        """Check after the backward pass.

        Raises:
            RuntimeError: If a parameter was written to, or if a hook has dropped all gradients.
        """
        params = self._params
        # an optimizer in a kernel of its own may move no version counter
        dropped = all(param.grad is None for param in params) and any(any(hook_tables(param)) for param in params)
        if dropped or self._marks.differ(params) or self._values.differ(self._read):
            raise RuntimeError(
                "An optimizer has stepped in a hook during the backward pass, so there is nothing left for a second"
                " pass to regularize: let it step after the backward pass, or use no second pass"
            )


@torch.no_grad()
def _norms(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    # separately, because a small change of one tensor would be lost in the norm of all
    dense = [t for t in tensors if t is not None and t.layout == torch.strided]
    return [norm.nan_to_num() for norm in torch._foreach_norm(local_parts(dense))] if dense else []


def _differ(norms: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether any differs, waiting for the devices once."""
    different = [one != other for one, other in zip(norms, others, strict=True)]
    return bool(torch.stack([each.to(different[0].device) for each in different]).any())


def check_graphless(grads: Sequence[Tensor]) -> None:
    """Check that gradients cannot be differentiated.

    Raises:
        RuntimeError: If a gradient has a graph.
    """
    if any(grad.requires_grad for grad in grads):
        raise RuntimeError(
            "The gradients have a graph (`backward(create_graph=True)`, as for AdaHessian or SophiaH), which a second"
            " pass would break: use another optimizer, or no second pass"
        )


class StashedGradients:
    """Holds gradients of earlier backward passes while a later pass computes its own."""

    def __init__(self) -> None:
        self._stashed: dict[int, tuple[Tensor, Tensor]] = {}
        self._restored: dict[int, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        """Whether gradients are stashed."""
        return bool(self._stashed)

    def stash(self, params: Sequence[Tensor]) -> None:
        """Take the gradients of ``params``, without copying, except for views that will be overwritten."""
        self._stashed = {id(param): (param, own_gradient(param.grad)) for param in params if param.grad is not None}
        for param, _ in self._stashed.values():
            param.grad = None

    @torch.no_grad()
    def restore(self, params: Sequence[Tensor] | None = None, factor: float = 1.0) -> None:
        """Add ``factor`` times the stashed gradients to ``.grad``, once.

        Args:
            params: The parameters to restore; all of them by default.
            factor: The factor on the stashed gradients.
        """
        keys = self._stashed.keys() if params is None else self._stashed.keys() & {id(param) for param in params}
        restored = {key: self._stashed[key] for key in list(self._stashed) if key in keys}
        both = [(param.grad, grad) for param, grad in restored.values() if param.grad is not None]
        if both:
            now, before = zip(*both, strict=True)
            torch._foreach_add_(local_parts(now), local_parts(before), alpha=factor)
        for param, grad in restored.values():
            if param.grad is None:
                param.grad = grad if factor == 1.0 else grad * factor
        self._restored |= restored
        self._stashed = {key: pair for key, pair in self._stashed.items() if key not in restored}

    def undo(self, params: Sequence[Tensor]) -> None:
        """Treat the gradients of ``params`` as stashed again, because ``.grad`` is about to be recomputed."""
        for param in params:
            if id(param) in self._restored:
                self._stashed[id(param)] = self._restored.pop(id(param))

    def clear(self) -> None:
        """Forget the restored gradients, after which :meth:`undo` has no effect."""
        self._restored = {}


def own_gradient(grad: Tensor) -> Tensor:
    """Return ``grad``, or a copy if others share its memory, since the next backward pass may write to it.

    That is so with one of DDP's buckets (``gradient_as_bucket_view``), even if the bucket holds this gradient only, and
    with a buffer that holds all gradients.
    """
    part = local_parts([grad])[0]
    if part.layout != torch.strided:
        return grad
    is_view = part.untyped_storage().nbytes() > part.nbytes or storage_uses(part) != 1
    return grad.clone() if is_view else grad


@contextmanager
def hidden_gradients(params: Sequence[Tensor], added: Sequence[Tensor] = ()) -> Iterator[None]:
    """Run a training step with ``.grad`` empty, as in the first step, so that it cannot affect the existing gradients.

    Args:
        params: Whose gradients are hidden.
        added: Those of them whose gradient, if the step leaves one behind (by a ``backward()`` of its own), is added to
            the hidden one. That of the others is dropped.
    """
    hidden = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        left = [(param, param.grad) for param in added if param.grad is not None]
        for param, grad in zip(params, hidden, strict=True):
            param.grad = grad
        _add(left)


@torch.no_grad()
def _add(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for param, grad in pairs:
        param.grad = grad if param.grad is None else param.grad.add_(grad)


@contextmanager
def unchanged_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Let nothing of what is back-propagated to ``params`` be kept.

    It arrives as zero, so that DDP still sees it arrive. No hook sees what FSDP2 writes: there, the old gradient is put
    back. Hooks that would change what has been accumulated have done so already, and do not run.
    """
    with ExitStack() as stack:
        stack.enter_context(without_hooks(params, after_accumulation=True))
        for param in params:
            if is_distributed(param):
                stack.callback(setattr, param, "grad", param.grad)
                param.grad = None
            elif param.requires_grad:
                stack.callback(param.register_hook(Zero()).remove)  # type: ignore[no-untyped-call]
        yield


@contextmanager
def gradients_apart(params: Sequence[Tensor], others: Sequence[Tensor] = (), *, every: bool = False) -> Iterator[bool]:
    """Keep what is in ``.grad`` away from what writes to gradients, and add it to what a pass leaves there.

    That is hooks that run after accumulation, such as one that clips: they see the gradient of that pass by itself, as
    they did in the first one. It costs one gradient more for each parameter that has such a hook. What is away is not
    reduced over devices together with the gradient of the pass, so each of these passes has to be.

    Args:
        params: The parameters to whose gradients the pass adds.
        others: Other parameters, whose gradients are what they were afterwards.
        every: Whether a training step or a hook of Lightning's writes to gradients, so that all are kept away.

    Yields:
        Whether gradients are kept away.
    """
    away = list(params) if every else list(filter(has_accumulation_hooks, with_hooks(params)))
    # which a pass may write to, as to one of DDP's buckets
    earlier, kept = StashedGradients(), [(p, None if p.grad is None else own_gradient(p.grad)) for p in others]
    earlier.stash(away)
    for param, _ in kept:
        param.grad = None
    try:
        yield bool(away)
    finally:
        for param, grad in kept:
            param.grad = grad
        earlier.restore()
