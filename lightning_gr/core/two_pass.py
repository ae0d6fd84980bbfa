"""The two-pass algorithm: ``.grad`` holds the first gradient, and the second pass adds to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gr.core.apart import add_apart_, clip_, turn_
from lightning_gr.core.gradients import StashedGradients, check_graphless, gradients_apart, unchanged_gradients
from lightning_gr.core.hooks import times, without_hooks
from lightning_gr.core.perturb import Perturbation, direction_factor
from lightning_gr.core.rules import Update
from lightning_gr.core.sharding import is_initialized, local_parts, plain_are_shards, settle_gradients
from lightning_gr.core.signals import deferred_signals
from lightning_gr.core.state import State
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import global_norm, scale_

__all__ = ["NoLossError", "Observer", "Replay", "Transform", "add_second_pass_", "extract_loss"]

Transform = Callable[[Tensor], Tensor]


class NoLossError(ValueError):
    """Raised if a replayed evaluation has no loss, such as a training step that returns None for a non-finite loss."""


class Replay(Protocol):
    """Recomputes the losses of the first pass at the current weights and back-propagates them."""

    def __call__(self, transform: Transform, last: bool = True) -> None:
        """Back-propagate ``transform(loss)`` for each loss of the first pass, adding to ``.grad``.

        The losses have the same factors (gradient scaler, accumulation) as in the first pass. Only the ``last`` replay
        of a step needs to reduce the gradients over devices, since it also reduces what was accumulated before.

        Raises:
            NoLossError: If there is no loss this time.
        """
        ...


class Observer(Protocol):
    """Sees both gradients without changing them, like :class:`~lightning_gr.report.measurement.Measurement`."""

    def first(self, update: Update, params: Sequence[Tensor], norm: Tensor, loss_scale: Tensor | None) -> None:
        """Called when ``.grad`` holds the first gradient times ``loss_scale``, whose norm is ``norm``."""
        ...

    def second(self, params: Sequence[Tensor]) -> None:
        """Called when ``.grad`` holds the gradient of the update and the weights have been restored."""
        ...


def add_second_pass_(
    update: Update,
    params: Sequence[Tensor],
    replay: Replay,
    storage: WeightStorage,
    *,
    stashed: StashedGradients | None = None,
    excluded: Sequence[Tensor] = (),
    apart: bool = False,
    weighted: bool = False,
    loss_scale: Tensor | None = None,
    check_finite: bool = True,
    observer: Observer | None = None,
    state: State | None = None,
) -> bool:
    """Turn ``.grad`` = ∇L(θ) into the gradient of ``update``, leaving the weights unchanged bit for bit.

    Args:
        update: The update to apply.
        params: The parameters to regularize. Those without a gradient are skipped.
        replay: Runs the second pass.
        storage: Keeps the weights in the meantime; it can be reused in the next step.
        stashed: Gradients of earlier passes. They are always restored before the last backward pass, because DDP
            reduces all of them together.
        excluded: Parameters that get gradients but keep those of the first pass.
        apart: Whether the replay also writes to what is in ``.grad``, as by clipping it, so that it must find there its
            own gradient only. That takes the memory of one gradient more.
        weighted: Whether gradients must have their weights when they are reduced, rather than afterwards, as for a
            communication hook that rounds them or keeps what it leaves out. It has no effect with ``apart``.
        loss_scale: The scale of a gradient scaler, which all gradients carry, as a tensor.
        check_finite: Whether all ranks have the same first gradient, so that this process may decide on its own to skip
            it if it has NaN or infinity, or if there is none. Values are only checked on the CPU, where that is free;
            on a GPU they spread over ``.grad``, never to the weights. Otherwise, this rank runs each pass, since others
            wait for its part of the reduction, even if it has no gradient itself.
        observer: Called with both gradients.
        state: The vectors that a rule with ``turn`` or ``combine`` keeps from step to step.

    Returns:
        Whether ``.grad`` is regularized. It is False, and ``.grad`` is the clean gradient, if there was no gradient, if
        it was not finite, or if the second pass had no loss.
    """
    stashed = StashedGradients() if stashed is None else stashed
    settle_gradients(params)
    targets = [p for p in params if p.grad is not None]
    grads = [p.grad for p in targets if p.grad is not None]
    check_graphless(grads)
    target_ids = {id(p) for p in targets}
    # those whose gradients the second pass makes: other ranks may have one where this one has none
    reduced = targets if check_finite else list(params)
    reduced_ids = {id(p) for p in reduced}
    stashed.restore([p for p in (*params, *excluded) if id(p) not in reduced_ids])
    if not grads and check_finite and not plain_are_shards():
        return False
    looks = check_finite and all(param.device.type == "cpu" for param in params)
    needs_norm = update.direction == "normalized" or update.clip is not None or not update.is_linear
    norm = global_norm(grads, like=params) if looks or needs_norm or observer is not None else None
    if observer is not None and norm is not None:
        observer.first(update, targets, norm, loss_scale)
    # an overflowing norm also counts as not finite
    if looks and norm is not None and not norm.isfinite():
        stashed.restore(targets)
        return False
    state = State() if state is None else state
    if update.clip is not None:
        norm = clip_(grads, update.clip[0], loss_scale, norm)
    if update.turn is not None and norm is not None:
        turn_(update, targets, norm, loss_scale, state)
        norm = loss_scale = None
    # with local ascent, other ranks may have a gradient of these, and they get the mean
    without = [p for p in params if id(p) not in target_ids] if check_finite else []
    replay = _Apart(replay, targets, [*without, *excluded] if apart else without, apart)
    with unchanged_gradients(() if apart else excluded):
        if update.curvature:
            others = () if apart else excluded
            _add_exact_(update, targets, reduced, grads, replay, stashed, loss_scale, norm, others)
        del grads  # frees their memory before the second pass if the method does not keep them
        if update.combine is not None or update.clip is not None:
            try:
                add_apart_(update, targets, replay, storage, loss_scale, norm, state)
            except NoLossError:
                return False
            finally:
                stashed.restore(targets)
        elif update.probes and not _add_probes_(
            update, targets, reduced, replay, storage, stashed, loss_scale, norm, weighted and not apart
        ):
            _recompute_(targets, replay, stashed)
            return False
    if observer is not None:
        observer.second(targets)
    return True


class _Apart:
    """A replay that finds in ``.grad`` only what is its own, where something writes to it."""

    def __init__(self, replay: Replay, params: Sequence[Tensor], others: Sequence[Tensor], every: bool) -> None:
        self.replay, self.params, self.others, self.every = replay, params, others, every

    def __call__(self, transform: Transform, last: bool = True) -> None:
        with gradients_apart(self.params, self.others, every=self.every) as apart:
            self.replay(transform, last or apart)


def _add_probes_(
    update: Update,
    params: Sequence[Tensor],
    reduced: Sequence[Tensor],
    replay: Replay,
    storage: WeightStorage,
    stashed: StashedGradients,
    loss_scale: Tensor | None,
    norm: Tensor | None,
    weighted: bool,
) -> bool:
    """Compute ``.grad`` = keep · ∇L(θ) + Σ weight · ∇L(θ + distance · d); return whether each probe had a loss.

    Losses are back-propagated without their weights. Instead, ``.grad`` is divided by the weight before and multiplied
    by it afterwards, so that hooks, such as one that clips gradients, see the gradient of the unweighted loss. The
    gradients of ``reduced`` that only other ranks had are multiplied as well. If ``weighted``, each gradient is
    multiplied between the hooks and the reduction, which takes one multiplication per parameter.
    """
    perturbation = Perturbation(params, storage)
    with deferred_signals():
        try:
            with perturbation:
                first, *others = [probe for probe in update.probes if probe.weight != 0.0]
                weight = 1.0 if weighted else first.weight
                factor = perturbation.displace(update, first.distance, loss_scale, norm)
                _keep_(params, update.keep / weight, factor)
                for probe in (first, *others):
                    if probe is not first:
                        perturbation.move_to(probe.distance)
                    if probe is not first and not weighted:
                        _keep_(params, weight / probe.weight)
                        weight = probe.weight
                    last = probe is (first, *others)[-1]
                    if last:
                        stashed.restore(reduced, 1.0 / weight)
                    with times(probe.weight, reduced) if weighted else nullcontext():
                        replay(_identity, last)
        except NoLossError:
            return False
        finally:
            perturbation.restore()  # again, in case Ctrl-C interrupted the first call
    _keep_(reduced, weight)
    return True


def _identity(loss: Tensor) -> Tensor:
    return loss


@torch.no_grad()
def _keep_(params: Sequence[Tensor], keep: float, factor: Tensor | None = None) -> None:
    """Multiply ``.grad`` by ``keep`` and divide it by ``factor``."""
    if keep == 0.0:
        # the first gradient is dropped, so that the second one need not be added to zeros
        for param in params:
            param.grad = None
    elif factor is not None or keep != 1.0:
        grads = local_parts([param.grad for param in params if param.grad is not None])
        scale_(grads, keep if factor is None else keep / factor)


def _recompute_(params: Sequence[Tensor], replay: Replay, stashed: StashedGradients) -> None:
    """Recompute the clean gradient at the clean weights, after a second pass that was abandoned."""
    for param in params:
        param.grad = None
    stashed.undo(params)
    stashed.restore(params)
    with _loss_expected():
        replay(_identity, True)


@contextmanager
def _loss_expected() -> Iterator[None]:
    """Explain a replay without a loss at weights at which there was one."""
    try:
        yield
    except NoLossError:
        raise RuntimeError(
            "The training step (or loss function) returned a loss in the first pass and None when it ran again at the"
            " same weights: let it return the loss whatever `lightning_gr.in_second_pass()` says"
        ) from None


def _add_exact_(
    update: Update,
    params: Sequence[Tensor],
    reduced: Sequence[Tensor],
    grads: list[Tensor],
    replay: Replay,
    stashed: StashedGradients,
    loss_scale: Tensor | None,
    norm: Tensor | None,
    others: Sequence[Tensor],
) -> None:
    """Add curvature · H d by back-propagating curvature · ⟨∇L, d⟩ with d held constant.

    DDP waits for the gradient of each parameter that the loss depends on, also of ``others``, and fails if it gets one
    of a parameter that the loss does not depend on. ⟨∇L, d⟩ may depend on fewer, so these enter it times 0.
    """
    waited = [param for param in others if param.requires_grad] if is_initialized() else []
    direction = [grad.detach().clone() for grad in grads]
    factor = direction_factor(update, direction, loss_scale, norm)
    if factor is not None:
        scale_(direction, factor)

    def inner_product(loss: Tensor) -> Tensor:
        everything = [*params, *waited]
        if not everything:
            return 0.0 * loss
        with without_hooks(everything):  # hooks only see the gradient of the penalty
            again = torch.autograd.grad(loss, everything, create_graph=True, allow_unused=True)
        ds = [*direction, *[None] * len(waited)]
        terms = [_term(g, p, d) for g, p, d in zip(again, everything, ds, strict=True) if g is not None]
        return update.curvature * torch.stack([term.to(loss.device) for term in terms]).sum() if terms else 0.0 * loss

    stashed.restore(reduced)  # not before: the direction is that of this gradient alone
    with _loss_expected():
        replay(inner_product)


def _term(gradient: Tensor, param: Tensor, direction: Tensor | None) -> Tensor:
    """⟨g + 0 · p, d⟩, or 0 · p without a direction."""
    return ((gradient + 0.0 * param) * direction.conj()).sum().real if direction is not None else 0.0 * param.sum().real


def extract_loss(output: Any) -> Tensor | None:
    """Extract the loss from the output of a training step: a tensor, a mapping with the key ``"loss"``, or None."""
    return output.get("loss") if isinstance(output, Mapping) else output
