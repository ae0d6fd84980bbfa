"""Flooding: keep the training loss at a level. The functional form, and the sign of the gradient that it implies."""

import torch
from torch import Tensor

__all__ = ["flood", "flood_gradient_"]


def flood(loss: Tensor, level: float) -> Tensor:
    """The flooded loss |L − b| + b: gradient descent above the level b, gradient ascent below it.

    Args:
        loss: L, a scalar.
        level: b, in the unit of the loss.

    Returns:
        A scalar, at least ``level``.

    Source: Ishida, Yamane, Sakai, Niu & Sugiyama (ICML 2020, arXiv 2002.08709), equation 2; Karakida et al.
    (ICML 2023, arXiv 2210.02720) show that its ups and downs perform finite-difference GR implicitly.

    Example::

        >>> flood(torch.tensor(0.25), level=1.0)
        tensor(1.7500)
    """
    return (loss - level).abs() + level


def flood_gradient_(loss: Tensor, level: float | Tensor, value: Tensor | None = None) -> Tensor:
    """Make ``loss.backward()`` compute the gradient of the flooded loss, without changing the loss.

    The gradient of |L − b| + b is ∇L times the sign of L − b, so a hook on the loss flips the sign of the incoming
    gradient where the loss is below the level. Nothing is read from the device.

    Args:
        loss: A scalar that is not a leaf; it may carry a gradient scaler's scale if ``level`` carries it too.
        level: The level b, in the unit of ``loss``.
        value: What is compared with the level; ``loss`` by default.

    Returns:
        Whether the loss is below the level, as a tensor.
    """
    below = (loss if value is None else value).detach() < level
    loss.register_hook(lambda grad: torch.where(below, -grad, grad))  # type: ignore[no-untyped-call]
    return below
