"""Evaluates a loss at displaced weights, and multiplies vectors by its Hessian, without side effects."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_gr._compat import is_error_node
from lightning_gr._validate import check_choice
from lightning_gr.core.signals import deferred_signals
from lightning_gr.core.storage import CopyStorage
from lightning_gr.core.tensors import inner_product, wide
from lightning_gr.core.two_pass import NoLossError, extract_loss
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HESSIAN_METHODS", "HessianMethod", "HessianProducts", "LossAround"]

HessianMethod = Literal["auto", "double_backward", "finite_difference"]
HESSIAN_METHODS: tuple[HessianMethod, ...] = ("auto", "double_backward", "finite_difference")


class LossAround:
    """A context manager that evaluates a loss and its gradient at displaced weights, without side effects.

    Every evaluation sees the same random numbers and buffers, and runs no hooks of parameters. On exit, weights,
    buffers, random state and ``.grad`` are as they were, bit for bit.

    Args:
        loss_fn: Computes the loss at the current weights: a scalar, or a mapping with the key ``"loss"``.
        params: A module, whose trainable parameters are used, or the parameters alone, without protection of buffers.
        surroundings: The state that ``loss_fn`` may change, if it is not limited to the module.

    Raises:
        ValueError: If there are no trainable parameters, if one is complex, or if ``loss_fn`` does not return a loss
            with a graph.
    """

    def __init__(
        self,
        loss_fn: Callable[[], Any],
        params: nn.Module | Iterable[Tensor],
        *,
        surroundings: Surroundings | None = None,
    ) -> None:
        module = params if isinstance(params, nn.Module) else None
        everything = module.parameters() if module is not None else list(params)  # type: ignore[arg-type]
        self.params = [p for p in everything if p.requires_grad]
        if not self.params or any(p.is_complex() for p in self.params):
            raise ValueError("Expected `params` to contain trainable parameters, all of them real")
        self._evaluation = Evaluation(loss_fn, surroundings or _surroundings(module, self.params))
        self._storage = CopyStorage()
        self._learned_moved: set[bool] = set()
        self._stack = ExitStack()

    def __enter__(self) -> "Self":
        # a caller may be in validation
        self._stack.enter_context(torch.inference_mode(False))
        self._stack.enter_context(torch.enable_grad())
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._put_back()
        self._storage = CopyStorage()
        self._stack.close()

    @torch.no_grad()
    def loss_at(self, vector: Sequence[Tensor], distance: float) -> Tensor:
        """L(θ + distance · vector)."""
        with self._moved(vector, distance), self._evaluate(distance != 0.0) as loss:
            return loss.detach()

    def gradient_at(self, vector: Sequence[Tensor], distance: float) -> tuple[Tensor, ...]:
        """∇L(θ + distance · vector), as one tensor per parameter."""
        with self._moved(vector, distance), self._evaluate(distance != 0.0) as loss:
            return torch.autograd.grad(_with_graph(loss), self.params, allow_unused=True, materialize_grads=True)

    @contextmanager
    def _evaluate(self, moved: bool) -> Iterator[Tensor]:
        """Evaluate the loss at the current weights; its side effects are undone on exit."""
        if moved not in self._learned_moved:
            # reveals what the loss writes to; at the clean weights, a teacher may be given the value it has
            self._learned_moved.add(moved)
            self._evaluation.learn()
        with self._evaluation.again(self.params, gradients="dropped", hooks=False) as output:
            loss = extract_loss(output)
            if not isinstance(loss, Tensor):
                raise NoLossError(f"Expected `loss_fn` to return a loss but got {type(loss).__name__}")
            yield loss

    @contextmanager
    def _moved(self, vector: Sequence[Tensor], distance: float) -> Iterator[None]:
        self._take()
        with deferred_signals():
            try:
                with torch.no_grad():
                    offsets = [v.to(p.dtype) for v, p in zip(vector, self.params, strict=True)]
                    torch._foreach_add_([p.data for p in self.params], offsets, alpha=distance)
                torch.clear_autocast_cache()
                yield
            finally:
                self._put_back()

    @torch.no_grad()
    def _take(self) -> None:
        if not self._storage.copies:
            self._storage.take(self.params)

    @torch.no_grad()
    def _put_back(self) -> None:
        """The weights, which a loss may write to as well, as where it clips them."""
        self._storage.put_back()
        torch.clear_autocast_cache()


class HessianProducts(LossAround):
    """A context manager in which ``products(v)`` computes H v, where H is a loss's Hessian at the current weights.

    Double backward evaluates the loss once and keeps the graph of its gradient. Finite differences,

        H v ≈ [∇L(θ + h v) − ∇L(θ − h v)] / 2h,      h ‖v‖ = u^(1/3) (1 + ‖θ‖)/10,

    where u is the machine epsilon, evaluate it twice per product. They are for operators without a second derivative
    (fused attention, cuDNN's recurrent networks, compiled modules). Every evaluation sees the same random numbers and
    buffers, and on exit weights, buffers, random state and ``.grad`` are as they were, bit for bit.

    The two methods differ for networks with kinks, such as ReLU: double backward sees no curvature at a kink, a finite
    step does. The backward method of a custom autograd function must be differentiable or marked
    ``once_differentiable``.

    Args:
        loss_fn: Computes the loss at the current weights: a scalar, or a mapping with the key ``"loss"``.
        params: A module, whose trainable parameters are used, or the parameters alone, without protection of buffers.
        method: ``"double_backward"``, ``"finite_difference"``, or ``"auto"``, which falls back to finite differences
            if double backward fails. Afterwards the attribute ``method`` holds the method used.
        surroundings: The state that ``loss_fn`` may change, if it is not limited to the module.
        average: Averages a list of tensors over devices in place, to give the Hessian of the mean loss.

    Raises:
        ValueError: If there are no trainable parameters, if one is complex, or if ``loss_fn`` does not return a loss
            with a graph.

    Source: Pearlmutter (Neural Computation 1994), exact multiplication by the Hessian.

    Example::

        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> with HessianProducts(lambda: (w**3).sum(), [w]) as products:
        ...     products([torch.tensor([1.0])])
        [tensor([18.])]
    """

    def __init__(
        self,
        loss_fn: Callable[[], Any],
        params: nn.Module | Iterable[Tensor],
        *,
        method: HessianMethod = "auto",
        surroundings: Surroundings | None = None,
        average: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        check_choice("method", method, HESSIAN_METHODS)
        super().__init__(loss_fn, params, surroundings=surroundings)
        self.method, self.average = method, average
        self._gradient: tuple[Tensor, ...] = ()
        self._isolated = ExitStack()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._forget()
        super().__exit__(exc_type, exc, traceback)

    def _forget(self) -> None:
        self._gradient = ()
        # after freeing the graph, which may hold buffers that are restored here
        self._isolated.close()

    def __call__(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Compute H v for a ``vector`` given as one tensor per parameter."""
        product = [wide(x.detach()) for x in self._multiply(vector)]
        if self.average is not None:
            self.average(product)
        return product

    def _multiply(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.method == "finite_difference":
            return self._by_difference(vector)
        if self.method == "double_backward":
            return self._by_double_backward(vector)
        try:
            product = self._by_double_backward(vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # an operator has no second derivative; the message differs from operator to operator
            self._forget()
            self.method = "finite_difference"
            return self._by_difference(vector)
        self.method = "double_backward"
        return product

    def _differentiate(self) -> None:
        # the graph of this evaluation is kept, so its isolation stays active too
        self._take()
        loss = _with_graph(self._isolated.enter_context(self._evaluate(False)))
        self._gradient = torch.autograd.grad(
            loss, self.params, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if _is_cut(self._gradient):
            raise RuntimeError(
                "The loss uses a function marked `once_differentiable`, so double backward would miss part of the"
                " Hessian: use `method='finite_difference'`"
            )

    def _by_double_backward(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._gradient:
            self._differentiate()
        pairs = [(g, v.to(g.dtype)) for g, v in zip(self._gradient, vector, strict=True) if g.requires_grad]
        if not pairs:  # a linear function
            return [torch.zeros_like(p) for p in self.params]
        gradient, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(
            gradient, self.params, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def _by_difference(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        length = float(inner_product(vector, vector)) ** 0.5
        if length == 0.0:
            return [torch.zeros_like(p) for p in self.params]
        with torch.no_grad():
            size = 1.0 + float(inner_product(self.params, self.params)) ** 0.5
        unit = max(torch.finfo(p.dtype).eps for p in self.params)
        step = 0.1 * unit ** (1 / 3) * size / length
        ahead, behind = ([wide(g) for g in self.gradient_at(vector, s)] for s in (step, -step))
        torch._foreach_sub_(ahead, behind)
        torch._foreach_mul_(ahead, 0.5 / step)
        return ahead


def _surroundings(module: nn.Module | None, params: list[Tensor]) -> Surroundings:
    devices = sorted({p.device for p in params if p.device.type != "cpu"}, key=str)
    everything = params if module is None else list(module.parameters())
    roots = {} if module is None else {"module": module}
    return Surroundings(Footprint(lambda: roots), devices, trained=lambda: everything)


def _with_graph(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise ValueError("Expected `loss_fn` to return a loss with a graph")
    return loss


def _is_cut(gradients: Sequence[Tensor]) -> bool:
    """Whether the graph of ``gradients`` contains an error node, which autograd would silently skip.

    ``once_differentiable`` puts this node on a separate branch, which ``torch.autograd.grad`` does not visit.
    """
    stack = [gradient.grad_fn for gradient in gradients if gradient.grad_fn is not None]
    seen: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        if is_error_node(node):
            return True
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        stack.extend(new)
    return False
