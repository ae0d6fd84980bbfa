"""Flooding keeps the training loss at a level: the loss itself, and the sign flip of its gradient."""

import torch
from torch import Tensor

__all__ = ["flood", "flood_gradient_"]


def flood(loss: Tensor, level: float) -> Tensor:
    """The flooded loss |L − b| + b: gradient descent above the level b, gradient ascent below it.

    Args:
        loss: L, a scalar.
        level: b, in the units of the loss.

    Returns:
        A scalar, at least ``level``.

    Source: Ishida, Yamane, Sakai, Niu & Sugiyama (ICML 2020, arXiv 2002.08709), equation 2; Karakida et al.
    (ICML 2023, arXiv 2210.02720) show that alternating descent and ascent performs finite-difference GR implicitly.

    Example::

        >>> flood(torch.tensor(0.25), level=1.0)
        tensor(1.7500)
    """
    return (loss - level).abs() + level


def flood_gradient_(loss: Tensor, level: float | Tensor, value: Tensor | None = None) -> Tensor:
    """Make ``loss.backward()`` compute the gradient of the flooded loss, without changing the loss.

    The gradient of |L − b| + b is ∇L times the sign of L − b, so a hook on the loss flips the sign of the incoming
    gradient if the loss is below the level. This does not synchronize with the device.

    Args:
        loss: A non-leaf scalar. If a gradient scaler has scaled it, ``level`` must be scaled the same way.
        level: The level b, in the units of ``loss``.
        value: The value to compare with the level; ``loss`` by default.

    Returns:
        A bool tensor: whether the loss is below the level.
    """
    below = (loss if value is None else value).detach() < level
    loss.register_hook(lambda grad: torch.where(below, -grad, grad))  # type: ignore[no-untyped-call]
    return below
