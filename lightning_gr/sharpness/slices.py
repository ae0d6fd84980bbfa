"""One-dimensional slices of a loss, along its gradient and along a random direction."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._validate import check_int, check_number
from lightning_gr.core.tensors import inner_product, random_unit
from lightning_gr.sharpness.hessian import LossAround

__all__ = ["LossSlice", "draw_slices", "filter_normalized", "loss_slice", "plot_slices"]


@dataclass(frozen=True)
class LossSlice:
    """The values of a loss along straight lines through the weights.

    Args:
        distances: Signed distances ±‖Δθ‖, from −radius to radius.
        losses: The losses at these distances, for each of the directions ``"gradient"`` and ``"random"``.
    """

    distances: list[float]
    losses: dict[str, list[float]] = field(default_factory=dict)


def filter_normalized(params: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draw a random direction in which each filter (row of a matrix) has the norm of the corresponding weights.

    One-dimensional parameters, such as biases and the weights of normalization layers, are not moved.

    Source: Li, Xu, Taylor, Studer & Goldstein (NeurIPS 2018, arXiv 1712.09913), section 4.
    """
    weights = [param.detach() for param in params]
    drawn = random_unit(weights, generator)
    direction = []
    for weight, d in zip(weights, drawn, strict=True):
        if weight.ndim < 2:
            direction.append(torch.zeros_like(d))
        else:
            target, norm = (x.flatten(1).norm(dim=1) for x in (weight.to(d.dtype), d))
            direction.append(d * (target / norm.clamp_min(1e-30)).view(-1, *[1] * (d.ndim - 1)))
    return direction


def loss_slice(
    loss_fn: Callable[[], Any],
    params: nn.Module | Iterable[Tensor],
    *,
    radius: float = 1.0,
    points: int = 41,
    generator: torch.Generator | None = None,
) -> LossSlice:
    """Evaluate a loss along its gradient and along a filter-normalized random direction, both scaled to norm 1.

    Weights, ``.grad``, buffers and random state are left unchanged, bit for bit.

    Args:
        loss_fn: Computes the loss at the current weights: a scalar, or a mapping with the key ``"loss"``.
        params: A module, whose trainable parameters are used, or the parameters alone, without protection of buffers.
        radius: The largest distance in either direction, as the norm of the change in the parameters.
        points: The number of points on each line. An odd number includes the weights themselves.
        generator: Draws the random direction. Defaults to a new generator with seed 0.

    Raises:
        ValueError: If an argument is out of range, if there are no trainable parameters, or if ``loss_fn`` does not
            return a loss with a graph.

    Source: Li et al. (NeurIPS 2018, arXiv 1712.09913) for the filter-normalized direction.

    Example::

        >>> w = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> result = loss_slice(lambda: w.square().sum(), [w], radius=5.0, points=3)
        >>> result.distances, result.losses["gradient"]
        ([-5.0, 0.0, 5.0], [0.0, 25.0, 100.0])
    """
    check_number("radius", radius, positive=True)
    check_int("points", points, minimum=2)
    distances = torch.linspace(-radius, radius, points, dtype=torch.float64).tolist()
    with LossAround(loss_fn, params) as around:
        generator = generator or torch.Generator().manual_seed(0)
        gradient = list(around.gradient_at(around.params, 0.0))
        directions = {"gradient": gradient, "random": filter_normalized(around.params, generator)}
        losses = {}
        for name, direction in directions.items():
            length = float(inner_product(direction, direction)) ** 0.5
            scale = 1.0 / length if length else 0.0
            losses[name] = [float(around.loss_at(direction, scale * distance)) for distance in distances]
    return LossSlice(distances, losses)


def draw_slices(slices: Mapping[str, LossSlice], logarithmic: bool = False) -> Any:
    """Draw slices of several modules, with one panel per direction; return the matplotlib figure.

    Args:
        slices: The slices, keyed by their names in the legend.
        logarithmic: Use a logarithmic axis for the loss.
    """
    from lightning_gr.report.plotting import COLORS, STYLES, new_figure

    names = list(next(iter(slices.values())).losses)
    figure, all_axes = new_figure(len(names))
    titles = {"gradient": "Along the gradient", "random": "Along a random direction"}
    for name, axes in zip(names, all_axes, strict=True):
        for i, (label, one) in enumerate(slices.items()):
            style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}
            axes.plot(one.distances, one.losses[name], label=label, **style)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set(title=titles[name], xlabel="distance from the weights, ± ‖Δθ‖", ylabel="loss")
        if logarithmic:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def plot_slices(slices: Mapping[str, LossSlice], path: Path | str, logarithmic: bool = False) -> None:
    """Draw slices to an image file.

    Args:
        slices: See :func:`draw_slices`.
        path: The file; its suffix sets the format (PNG, SVG or any other that matplotlib supports).
        logarithmic: See :func:`draw_slices`.

    Raises:
        PlotError: If the suffix is unknown or the file cannot be written.
    """
    from lightning_gr.report.plotting import save

    save(draw_slices(slices, logarithmic), Path(path))
