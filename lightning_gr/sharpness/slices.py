"""One-dimensional slices of a loss: along its gradient and along a random direction."""

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
    """A loss along straight lines through the weights.

    Args:
        distances: ‖Δθ‖ with its sign, from −radius to radius.
        losses: For each direction, ``"gradient"`` and ``"random"``, the loss at these distances.
    """

    distances: list[float]
    losses: dict[str, list[float]] = field(default_factory=dict)


def filter_normalized(params: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A random direction of which each filter (row of a matrix) is as long as that of the weights.

    Biases and the weights of normalization layers (all that has one dimension) are left where they are.

    Source: Li, Xu, Taylor, Studer & Goldstein (NeurIPS 2018, arXiv 1712.09913), section 4.
    """
    weights = [param.detach() for param in params]
    drawn = random_unit(weights, generator)
    direction = []
    for weight, d in zip(weights, drawn, strict=True):
        if weight.ndim < 2:
            direction.append(torch.zeros_like(d))
        else:
            own, other = (x.flatten(1).norm(dim=1) for x in (weight.to(d.dtype), d))
            direction.append(d * (own / other.clamp_min(1e-30)).view(-1, *[1] * (d.ndim - 1)))
    return direction


def loss_slice(
    loss_fn: Callable[[], Any],
    params: nn.Module | Iterable[Tensor],
    *,
    radius: float = 1.0,
    points: int = 41,
    generator: torch.Generator | None = None,
) -> LossSlice:
    """The loss along its gradient, and along a random direction that is filter-normalized and then made of length 1.

    It leaves no trace: weights, ``.grad``, buffers and random state are what they were, bit for bit.

    Args:
        loss_fn: Computes the loss, a scalar (or a mapping with ``"loss"``), at the current weights.
        params: The module, of which the trainable parameters are taken, or parameters alone (then no buffers are
            protected).
        radius: How far to go to each side, as the norm of what is added to the parameters.
        points: How many points along each line; an odd number has the weights themselves among them.
        generator: Draws the random direction; by default one of its own with seed 0.

    Raises:
        ValueError: If an argument is out of its range, there are no trainable parameters, or ``loss_fn`` returns no
            loss with a graph.

    Source: Li et al. (NeurIPS 2018, arXiv 1712.09913) for the filter-normalized direction.

    Example::

        >>> w = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> found = loss_slice(lambda: w.square().sum(), [w], radius=5.0, points=3)
        >>> found.distances, found.losses["gradient"]
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
    """Draw slices of several modules, a picture for each direction; returns matplotlib's figure.

    Args:
        slices: By the names that the legend gives them.
        logarithmic: Whether the loss gets a logarithmic axis.
    """
    from lightning_gr.report.plotting import COLOURS, STYLES, new_figure

    names = list(next(iter(slices.values())).losses)
    figure, pictures = new_figure(len(names))
    titles = {"gradient": "Along the gradient", "random": "Along a random direction"}
    for name, axes in zip(names, pictures, strict=True):
        for i, (label, found) in enumerate(slices.items()):
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
            axes.plot(found.distances, found.losses[name], label=label, **look)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set(title=titles[name], xlabel="distance from the weights, ± ‖Δθ‖", ylabel="loss")
        if logarithmic:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def plot_slices(slices: Mapping[str, LossSlice], path: Path | str, logarithmic: bool = False) -> None:
    """Draw slices into a file, PNG or SVG or whatever else matplotlib writes, by its suffix.

    Args:
        slices: See :func:`draw_slices`.
        path: The file.
        logarithmic: See :func:`draw_slices`.

    Raises:
        PlotError: If the suffix is unknown or the file cannot be written.
    """
    from lightning_gr.report.plotting import save

    save(draw_slices(slices, logarithmic), Path(path))
