"""The two passes of a closure: for a plain PyTorch loop, for Fabric and for manual optimization."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._validate import check_exclude
from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.gradients import BackwardCheck
from lightning_gr.core.rules import Rule
from lightning_gr.core.selection import match_names
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import NoLossError, Transform, add_second_pass_, extract_loss
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.places import Place

__all__ = ["ClosurePasses", "regularized_backward"]


class ClosurePasses:
    """Evaluates a closure once, and again as often as a second pass asks for it, as if that had never happened.

    Args:
        loss_fn: Computes the loss, a scalar (or a mapping with ``"loss"``), at the current weights.
        surroundings: What ``loss_fn`` may change.
        storage: Where the weights are kept while they are displaced.
        backward: How the first loss is back-propagated.
        backward_again: How that of a second pass is, times the same factor if there is one.
        flood: Floods a loss in place; None does not.
        without_sync: A context in which gradients are not reduced over devices.
        local: Whether that holds for the first pass.
        on_no_loss: Is told, in a sentence, that a second pass got no loss.
    """

    def __init__(
        self,
        loss_fn: Callable[[], Any],
        surroundings: Surroundings,
        storage: WeightStorage,
        *,
        backward: Callable[[Tensor], object],
        backward_again: Callable[[Tensor], object],
        flood: Callable[[Tensor], object] | None = None,
        without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        local: bool = False,
        on_no_loss: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.on_no_loss = on_no_loss
        self.loss_fn, self.surroundings, self.storage = loss_fn, surroundings, storage
        self.backward, self.backward_again, self.flood = backward, backward_again, flood
        self.without_sync, self.local = without_sync, local
        self._gave_up = False
        # what the closure alone can reach: its variables, bound objects, defaults
        self._evaluation = Evaluation(loss_fn, surroundings, _Variables(loss_fn, surroundings))

    def first(self, only: bool = False) -> Tensor:
        """Back-propagate the loss; returns it, detached and as ``loss_fn`` gave it. ``only``: there is no replay."""
        with self.without_sync() if self.local else nullcontext():
            output = self.loss_fn() if only else self._evaluation.first()
            loss = extract_loss(output)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ValueError(f"Expected `loss_fn` to return a loss with a graph but got {_describe(loss)}")
            check = None if only else BackwardCheck(self.surroundings.trained(), self.surroundings.learning)
            with nullcontext() if only else self._watched_hooks():
                self.backward(self._flooded(loss))
            if check is not None:
                check.done()
        return loss.detach()

    def _watched_hooks(self) -> AbstractContextManager[Any]:
        around = self.surroundings
        return around.hooks.watched(around.trained(), exactly=around.learning)

    def replay(self, transform: Transform, last: bool = True) -> None:
        """Evaluate again, see :class:`~lightning_gr.core.two_pass.Replay`."""
        with (
            nullcontext() if last else self.without_sync(),
            self._evaluation.again(self.storage.params, second=not self._gave_up) as output,
        ):
            loss = extract_loss(output)
            if loss is None:
                self._gave_up = True
                self.on_no_loss(
                    "The loss function returned None in a second pass, at displaced weights: that step keeps its clean"
                    " gradient and counts as not regularized. If it happens often, take a smaller `epsilon` or `rho`"
                )
                raise NoLossError
            self.backward_again(transform(self._flooded(loss)))

    def _flooded(self, loss: Tensor) -> Tensor:
        if self.flood is None:
            return loss
        flooded = loss * 1  # a tensor of our own to put a hook on
        self.flood(flooded)
        return flooded


class _Variables(Footprint):
    """The footprint on what a closure alone can reach. Closures come and go, so it is remembered by name."""

    def __init__(self, loss_fn: Callable[[], Any], surroundings: Surroundings) -> None:
        super().__init__(lambda: {"loss_fn": loss_fn}, closed=surroundings.footprint.owners)
        self._surroundings = surroundings

    def protects(self, place: Place) -> bool:
        # all of it where nothing has been learned yet
        known = self._surroundings.learning or place.path in self._surroundings.written_variables
        return known or super().protects(place)

    def note(self, places: Iterable[Place]) -> None:
        places = list(places)
        self._surroundings.written_variables |= {place.path for place in places}
        super().note(places)

    def warn_about(self, place: Place, why: str) -> None:
        # once for all closures
        self._surroundings.footprint.warn_about(place, why)


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

    The second evaluation starts from the random numbers and the state that the first one started from, and leaves no
    trace in them. State is what can be reached from the module, and the variables that ``loss_fn`` has captured
    (``nonlocal`` ones included) with the objects in them. Global variables are not put back, nor are iterators and
    files: ask :func:`~lightning_gr.in_second_pass` there.

    Call ``optimizer.zero_grad()`` before, as before any backward pass: the direction is what ``.grad`` holds after
    the first one.

    Args:
        loss_fn: Computes the loss, a scalar (or a mapping with ``"loss"``), at the current weights. Called twice
            (three times for the central scheme).
        params: The module to regularize, or parameters alone (then only what ``loss_fn`` has captured is protected).
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
        >>> loss, w.grad.round(decimals=3)  # ∇L + γ H ∇L = 6 + 0.5 · 2 · 6
        (tensor(9.), tensor([12.]))
    """
    module = params if isinstance(params, nn.Module) else None
    everything: list[Tensor] = list(module.parameters() if module is not None else params)  # type: ignore[arg-type]
    patterns = check_exclude(exclude)
    if not everything or (patterns and module is None):
        raise ValueError("Expected `params` to hold a parameter, and to be a module where `exclude` is given")
    left_out = match_names(patterns, module.named_parameters(remove_duplicate=False)) if module is not None else set()
    update = rule.update(strength)

    def scaled_backward(loss: Tensor) -> None:
        backward(loss if loss_scale is None else loss * loss_scale)

    surroundings, storage = _memory_of(module, everything)
    passes = ClosurePasses(
        loss_fn,
        surroundings,
        storage,
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
            storage,
            excluded=[p for p in everything if id(p) in left_out],
            loss_scale=loss_scale,
        )
    return loss


_Memory = tuple[Surroundings, WeightStorage]
_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()


def _memory_of(module: nn.Module | None, params: list[Tensor]) -> _Memory:
    """What is kept about a module from call to call: what its loss writes to, and a copy of its weights."""
    devices = sorted({p.device for p in params if p.device.type != "cpu"}, key=str)
    if module is None:
        return Surroundings(Footprint(dict), devices, trained=lambda: params), WeightStorage()
    if module not in _memories:
        itself = weakref.ref(module)  # a strong reference would keep the module alive

        def roots() -> dict[str, Any]:
            return {"module": itself()}

        def trained() -> list[Tensor]:
            found = itself()
            return [] if found is None else list(found.parameters())

        _memories[module] = Surroundings(Footprint(roots), devices, trained=trained), WeightStorage()
    return _memories[module]
