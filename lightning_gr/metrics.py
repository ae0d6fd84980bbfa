"""Metrics of gradients for torchmetrics, usable with or without the callbacks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_gr.core.tensors import global_norm, inner_product

__all__ = ["GradientAlignment", "GradientNorm", "Sharpness"]


class _Mean(Metric):
    """The mean of a value over updates and ranks."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        self.total = self.total.to(value.device) + value.detach()
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """Return the mean, or NaN before the first update."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the current value, or those in ``val``, with matplotlib; return the figure and the axes."""
        return self._plot(val, ax)


class GradientNorm(_Mean):
    """The Euclidean norm ‖∇L‖ of the gradients in ``.grad``, averaged over updates and ranks.

    Under DDP, ``.grad`` is the same on all ranks. For distributed tensors (FSDP2), the norm covers the full tensors.
    Its unit is that of the loss per unit of the parameters.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

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
        """Add the norm of the current gradients.

        Args:
            params: A module or parameters. Parameters without a gradient are skipped.
            scale: The factor on the gradients: a gradient scaler's scale, if they have not been unscaled.
        """
        everything = params.parameters() if isinstance(params, nn.Module) else params
        grads = [param.grad for param in everything if param.grad is not None]
        norm = global_norm(grads) if grads else torch.zeros((), device=self.total.device)
        self._add(norm / scale)


class GradientAlignment(_Mean):
    """The cosine ⟨x, y⟩ / (‖x‖ ‖y‖) of two gradients, averaged over updates and ranks.

    For the gradients at θ and θ + ρ ∇L/‖∇L‖, it measures how much the loss deviates from a quadratic bowl along its
    gradient. For the gradients of two batches, it measures their noise.

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
        """Add the cosine of two gradients, each given as one tensor (or local shard) per parameter."""
        self._add(inner_product(first, second) / (global_norm(first) * global_norm(second)))


class Sharpness(_Mean):
    """The increase of the loss at perturbed weights, L(θ + s d) − L(θ), averaged over updates and ranks.

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
        """Add the difference between the losses of the same samples at the perturbed and the clean weights."""
        self._add(perturbed.detach() - loss.detach())
