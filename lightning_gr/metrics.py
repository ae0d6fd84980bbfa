"""torchmetrics of gradients, for use with or without the callbacks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_gr.core.tensors import global_norm, inner_product

__all__ = ["GradientAlignment", "GradientNorm", "Sharpness"]


class _Mean(Metric):
    """The mean over updates, and over ranks."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _take(self, value: Tensor) -> None:
        self.total = self.total.to(value.device) + value.detach()
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """The mean; NaN before the first update."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or those in ``val``, with matplotlib; returns the figure and the axes."""
        return self._plot(val, ax)


class GradientNorm(_Mean):
    """The Euclidean norm ‖∇L‖ of what ``.grad`` holds, as the mean over updates (and ranks).

    Under DDP ``.grad`` is the same on all ranks; of distributed tensors (FSDP2) the norm is that of the whole. The unit
    is that of the loss per unit of the parameters.

    Args:
        kwargs: Those of every :class:`torchmetrics.Metric`.

    Example::

        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> w.square().sum().backward()
        >>> norm = GradientNorm()
        >>> norm.update([w])
        >>> norm.compute()
        tensor(10.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_legend_name = "gradient norm"

    def update(self, params: nn.Module | Iterable[Tensor], scale: Tensor | float = 1.0) -> None:
        """Look at the gradients of a module or of parameters.

        Args:
            params: Whose gradients; those without one are left out.
            scale: What the gradients are multiplied by: the scale of a gradient scaler, if they have not been unscaled.
        """
        everything = params.parameters() if isinstance(params, nn.Module) else params
        grads = [param.grad for param in everything if param.grad is not None]
        norm = global_norm(grads) if grads else torch.zeros((), device=self.total.device)
        self._take(norm / scale)


class GradientAlignment(_Mean):
    """The cosine ⟨x, y⟩ / (‖x‖ ‖y‖) of two gradients, as the mean over updates (and ranks).

    Of the gradients at θ and at θ + ρ ∇L/‖∇L‖ it says how far the loss is from a quadratic bowl along its gradient; of
    the gradients of two batches, how far their noise goes.

    Example::

        >>> alignment = GradientAlignment()
        >>> alignment.update([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])])
        >>> alignment.compute()
        tensor(0.7071)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = -1.0, 1.0
    plot_legend_name = "cosine"

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Compare two gradients, each a tensor (or the local part of one) for each parameter."""
        self._take(inner_product(first, second) / (global_norm(first) * global_norm(second)))


class Sharpness(_Mean):
    """How much higher the loss is at perturbed weights, L(θ + s d) − L(θ), as the mean over updates (and ranks).

    Source: Foret, Kleiner, Mobahi & Neyshabur (ICLR 2021, arXiv 2010.01412), the bracket of their equation 1.

    Example::

        >>> sharpness = Sharpness()
        >>> sharpness.update(torch.tensor(1.0), torch.tensor(1.5))
        >>> sharpness.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_legend_name = "L(θ + s d) − L(θ)"

    def update(self, loss: Tensor, perturbed: Tensor) -> None:
        """Take in the losses of the same samples at the clean and at the perturbed weights."""
        self._take(perturbed.detach() - loss.detach())
