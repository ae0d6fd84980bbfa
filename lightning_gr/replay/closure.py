"""The two passes of a closure: for a plain PyTorch loop, for Fabric and for manual optimization."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.perturb import WeightCopy
from lightning_gr.core.rules import Rule
from lightning_gr.core.two_pass import Transform, add_second_pass_, check_exclude, extract_loss, match_names
from lightning_gr.replay.isolation import ModuleState, RandomState, StatefulModules, second_pass

__all__ = ["ClosurePasses", "regularized_backward"]


class ClosurePasses:
    """Evaluates a closure once, and again as often as a second pass asks for it, as if that had never happened.

    Args:
        loss_fn: Computes the loss, a scalar (or a mapping with ``"loss"``), at the current weights.
        modules: What ``loss_fn`` may change.
        devices: Accelerators in use.
        backward: How the first loss is back-propagated.
        backward_again: How that of a second pass is, times the same factor if there is one.
        flood: Floods a loss in place; None does not.
        muted: The module whose logging does nothing in a second pass.
        without_sync: A context in which gradients are not reduced over devices.
        local: Whether that holds for the first pass.
    """

    def __init__(
        self,
        loss_fn: Callable[[], Any],
        modules: StatefulModules,
        devices: Sequence[torch.device],
        *,
        backward: Callable[[Tensor], object],
        backward_again: Callable[[Tensor], object],
        flood: Callable[[Tensor], object] | None = None,
        muted: nn.Module | None = None,
        without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        local: bool = False,
    ) -> None:
        self.loss_fn = loss_fn
        self.modules, self.devices, self.muted = modules, devices, muted
        self.backward, self.backward_again, self.flood = backward, backward_again, flood
        self.without_sync, self.local = without_sync, local

    def first(self, only: bool = False) -> Tensor:
        """Back-propagate the loss; returns it, detached and as ``loss_fn`` gave it. ``only``: there is no replay."""
        if not only:
            self._numbers, self._before = RandomState(self.devices), ModuleState(self.modules)
        with self.without_sync() if self.local else nullcontext():
            loss, flooded = self._evaluate()
            if not only:
                self.modules.note_written(self._before)
            self.backward(flooded)
        return loss.detach()

    def replay(self, transform: Transform, last: bool = True) -> None:
        """Evaluate again, see :class:`~lightning_gr.core.two_pass.Replay`."""
        with second_pass(self.modules, self._before, self.devices, muted=self.muted):
            self._numbers.restore()
            with nullcontext() if last else self.without_sync():
                _, flooded = self._evaluate()
                self.backward_again(transform(flooded))

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        loss = extract_loss(self.loss_fn())
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(f"Expected `loss_fn` to return a loss with a graph but got {_describe(loss)}")
        if self.flood is None:
            return loss, loss
        flooded = loss * 1  # a tensor of our own to put a hook on
        self.flood(flooded)
        return loss, flooded


def _describe(loss: object) -> str:
    return "a tensor without one" if isinstance(loss, Tensor) else type(loss).__name__


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

    def scaled_backward(loss: Tensor) -> None:
        backward(loss if loss_scale is None else loss * loss_scale)

    passes = ClosurePasses(
        loss_fn,
        StatefulModules(module),
        sorted({p.device for p in everything if p.device.type != "cpu"}, key=str),
        backward=scaled_backward,
        backward_again=scaled_backward,
        flood=None if level is None else lambda loss: flood_gradient_(loss, level),
    )
    loss = passes.first(only=update.is_plain)
    if not update.is_plain:
        add_second_pass_(
            update,
            [p for p in everything if id(p) not in left_out],
            passes.replay,
            WeightCopy(),
            excluded=[p for p in everything if id(p) in left_out],
            loss_scale=loss_scale,
        )
    return loss
