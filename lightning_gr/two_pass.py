"""The algorithm, written once: the first gradient is in ``.grad``, the second pass adds to it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_gr.flooding import flood_gradient_
from lightning_gr.isolation import ModuleState, RandomState, StatefulModules, deferred_signals, second_pass
from lightning_gr.perturb import Perturbation, WeightCopy, direction_factor, global_norm, scale_
from lightning_gr.rules import Rule, Update
from lightning_gr.sharding import is_distributed, settle_gradients

__all__ = ["Replay", "add_second_pass_", "extract_loss", "match_names", "regularized_backward"]

Transform = Callable[[Tensor], Tensor]


class Replay(Protocol):
    """Computes the loss of the first pass again, at the current weights, and back-propagates what is made of it."""

    def __call__(self, transform: Transform, last: bool = True) -> None:
        """For each loss of the first pass: back-propagate ``transform(loss)``, adding to ``.grad``.

        The loss carries whatever factor (of a gradient scaler, of accumulation) it carried in the first pass. Only the
        last replay of a step needs to reduce the gradients over devices: it reduces what was accumulated before, too.
        """
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
    """
    settle_gradients(params)
    targets = [p for p in params if p.grad is not None]
    grads = [p.grad for p in targets if p.grad is not None]
    if not grads:
        return
    looks = check_finite and all(grad.device.type == "cpu" for grad in grads)
    norm = global_norm(grads) if looks or update.direction == "normalized" else None
    # a norm that overflows counts as not finite
    if looks and norm is not None and not norm.isfinite():
        return
    with _unchanged_gradients(excluded):
        if update.curvature:
            _add_exact_(update, targets, grads, replay, loss_scale, norm)
        if update.probes:
            _add_probes_(Perturbation(update, targets, copy, loss_scale, norm), replay)


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


def regularized_backward(
    loss_fn: Callable[[], Any],
    params: nn.Module | Iterable[Tensor],
    rule: Rule,
    *,
    strength: float = 1.0,
    level: float | None = None,
    exclude: Iterable[str] = (),
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Compute the regularized gradient of a closure and add it to ``.grad``: the update family without Lightning.

    The second evaluation sees the random numbers and the buffers of the first one and leaves no trace in them.
    Call ``optimizer.zero_grad()`` before, as before any backward pass: the direction is what ``.grad`` holds after
    the first one.

    Args:
        loss_fn: Computes the loss, a scalar (or a mapping with ``"loss"``), at the current weights. Called two times
            (three for the central scheme).
        params: The module to regularize, or parameters alone (then no buffers are protected).
        rule: The method: :class:`~lightning_gr.GRRule` or :class:`~lightning_gr.SAMRule`.
        strength: Factor of the penalty (of the radius), for warm-up.
        level: Flood the loss at this level; None does not.
        exclude: Shell-style patterns over the names of parameters that end with exactly the clean gradient; needs a
            module.
        backward: How a loss is back-propagated, for example ``fabric.backward``.
        loss_scale: The scale S of a gradient scaler as a tensor, ``scaler.scale(torch.ones((), device=...))``; each
            loss is multiplied by it before ``backward``, so that ``.grad`` is ready for ``scaler.unscale_``.

    Returns:
        The loss of the first pass, detached, without flooding and scale.

    Raises:
        ValueError: If a pattern matches nothing, if there are no parameters, or if ``loss_fn`` returns no loss that
            can be back-propagated.

    Source: Karakida et al. (ICML 2023, arXiv 2210.02720), F-GR and B-GR.

    Example::

        >>> from lightning_gr import GRRule, regularized_backward
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> loss = regularized_backward(lambda: (w**2).sum(), [w], GRRule(gamma=0.5, epsilon=0.1))
        >>> loss, w.grad  # ∇L + γ H ∇L = 6 + 0.5 · 2 · 6
        (tensor(9.), tensor([12.]))
    """
    module = params if isinstance(params, nn.Module) else None
    everything = list(module.parameters()) if module is not None else list(params)  # type: ignore[arg-type]
    patterns = check_exclude(exclude)
    if not everything or (patterns and module is None):
        raise ValueError("Expected `params` to hold a parameter, and to be a module where `exclude` is given")
    left_out = match_names(patterns, module) if module is not None else set()
    update = rule.update(strength)
    devices = sorted({p.device for p in everything if p.device.type != "cpu"}, key=str)
    stateful = StatefulModules(module)
    numbers, before = RandomState(devices), ModuleState(stateful)

    def evaluate(transform: Transform) -> Tensor:
        loss = extract_loss(loss_fn())
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(f"Expected `loss_fn` to return a loss with a graph but got {type(loss).__name__}")
        scaled = loss * 1 if loss_scale is None else loss * loss_scale
        if level is not None:
            flood_gradient_(scaled, level if loss_scale is None else level * loss_scale)
        backward(transform(scaled))
        return loss.detach()

    def replay(transform: Transform, last: bool = True) -> None:
        with second_pass(stateful, before, devices):
            numbers.restore()
            evaluate(transform)

    loss = evaluate(lambda scaled: scaled)
    if not update.is_plain:
        add_second_pass_(
            update,
            [p for p in everything if id(p) not in left_out],
            replay,
            WeightCopy(),
            excluded=[p for p in everything if id(p) in left_out],
            loss_scale=loss_scale,
        )
    return loss
