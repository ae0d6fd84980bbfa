"""Updates that need the gradients separately: each clipped by its norm, or combined by the rule itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_gr.core.gradients import own_gradient
from lightning_gr.core.perturb import Perturbation
from lightning_gr.core.rules import Update
from lightning_gr.core.sharding import local_parts
from lightning_gr.core.signals import deferred_signals
from lightning_gr.core.state import State
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import global_norm, scale_

__all__ = ["add_apart_", "clip_", "turn_"]

Replay = Callable[[Callable[[Tensor], Tensor], bool], None]


@torch.no_grad()
def clip_(gradients: Sequence[Tensor], limit: float, loss_scale: Tensor | None, norm: Tensor | None = None) -> Tensor:
    """Scale ``gradients`` in place so that their norm is at most ``limit``, without reading it from the device.

    Args:
        gradients: The gradients, times ``loss_scale``.
        limit: The largest norm, without that factor.
        loss_scale: A gradient scaler's factor, as a tensor.
        norm: The norm of ``gradients``, if it is known.

    Returns:
        The norm afterwards.
    """
    norm = global_norm(gradients) if norm is None else norm
    most = limit if loss_scale is None else limit * loss_scale.to(norm.dtype)
    factor = (most / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
    scale_(local_parts(gradients), factor)
    return norm * factor


@torch.no_grad()
def turn_(update: Update, params: Sequence[Tensor], norm: Tensor, loss_scale: Tensor | None, state: State) -> None:
    """Let the rule turn ``.grad`` into its direction, without the gradient scaler's factor from then on.

    Args:
        update: The update, with a ``turn``.
        params: The parameters, each with a gradient.
        norm: The norm of the gradient. If it is not finite, the state is left as it is.
        loss_scale: The gradient scaler's factor.
        state: What the rule keeps.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if loss_scale is not None:
        scale_(grads, loss_scale.reciprocal())
    if update.turn is not None:
        with state.of(params), _kept_if_finite(state, norm, loss_scale):
            update.turn(grads, state)


def add_apart_(
    update: Update,
    params: Sequence[Tensor],
    replay: Replay,
    storage: WeightStorage,
    loss_scale: Tensor | None,
    norm: Tensor | None,
    state: State,
) -> None:
    """Make ``.grad`` the update's combination of the gradients, each of which is kept separately until then.

    Raises:
        NoLossError: If a replay has no loss. ``.grad`` is the first gradient then.
    """
    first = [own_gradient(param.grad) for param in params if param.grad is not None]
    try:
        second = _further(update, params, first, replay, storage, loss_scale, norm)
    except BaseException:
        _set(params, first)
        raise
    _combine_(update, params, first, second, loss_scale, state)


def _further(
    update: Update,
    params: Sequence[Tensor],
    first: list[Tensor],
    replay: Replay,
    storage: WeightStorage,
    loss_scale: Tensor | None,
    norm: Tensor | None,
) -> list[Tensor]:
    """The weighted sum of the further gradients; for a rule that combines them, the only one; empty without a probe."""
    probes = [probe for probe in update.probes if probe.weight != 0.0]
    total: list[Tensor] = []
    if not probes:
        return total
    factor = None
    perturbation = Perturbation(params, storage, first)
    with deferred_signals():
        try:
            with perturbation:
                for probe in probes:
                    if probe is probes[0]:
                        factor = perturbation.displace(update, probe.distance, loss_scale, norm)
                    else:
                        perturbation.move_to(probe.distance)
                    gradient = _second(update, params, replay, loss_scale, last=probe is probes[-1])
                    total = gradient if update.combine else _add(total, gradient, probe.weight)
        finally:
            perturbation.restore()  # again, in case Ctrl-C interrupted the first call
            if factor is not None:
                with torch.no_grad():
                    scale_(local_parts(first), factor.reciprocal())
    return total


def _second(
    update: Update, params: Sequence[Tensor], replay: Replay, loss_scale: Tensor | None, last: bool
) -> list[Tensor]:
    _set(params, [None] * len(params))
    replay(lambda loss: loss, True)
    gradient = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    if not last:  # the next replay may write to them
        gradient = [own_gradient(grad) for grad in gradient]
    _set(params, [None] * len(gradient))
    if update.clip is not None:
        clip_(gradient, update.clip[1], loss_scale)
    return gradient


def _set(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


@torch.no_grad()
def _add(total: list[Tensor], gradient: list[Tensor], weight: float) -> list[Tensor]:
    if not total:
        scale_(local_parts(gradient), weight)
        return gradient
    torch._foreach_add_(local_parts(total), local_parts(gradient), alpha=weight)
    return total


@torch.no_grad()
def _combine_(
    update: Update,
    params: Sequence[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    loss_scale: Tensor | None,
    state: State,
) -> None:
    result = second or first
    if update.combine is None:
        if update.keep and result:
            torch._foreach_add_(local_parts(result), local_parts(first), alpha=update.keep)
    else:
        everything = [*first, *second]
        if loss_scale is not None:
            scale_(everything, loss_scale.reciprocal())
        with state.of(params), _kept_if_finite(state, None, loss_scale, everything):
            update.combine(first, second, state)
        if loss_scale is not None:
            scale_(result, loss_scale)
    _set(params, result)


@contextmanager
def _kept_if_finite(
    state: State, norm: Tensor | None, loss_scale: Tensor | None, gradients: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Take back what a rule keeps of a gradient that overflowed: the scaler skips that step."""
    if loss_scale is None:
        yield
        return
    finite = (global_norm(gradients) if norm is None else norm).isfinite()
    before = state.snapshot()
    yield
    state.restore_unless(finite, before)
