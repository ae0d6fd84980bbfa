"""The algorithm, written once: the first gradient is in ``.grad``, the second pass adds to it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_gr.core.perturb import Perturbation, WeightCopy, direction_factor, global_norm, scale_
from lightning_gr.core.rules import Update
from lightning_gr.core.sharding import is_distributed, settle_gradients
from lightning_gr.replay.isolation import deferred_signals

__all__ = ["Observer", "Replay", "add_second_pass_", "check_exclude", "extract_loss", "match_names"]

Transform = Callable[[Tensor], Tensor]


class Replay(Protocol):
    """Computes the loss of the first pass again, at the current weights, and back-propagates what is made of it."""

    def __call__(self, transform: Transform, last: bool = True) -> None:
        """For each loss of the first pass: back-propagate ``transform(loss)``, adding to ``.grad``.

        The loss carries whatever factor (of a gradient scaler, of accumulation) it carried in the first pass. Only the
        last replay of a step needs to reduce the gradients over devices: it reduces what was accumulated before, too.
        """
        ...


class Observer(Protocol):
    """Looks on, and changes nothing. See :class:`~lightning_gr.report.measurement.Measurement`."""

    def first(self, update: Update, params: Sequence[Tensor], norm: Tensor, loss_scale: Tensor | None) -> None:
        """``.grad`` of ``params`` holds the first gradient, times ``loss_scale``; ``norm`` is its norm."""
        ...

    def second(self, params: Sequence[Tensor]) -> None:
        """``.grad`` holds the gradient of the update, and the weights are what they were."""
        ...


def add_second_pass_(
    update: Update,
    params: Sequence[Tensor],
    replay: Replay,
    copy: WeightCopy,
    *,
    excluded: Sequence[Tensor] = (),
    loss_scale: Tensor | None = None,
    check_finite: bool = True,
    observer: Observer | None = None,
) -> None:
    """Turn ``.grad`` = ∇L(θ) into the gradient of ``update``, and leave the weights bit for bit as they are.

    Args:
        update: The row of the table.
        params: The parameters to regularize. Those without a gradient are left alone.
        replay: The second pass.
        copy: Storage for the weights, to be reused in the next step.
        excluded: Parameters that get gradients but keep those of the first pass.
        loss_scale: The scale of a gradient scaler, which all gradients carry, as a tensor.
        check_finite: Whether this process may decide by itself to leave a gradient with NaN or infinity alone. It is
            done on the CPU only, where looking is free; on a GPU it spreads over ``.grad``, never to the weights.
        observer: Is shown both gradients.
    """
    settle_gradients(params)
    targets = [p for p in params if p.grad is not None]
    grads = [p.grad for p in targets if p.grad is not None]
    if not grads:
        return
    looks = check_finite and all(grad.device.type == "cpu" for grad in grads)
    norm = global_norm(grads) if looks or update.direction == "normalized" or observer is not None else None
    if observer is not None and norm is not None:
        observer.first(update, targets, norm, loss_scale)
    # a norm that overflows counts as not finite
    if looks and norm is not None and not norm.isfinite():
        return
    with _unchanged_gradients(excluded):
        if update.curvature:
            _add_exact_(update, targets, grads, replay, loss_scale, norm)
        del grads  # a method that keeps nothing of them lets their memory go before the second pass
        if update.probes:
            _add_probes_(Perturbation(update, targets, copy, loss_scale, norm), replay)
    if observer is not None:
        observer.second(targets)


def _add_probes_(perturbation: Perturbation, replay: Replay) -> None:
    with deferred_signals():
        try:
            with perturbation:
                probes = perturbation.update.probes
                for probe in probes:
                    perturbation.move_to(probe.step)
                    replay(_Times(probe.weight), last=probe is probes[-1])
        finally:
            perturbation.restore()  # again, should Ctrl-C have come on the way to the first time


class _Times:
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, loss: Tensor) -> Tensor:
        return loss * self.factor


def _add_exact_(
    update: Update,
    params: Sequence[Tensor],
    grads: list[Tensor],
    replay: Replay,
    loss_scale: Tensor | None,
    norm: Tensor | None,
) -> None:
    """Add curvature · H d by back-propagating curvature · ⟨∇L, d⟩ with d held constant."""
    direction = [grad.detach().clone() for grad in grads]
    factor = direction_factor(update, direction, loss_scale, norm)
    if factor is not None:
        scale_(direction, factor)

    def inner_product(loss: Tensor) -> Tensor:
        again = torch.autograd.grad(loss, list(params), create_graph=True, allow_unused=True, materialize_grads=True)
        # 0 · p: a parameter that enters linearly has no second derivative, but DDP waits for its gradient
        terms = [((g + 0.0 * p) * d.conj()).sum().real for g, p, d in zip(again, params, direction, strict=True)]
        home = terms[0].device
        return update.curvature * torch.stack([term.to(home) for term in terms]).sum()

    replay(inner_product)


@contextmanager
def _unchanged_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Let nothing of what is back-propagated to ``params`` be kept.

    It arrives as zero, so that DDP still sees it arrive. No hook sees what FSDP2 writes: there, the old gradient is put
    back.
    """
    with ExitStack() as stack:
        for param in params:
            if is_distributed(param):
                stack.callback(setattr, param, "grad", param.grad)
                param.grad = None
            elif param.requires_grad:
                stack.callback(param.register_hook(torch.zeros_like).remove)  # type: ignore[no-untyped-call]
        yield


def extract_loss(output: Any) -> Tensor | None:
    """The loss in what a training step returned: a tensor, a mapping with ``"loss"``, or None."""
    return output.get("loss") if isinstance(output, Mapping) else output


def match_names(patterns: Iterable[str], module: nn.Module) -> set[int]:
    """The ids of the parameters of ``module`` whose name (any of its names, if tied) matches one of ``patterns``.

    Raises:
        ValueError: If a pattern matches no name.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        ids = {id(param) for name, param in named if fnmatchcase(name, pattern)}
        if not ids:
            some = ", ".join(name for name, _ in named[:4]) + (", …" if len(named) > 4 else "")
            raise ValueError(
                f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches none of {some};"
                " patterns are shell-style over whole names, as in '*.bias' or 'encoder.*'"
            )
        found |= ids
    return found


def check_exclude(exclude: object) -> tuple[str, ...]:
    """``exclude`` as a tuple of patterns."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise ValueError(f"Expected argument `exclude` to be a list of patterns such as ['*.bias'] but got {exclude!r}")
    patterns = tuple(exclude)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Expected argument `exclude` to be a list of strings but got {exclude!r}")
    return patterns
