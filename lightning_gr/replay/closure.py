"""Runs both passes of a closure, for plain PyTorch loops, Fabric and manual optimization."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._validate import GradientClip, check_exclude, check_gradient_clip
from lightning_gr.core.ahead import Ahead
from lightning_gr.core.flooding import flood_gradient_
from lightning_gr.core.gradients import BackwardCheck, TensorMarks
from lightning_gr.core.rules import Context, Rule, Update
from lightning_gr.core.selection import match_params
from lightning_gr.core.state import State
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import NoLossError, Transform, add_second_pass_, extract_loss
from lightning_gr.replay.evaluation import Evaluation, OwnGradients, Surroundings
from lightning_gr.replay.fingerprint import Fingerprint
from lightning_gr.replay.footprint import Footprint
from lightning_gr.replay.marks import Marks
from lightning_gr.replay.parameters import Parameters
from lightning_gr.replay.places import Place

__all__ = ["ClosurePasses", "regularized_backward"]


class ClosurePasses:
    """Evaluates a closure, and replays it for the second pass without side effects.

    Args:
        loss_fn: Computes the loss at the current weights: a scalar, or a mapping with the key ``"loss"``.
        surroundings: The state that ``loss_fn`` may change.
        storage: Keeps the weights while they are displaced.
        backward: Back-propagates the loss of the first pass.
        backward_again: Back-propagates a loss of the second pass, with the same factor.
        flood: Floods the gradient of a loss; None disables flooding.
        without_sync: A context manager in which gradients are not reduced over devices.
        local: Whether to use ``without_sync`` in the first pass.
        ahead: The point at which to compute the loss of the first pass, if not the weights. ``backward`` must go there
            as well.
        displaced: A context manager with the weights at that point. Default: ``ahead.displaced``.
        on_no_loss: Called with a message if a second pass has no loss.
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
        ahead: Ahead | None = None,
        displaced: Callable[[], AbstractContextManager[Any]] | None = None,
        on_no_loss: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.on_no_loss = on_no_loss
        self.loss_fn, self.surroundings = loss_fn, surroundings
        self.storage, self.ahead = storage, ahead
        self.displaced = displaced or (nullcontext if ahead is None else ahead.displaced)
        self.backward, self.backward_again, self.flood = backward, backward_again, flood
        self.without_sync, self.local = without_sync, local
        self._gave_up = False
        self.writes_gradients = False
        # the state only reachable from the closure: its variables, bound objects, defaults
        self._evaluation = Evaluation(loss_fn, surroundings, _Variables(loss_fn, surroundings))

    def first(self, only: bool = False, later: bool = False) -> Tensor:
        """Back-propagate the loss.

        Args:
            only: Whether there is no replay.
            later: Whether others have left their gradients in ``.grad``, to which ``loss_fn`` may write.

        Returns:
            The loss, detached and as ``loss_fn`` gave it.
        """
        with self.without_sync() if self.local else nullcontext():
            marks = TensorMarks(self._gradients(), self.surroundings.learning) if later and not only else None
            with self.displaced():
                output = self.loss_fn() if only else self._evaluation.first()
            self.writes_gradients = marks is not None and marks.differ(self._gradients())
            loss = extract_loss(output)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ValueError(f"Expected `loss_fn` to return a loss with a graph but got {_describe(loss)}")
            around, watched = self.surroundings, self.ahead is not None or not only
            check = BackwardCheck(around.trained(), around.learning) if watched else None
            with nullcontext() if only else self._watched_hooks():
                self.backward(self._flooded(loss))
            if check is not None:
                check.done()
        return loss.detach()

    def clean_loss(self) -> Tensor | None:
        """The loss at the weights, by a forward pass that leaves no trace; None if it has none there."""
        moved = [] if self.ahead is None else self.ahead.params
        with self.without_sync(), self._evaluation.again(moved, gradients="dropped") as output:
            loss = extract_loss(output)
            return None if loss is None else loss.detach()

    def _gradients(self) -> list[Tensor | None]:
        return [param.grad for param in self.surroundings.trained()]

    def _watched_hooks(self) -> AbstractContextManager[Any]:
        around = self.surroundings
        return around.hooks.watched(around.trained(), exactly=around.learning)

    def replay(self, transform: Transform, last: bool = True, sees: bool = False) -> None:
        """Evaluate again, see :class:`~lightning_gr.core.two_pass.Replay`; ``sees``: what others left in ``.grad``."""
        gradients: OwnGradients = "seen" if sees else "added"
        with (
            nullcontext() if last else self.without_sync(),
            self._evaluation.again(self.storage.params, gradients=gradients, second=not self._gave_up) as output,
        ):
            loss = extract_loss(output)
            if loss is None:
                self._gave_up = True
                self.on_no_loss(
                    "The loss function returned None in a second pass, at displaced weights: that step keeps its clean"
                    " gradient and counts as not regularized. If this happens often, use a smaller `epsilon` or `rho`"
                )
                raise NoLossError
            self.backward_again(transform(self._flooded(loss)))

    def _flooded(self, loss: Tensor) -> Tensor:
        if self.flood is None:
            return loss
        flooded = loss * 1  # a new tensor for the hook
        self.flood(flooded)
        return flooded


class _Variables(Footprint):
    """The footprint on state only reachable from a closure, remembered by name since closures are short-lived."""

    def __init__(self, loss_fn: Callable[[], Any], surroundings: Surroundings) -> None:
        super().__init__(lambda: {"loss_fn": loss_fn}, closed=surroundings.footprint.owners)
        self._surroundings = surroundings

    def protects(self, place: Place) -> bool:
        # everything, as long as nothing has been learned
        known = self._surroundings.learning or place.path in self._surroundings.written_variables
        return known or super().protects(place)

    def marks(self) -> Marks | Fingerprint:
        # what is protected only because nothing has been learned is to be learned as well
        return Fingerprint(self.places, 0) if self._surroundings.learning else super().marks()

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
    optimizer: torch.optim.Optimizer | None = None,
    state: State | None = None,
    gradient_clip: GradientClip | None = None,
) -> Tensor:
    """Compute the regularized gradient of a closure and add it to ``.grad``, without Lightning.

    The second evaluation starts from the same random numbers and state as the first one, and both are restored
    afterwards. State includes everything reachable from the module and from the variables that ``loss_fn`` captures,
    including ``nonlocal`` ones. Global variables, iterators and files are not restored; check
    :func:`~lightning_gr.in_second_pass` before you change them.

    Call ``optimizer.zero_grad()`` first, as before any backward pass, because the content of ``.grad`` after the first
    pass defines the direction.

    Args:
        loss_fn: Computes the loss at the current weights: a scalar, or a mapping with the key ``"loss"``. It is called
            twice (three times for the central scheme).
        params: The module to regularize, or the parameters alone, which only protects what ``loss_fn`` captures.
        rule: The method: :class:`~lightning_gr.GRRule`, :class:`~lightning_gr.SAMRule` or another one from
            :mod:`lightning_gr.rules`.
        strength: A factor on the penalty (or the radius), for warm-up.
        level: Flood the loss at this level. None disables flooding.
        exclude: Shell-style patterns for names of parameters that get exactly the clean gradient, or types of layers,
            such as ``"type:LayerNorm"``; requires a module.
        backward: Back-propagates a loss, for example ``fabric.backward``.
        loss_scale: The scale S of a gradient scaler as a tensor, ``scaler.scale(torch.ones((), device=...))``. Each
            loss is multiplied by it before ``backward``, so that ``.grad`` is ready for ``scaler.unscale_``.
        optimizer: The optimizer that will make the step. :class:`~lightning_gr.rules.MomentumSAMRule` needs it, for its
            momentum.
        state: What the rule keeps from step to step, for rules that do, such as
            :class:`~lightning_gr.rules.FriendlySAMRule`. It also counts the steps.
        gradient_clip: Scale the first gradient, and each further one, down to this norm before they are combined. Two
            numbers are the norms of the first gradient and of the further ones.

    Returns:
        The loss of the first pass, detached, without flooding and scaling.

    Raises:
        ValueError: If a pattern matches nothing, if there are no parameters, if ``loss_fn`` does not return a loss with
            a graph, or if ``optimizer`` or ``state`` is missing for a rule that needs it.

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
        raise ValueError("Expected `params` to contain a parameter, and to be a module if `exclude` is given")
    excluded = set() if module is None else match_params(patterns, module)
    group = {} if optimizer is None else optimizer.param_groups[0]
    update = rule.update(Context(strength, 0 if state is None else state.step, group))
    update = update.clipped(check_gradient_clip(gradient_clip))
    targets = [p for p in everything if id(p) not in excluded]

    def scaled_backward(loss: Tensor) -> None:
        backward(loss if loss_scale is None else loss * loss_scale)

    surroundings, storage = _memory_of(module, everything)
    ahead = _ahead(optimizer, targets, update, storage)

    def first_backward(loss: Tensor) -> None:
        with nullcontext() if ahead is None else ahead.displaced(again=True):
            scaled_backward(loss)

    passes = ClosurePasses(
        loss_fn,
        surroundings,
        storage,
        backward=first_backward,
        backward_again=scaled_backward,
        flood=None if level is None else lambda loss: flood_gradient_(loss, level),
        ahead=ahead,
    )
    loss = passes.first(only=not update.has_second_pass)
    if update.has_second_pass:
        add_second_pass_(
            update,
            targets,
            passes.replay,
            storage,
            excluded=[p for p in everything if id(p) in excluded],
            loss_scale=loss_scale,
            state=_NoState() if state is None else state,
        )
    if state is not None:
        state.step += 1
    return loss


class _NoState(State):
    """The state passed to a rule if the caller has not created one."""

    def set(self, name: str, vector: Sequence[Tensor]) -> None:
        raise ValueError(
            f"Expected `state` with a rule that keeps {name!r}: create a `State()` and pass it in each step"
        )


def _ahead(
    optimizer: torch.optim.Optimizer | None, params: list[Tensor], update: Update, storage: WeightStorage
) -> Ahead | None:
    if not update.ahead:
        return None
    if optimizer is None:
        raise ValueError(
            "Expected `optimizer` with a rule that looks ahead along its momentum: give the one that steps"
        )
    return Ahead(optimizer, params, update.ahead, storage)


_Memory = tuple[Surroundings, WeightStorage]
_memories: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()


def _memory_of(module: nn.Module | None, params: list[Tensor]) -> _Memory:
    """The state kept for a module between calls: what its loss writes to, and storage for its weights."""
    devices = sorted({p.device for p in params if p.device.type != "cpu"}, key=str)
    if module is None:
        return Surroundings(Footprint(dict), devices, trained=lambda: params), WeightStorage()
    if module not in _memories:
        # a strong reference would keep the module alive
        reference, parameters = weakref.ref(module), Parameters()

        def roots() -> dict[str, Any]:
            return {"module": reference()}

        def trained() -> list[Tensor]:
            target = reference()
            return [] if target is None else parameters.of(target)

        _memories[module] = Surroundings(Footprint(roots), devices, trained=trained), WeightStorage()
    return _memories[module]
