"""Measures norms, losses and curvature from the two passes of a step, on the device and only the requested ones."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gr._fsdp1 import own_name
from lightning_gr.core.rules import Update
from lightning_gr.core.sharding import by_layout, local_parts, plain_are_shards, sum_of_shards, sum_over_ranks
from lightning_gr.core.tensors import inner_product, tensor_norms, wide_dtype
from lightning_gr.core.two_pass import Replay, Transform

__all__ = [
    "BY_LAYER",
    "METRICS",
    "OF_SECOND_GRADIENT",
    "Measurement",
    "check_metrics",
    "default_metrics",
    "layer_norms",
    "layers_of",
    "undefined_metrics",
]

METRICS = ("grad_norm", "grad_norm_perturbed", "penalty", "loss_perturbed", "sharpness", "alignment", "curvature")
BY_LAYER = "grad_norm_by_layer"
# the metrics that need the second gradient separately
OF_SECOND_GRADIENT = frozenset({"grad_norm_perturbed", "alignment", "curvature"})


def check_metrics(
    metrics: object, known: Sequence[str], default: Sequence[str], undefined: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Validate ``metrics`` and expand it to metric names.

    Args:
        metrics: A name, ``"default"``, ``"all"`` (everything except the norms by layer), or a sequence of these.
        known: All valid names.
        default: The names that ``"default"`` expands to.
        undefined: Names that are undefined for this method, with the reason; ``"default"`` and ``"all"`` omit them.

    Raises:
        ValueError: If a name is unknown or undefined.
    """
    undefined = undefined or {}
    groups = {"default": default, "all": [name for name in known if name != BY_LAYER]}
    is_sequence = isinstance(metrics, Iterable) and not isinstance(metrics, str)
    requested: list[Any] = [*metrics] if is_sequence else [metrics]  # type: ignore[misc]
    for name in requested:
        if name not in groups and name not in known:
            choices = ", ".join(repr(choice) for choice in ("default", "all", *known))
            raise ValueError(f"Expected argument `metrics` to contain only {choices} but got {name!r}")
        if name in undefined:
            raise ValueError(f"Expected argument `metrics` not to contain {name!r} here, because {undefined[name]}")
    names = [name for entry in requested for name in groups.get(entry, [entry]) if name not in undefined]
    return tuple(dict.fromkeys(names))


def default_metrics(update: Update) -> tuple[str, ...]:
    """Return what is logged by default: everything that does not cost a pass."""
    return ("grad_norm",) if update.ahead else ("grad_norm", "sharpness", "penalty")


def undefined_metrics(update: Update) -> dict[str, str]:
    """Return the metrics that an update does not define, each with the reason."""
    if update.ahead:
        return dict.fromkeys(set(METRICS) - {"grad_norm", "sharpness"}, "there is a single pass")
    reasons = {}
    if update.direction == "adaptive":
        reasons = dict.fromkeys(("penalty", "curvature"), "ASAM's direction is not along the gradient")
    if len(update.probes) != 1:
        reasons |= dict.fromkeys(("grad_norm_perturbed", "alignment"), "this scheme has no separate perturbed gradient")
    if not update.probes:
        reasons |= dict.fromkeys(("loss_perturbed", "sharpness"), "this scheme does not perturb the weights")
    if not update.is_linear:
        unknown = OF_SECOND_GRADIENT | {"penalty"}
        reasons |= dict.fromkeys(unknown, "this rule does not combine the gradients linearly")
    if update.clip is not None:
        reasons |= dict.fromkeys(OF_SECOND_GRADIENT, "each gradient is clipped")
    return reasons


def layers_of(module: nn.Module) -> dict[str, list[Tensor]]:
    """Group the trainable parameters by the submodule that owns them; a parameter of ``module`` itself is its own."""
    layers: dict[str, list[Tensor]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            own = own_name(name)
            layers.setdefault(own.rpartition(".")[0] or own, []).append(param)
    return layers


def layer_norms(layers: Mapping[str, Sequence[Tensor]], scale: Tensor | None = None) -> dict[str, Tensor]:
    """The gradient norm of each layer, divided by ``scale``; zero if the layer has no gradient."""
    found: dict[Hashable, list[tuple[int, Tensor]]] = {}
    for position, params in enumerate(layers.values()):
        grads = [param.grad for param in params if param.grad is not None]
        for layout, group in by_layout(grads).items():
            found.setdefault(layout, []).extend((position, grad) for grad in group)
    if plain_are_shards():
        found.setdefault(None, [])  # this rank may have no part of any
    everything = [param for params in layers.values() for param in params]
    device = everything[0].device if everything else None
    squares = torch.zeros(len(layers), dtype=wide_dtype(everything), device=device)
    for pairs in found.values():
        own = torch.zeros_like(squares)
        grads = [grad for _, grad in pairs]
        for (position, _), norm in zip(pairs, tensor_norms(local_parts(grads), wide_dtype(grads)), strict=True):
            own[position] += norm.square().to(own, non_blocking=True)
        squares += sum_over_ranks(own, grads[0]) if grads else sum_of_shards(own)
    by_layer = dict(zip(layers, squares.sqrt(), strict=True))
    return by_layer if scale is None else {name: norm / scale for name, norm in by_layer.items()}


class Measurement:
    """An observer for :func:`~lightning_gr.core.two_pass.add_second_pass_`.

    Let g₀ be the first gradient and g = a·g₀ + Σ bₖ·∇L(θ + sₖ d) the final one. Then h = g − (a + Σ bₖ)·g₀ contains
    everything about the second gradient. Computing h requires a copy of g₀, the size of all gradients, which is made
    only on measured steps and only if a metric needs it. The displacement of the weights would yield g₀ without a copy,
    but only to the weights' resolution.

    Args:
        names: The metrics to measure.
        loss: The clean loss.
        unit: The factor on the losses of the second pass.
        separable: Whether ``.grad`` holds a·g₀ and the second gradient of the same samples, and nothing else.
        layers: The parameters by layer, for the norms by layer.
        local: Whether the first gradient is this rank's own rather than the mean over ranks.
    """

    def __init__(
        self,
        names: Iterable[str],
        loss: Tensor | None,
        unit: Tensor | float = 1.0,
        separable: bool = True,
        layers: Mapping[str, Sequence[Tensor]] | None = None,
        local: bool = False,
    ) -> None:
        self.names = frozenset(names) if separable else frozenset(names) - OF_SECOND_GRADIENT
        self.loss, self.unit, self.layers = loss, unit, layers or {}
        self.values: dict[str, Tensor] = {}  # the requested ones, and others
        self._compares = False
        self._losses: list[Tensor] = []
        self._clean: list[Tensor] = []
        differs = ("loss_perturbed", "sharpness", *(("grad_norm", "penalty") if local else ()))
        # the values that differ between ranks; the list itself is the same on all ranks, even if one measures nothing
        self.per_rank = [name for name in differs if name in self.names]
        self.per_rank += [f"grad_norm/{name}" for name in self.layers] if local else []

    def watch(self, replay: Replay) -> Replay:
        """Wrap ``replay`` to record the losses of its first call, which are those at θ + s₁ d."""

        def watched(transform: Transform, last: bool = True) -> None:
            if self._losses:
                replay(transform, last)
            else:
                replay(lambda loss: transform(self._record(loss)), last)

        return watched

    def _record(self, loss: Tensor) -> Tensor:
        self._losses.append(loss.detach())
        return loss

    @torch.no_grad()
    def first(self, update: Update, params: Sequence[Tensor], norm: Tensor, loss_scale: Tensor | None) -> None:
        """Measure g₀, given its norm (times ``loss_scale``)."""
        self._update, self._scale = update, loss_scale
        self._norm = norm if loss_scale is None else norm / loss_scale
        self.values["grad_norm"] = self._norm
        strength = sum(probe.weight * probe.distance for probe in update.probes) + update.curvature
        if update.direction == "gradient":
            self.values["penalty"] = strength / 2 * self._norm.square()
        elif update.direction == "normalized":
            self.values["penalty"] = strength * self._norm
        if BY_LAYER in self.names:
            self.values |= {f"grad_norm/{n}": norm for n, norm in layer_norms(self.layers, loss_scale).items()}
        grads = [p.grad for p in params if p.grad is not None]
        self._compares = bool(self.names & OF_SECOND_GRADIENT) and all(p.dtype.itemsize >= 4 for p in params)
        if self._compares:
            self._clean = [grad.clone() for grad in local_parts(grads)]

    @torch.no_grad()
    def second(self, params: Sequence[Tensor]) -> None:
        """Measure the final gradient g and the losses of the second pass."""
        if self._losses and self._update.probes and self.loss is not None:
            losses = torch.stack([loss.to(self._norm.device) for loss in self._losses]).sum()
            self.values["loss_perturbed"] = losses / self.unit
            self.values["sharpness"] = self.values["loss_perturbed"] - self.loss.to(losses.device)
        grads = [p.grad for p in params if p.grad is not None]
        if self._compares and len(grads) == len(params) and (grads or plain_are_shards()):
            self._compare(grads)
        self._clean = []

    def results(self) -> dict[str, Tensor]:
        """The values by name, as 0-dimensional tensors on the device; NaN if a per-rank value is missing here."""
        if not self.values:
            return {}
        values = {**dict.fromkeys(self.per_rank, torch.full_like(self._norm, torch.nan)), **self.values}
        requested = [name for name in METRICS if name in self.names] + [name for name in values if "/" in name]
        return {name: values[name] for name in requested if name in values}

    def _compare(self, grads: Sequence[Tensor]) -> None:
        update, norm = self._update, self._norm
        total = update.keep + sum(probe.weight for probe in update.probes)
        if grads:
            torch._foreach_mul_(self._clean, -total)
            torch._foreach_add_(self._clean, local_parts(grads))
        with_g, with_h = _products(grads, self._clean)
        if self._scale is not None:
            with_g, with_h = with_g / self._scale.square(), with_h / self._scale.square()
        # total ⟨g₀, h⟩ = ⟨g − h, h⟩ avoids the cancellation in ⟨g₀, g⟩ − total ‖g₀‖²
        along = (with_g - with_h) / total
        square = norm.square()
        if len(update.probes) == 1:
            weight = update.probes[0].weight
            perturbed = (square + 2 / weight * along + with_h / weight**2).clamp_min(0).sqrt()
            self.values["grad_norm_perturbed"] = perturbed
            self.values["alignment"] = ((square + along / weight) / (norm * perturbed)).clamp(-1, 1)
        strength = sum(probe.weight * probe.distance for probe in update.probes) + update.curvature
        if update.direction == "gradient":
            self.values["curvature"] = along / (strength * square)
        elif update.direction == "normalized":
            self.values["curvature"] = along / (strength * norm)


def _products(grads: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨g, h⟩ and ⟨h, h⟩ over all ranks, where h is given by its local shards."""
    other_of = {id(grad): other for grad, other in zip(grads, others, strict=True)}
    if not grads:  # a rank without a part
        with_g, with_h = sum_of_shards(torch.zeros(2, dtype=torch.float64))
        return with_g, with_h
    totals = []
    for group in by_layout(grads).values():
        h = [other_of[id(grad)] for grad in group]
        totals.append(
            sum_over_ranks(torch.stack([inner_product(local_parts(group), h), inner_product(h, h)]), group[0])
        )
    with_g, with_h = torch.stack([total.to(totals[0].device) for total in totals]).sum(0)
    return with_g, with_h
