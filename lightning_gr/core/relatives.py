"""Relatives of SAM that are not linear in the gradients: each is a rule of about twenty lines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr._validate import check_int, check_number
from lightning_gr.core.rules import FULL_STRENGTH, Context, Probe, Update
from lightning_gr.core.state import State
from lightning_gr.core.tensors import inner_product, inverse, scale_

__all__ = ["FriendlySAMRule", "GSAMRule", "LookSAMRule"]


def _norm(vector: Sequence[Tensor]) -> Tensor:
    return inner_product(vector, vector).sqrt()


@dataclass(frozen=True)
class GSAMRule:
    """GSAM: SAM's gradient g₁, minus α times the part of ∇L(θ) that is perpendicular to it.

        g = (1 + α c) g₁ − α g₀,   c = ⟨g₀, g₁⟩/‖g₁‖²,   g₁ = ∇L(θ + ρ g₀/‖g₀‖)

    Args:
        rho: The radius ρ ≥ 0.
        alpha: α ≥ 0; 0 is SAM.

    Raises:
        ValueError: If an argument is out of range.

    Source: Zhuang et al. (ICLR 2022, arXiv 2203.08065), algorithm 1.
    """

    rho: float = 0.05
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_number("rho", self.rho, positive=False)
        check_number("alpha", self.alpha, positive=False)

    name = "GSAM"
    equation = "(1 + αc) g₁ − α g₀, g₁ = ∇L(θ + ρ g₀/‖g₀‖), c = ⟨g₀, g₁⟩/‖g₁‖²"

    @property
    def constants(self) -> dict[str, float]:
        """ρ and α."""
        return {"ρ": self.rho, "α": self.alpha}

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """Return the update for the radius strength · ρ."""
        return Update("normalized", 0.0, (Probe(at.strength * self.rho, 1.0),), combine=self._combine)

    def _combine(self, first: Sequence[Tensor], second: Sequence[Tensor], state: State) -> None:
        c = inner_product(first, second) * inverse(inner_product(second, second))
        scale_(second, 1.0 + self.alpha * c)
        torch._foreach_add_(list(second), list(first), alpha=-self.alpha)


@dataclass(frozen=True)
class FriendlySAMRule:
    """Friendly-SAM: SAM along the noise of the batch's gradient, g₀ minus an average m of earlier gradients.

        g = ∇L(θ + ρ d/‖d‖),   d = g₀ − σ m,   then m ← λ m + (1 − λ) g₀

    The first step takes d = g₀ and m = g₀. The average is one vector of state.

    Args:
        rho: The radius ρ ≥ 0.
        sigma: σ ≥ 0; 0 is SAM.
        decay: λ, from 0 to below 1.

    Raises:
        ValueError: If an argument is out of range.

    Source: Li et al. (CVPR 2024, arXiv 2403.12350); λ and σ as in the authors' code.
    """

    rho: float = 0.05
    sigma: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_number("rho", self.rho, positive=False)
        check_number("sigma", self.sigma, positive=False)
        check_number("decay", self.decay, positive=False)
        if self.decay >= 1.0:
            raise ValueError(f"Expected argument `decay` to be below 1 but got {self.decay!r}")

    name = "Friendly-SAM"
    equation = "∇L(θ + ρ d/‖d‖), d = ∇L(θ) − σ m, m an average of ∇L"

    @property
    def constants(self) -> dict[str, float]:
        """ρ, σ and λ."""
        return {"ρ": self.rho, "σ": self.sigma, "λ": self.decay}

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """Return the update for the radius strength · ρ."""
        return Update("normalized", 0.0, (Probe(at.strength * self.rho, 1.0),), turn=self._turn)

    def _turn(self, gradient: Sequence[Tensor], state: State) -> None:
        average = state.get("average")
        if average is None:
            state.set("average", [g.clone() for g in gradient])
            return
        kept = list(torch._foreach_lerp(average, list(gradient), 1.0 - self.decay))
        torch._foreach_add_(list(gradient), average, alpha=-self.sigma)
        state.set("average", kept)


@dataclass(frozen=True)
class LookSAMRule:
    """LookSAM: SAM on every k-th step, whose part perpendicular to ∇L is used again on the steps between.

        step 0, k, 2k, …:  g = g₁,   gᵥ = g₁ − (⟨g₁, g₀⟩/‖g₀‖²) g₀
        other steps:       g = g₀ + α (‖g₀‖/‖gᵥ‖) gᵥ,   without a second pass

    gᵥ is one vector of state. Norms and inner products are over all parameters together.

    Args:
        rho: The radius ρ ≥ 0.
        alpha: α ≥ 0.
        interval: k ≥ 1; 1 is SAM.

    Raises:
        ValueError: If an argument is out of range.

    Source: Liu et al. (CVPR 2022, arXiv 2203.02714), algorithm 1.
    """

    rho: float = 0.05
    alpha: float = 0.7
    interval: int = 5

    def __post_init__(self) -> None:
        check_number("rho", self.rho, positive=False)
        check_number("alpha", self.alpha, positive=False)
        check_int("interval", self.interval, minimum=1)

    name = "LookSAM"
    equation = "every k steps g₁ = ∇L(θ + ρ g₀/‖g₀‖), else g₀ + α (‖g₀‖/‖gᵥ‖) gᵥ, gᵥ the part of g₁ ⊥ g₀"

    @property
    def constants(self) -> dict[str, float]:
        """ρ, α and k."""
        return {"ρ": self.rho, "α": self.alpha, "k": self.interval}

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """Return the update for the radius strength · ρ."""
        if at.step % self.interval:
            return Update("gradient", 1.0, combine=self._reuse)
        return Update("normalized", 0.0, (Probe(at.strength * self.rho, 1.0),), combine=self._refresh)

    def _refresh(self, first: Sequence[Tensor], second: Sequence[Tensor], state: State) -> None:
        along = inner_product(second, first) * inverse(inner_product(first, first))
        parallel = [g.clone() for g in first]
        scale_(parallel, along)
        state.set("perpendicular", list(torch._foreach_sub(list(second), parallel)))

    def _reuse(self, first: Sequence[Tensor], second: Sequence[Tensor], state: State) -> None:
        kept = state.get("perpendicular")
        if kept is None:  # the run did not begin at a multiple of k
            return
        step = [g.clone() for g in kept]
        scale_(step, self.alpha * _norm(first) * inverse(_norm(kept)))
        torch._foreach_add_(list(first), step)
