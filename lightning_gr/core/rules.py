"""The update family: every method is the same step with different constants. Pure Python: no Lightning, no tensors.

Every method in this package replaces the gradient of the training loss with

    g = keep · ∇L(θ) + Σₖ weightₖ · ∇L(θ + distanceₖ · d) + curvature · H d,      d = direction(∇L(θ))

An :class:`Update` holds one set of these constants. A rule (:class:`GRRule`, :class:`SAMRule`) holds the user's
settings and builds the update for a given penalty strength. :class:`~lightning_gr.core.schedule.Schedule` decides which
steps get one.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from lightning_gr._validate import check_bool, check_choice, check_number

__all__ = [
    "ACCUMULATIONS",
    "SCHEMES",
    "Accumulation",
    "Direction",
    "GRRule",
    "Probe",
    "Rule",
    "SAMRule",
    "Scheme",
    "Update",
]

Scheme = Literal["forward", "backward", "central", "exact"]
Direction = Literal["gradient", "normalized", "adaptive"]
Accumulation = Literal["window", "micro_batch"]

SCHEMES: tuple[Scheme, ...] = ("forward", "backward", "central", "exact")
ACCUMULATIONS: tuple[Accumulation, ...] = ("window", "micro_batch")


class Probe(NamedTuple):
    """An additional gradient, evaluated at θ + ``distance`` · d and added with ``weight``."""

    distance: float
    weight: float


@dataclass(frozen=True)
class Update:
    """The constants of one step: g = keep · ∇L(θ) + Σ weight · ∇L(θ + distance · d) + curvature · H d.

    Args:
        direction: How d follows from the gradient g₀ = ∇L(θ): ``"gradient"`` is g₀, ``"normalized"`` is g₀/‖g₀‖,
            ``"adaptive"`` is (|θ|+η)² ⊙ g₀ / ‖(|θ|+η) ⊙ g₀‖.
        keep: The coefficient of the clean gradient.
        probes: The additional gradients.
        curvature: The coefficient of the Hessian-vector product H d, computed by double backward.
        eta: η of the adaptive direction.

    Raises:
        ValueError: If the direction is adaptive and ``keep`` or ``curvature`` is not 0: the adaptive direction
            overwrites the first gradient.
    """

    direction: Direction
    keep: float
    probes: tuple[Probe, ...] = ()
    curvature: float = 0.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.direction == "adaptive" and (self.keep or self.curvature):
            raise ValueError("Expected `keep` and `curvature` to be 0 with the adaptive direction, as in ASAM")

    @property
    def is_plain(self) -> bool:
        """Whether the update reduces to g = ∇L(θ), so that no second pass is needed."""
        moves = any(probe.distance != 0.0 and probe.weight != 0.0 for probe in self.probes)
        return not moves and self.curvature == 0.0


class Rule(Protocol):
    """A method's settings. Any object with these members can be used for training."""

    def update(self, strength: float = 1.0) -> Update:
        """Return the update with the penalty (or the radius) multiplied by ``strength``."""
        ...

    @property
    def name(self) -> str:
        """The method's usual name, such as ``"F-GR"``."""
        ...

    @property
    def equation(self) -> str:
        """The gradient passed to the optimizer, on one line."""
        ...

    @property
    def constants(self) -> dict[str, float]:
        """The constants keyed by their usual symbols, such as ``{"ρ": 0.05}``."""
        ...


_NAMES = {"forward": "F-GR", "backward": "B-GR", "central": "central GR", "exact": "exact GR (double backward)"}


@dataclass(frozen=True)
class GRRule:
    """Gradient regularization: the gradient of L(θ) + (γ/2)‖∇L(θ)‖², by finite differences or exactly.

    ======== ========= ==============================================================
    scheme   passes    g
    ======== ========= ==============================================================
    forward  2         (1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε d)
    backward 2         (1 + γ/ε) ∇L(θ) − (γ/ε) ∇L(θ − ε d)
    central  3         ∇L(θ) + (γ/2ε) (∇L(θ + ε d) − ∇L(θ − ε d))
    exact    1 + DB    ∇L(θ) + γ H d (double backward)
    ======== ========= ==============================================================

    where d = ∇L(θ), or d = ∇L(θ)/‖∇L(θ)‖ if ``normalize``, which penalizes γ‖∇L(θ)‖ (Zhao et al. 2022).

    Args:
        gamma: The penalty strength γ ≥ 0. 0 is plain training.
        epsilon: The finite-difference step ε > 0, in units of the parameters per unit of d.
        scheme: One of ``"forward"``, ``"backward"``, ``"central"``, ``"exact"``.
        normalize: Penalize the norm of the gradient instead of half its square.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Karakida, Takase, Hayase & Osawa (ICML 2023, arXiv 2210.02720), F-GR and B-GR; Zhao, Zhang & Hu
    (ICML 2022, arXiv 2202.03599), the gradient-norm penalty.

    Example::

        >>> GRRule(gamma=0.1, epsilon=0.2).update()
        Update(direction='gradient', keep=0.5, probes=(Probe(distance=0.2, weight=0.5),), curvature=0.0, eta=0.0)
    """

    gamma: float = 0.05
    epsilon: float = 0.05
    scheme: Scheme = "forward"
    normalize: bool = False

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, positive=False)
        check_number("epsilon", self.epsilon, positive=True)
        check_choice("scheme", self.scheme, SCHEMES)
        check_bool("normalize", self.normalize)

    def update(self, strength: float = 1.0) -> Update:
        """Return the update for the penalty ``strength`` · γ. ε is not scaled."""
        direction: Direction = "normalized" if self.normalize else "gradient"
        gamma, epsilon = strength * self.gamma, self.epsilon
        ratio = gamma / epsilon
        if self.scheme == "forward":
            return Update(direction, 1.0 - ratio, (Probe(epsilon, ratio),))
        if self.scheme == "backward":
            return Update(direction, 1.0 + ratio, (Probe(-epsilon, -ratio),))
        if self.scheme == "central":
            return Update(direction, 1.0, (Probe(epsilon, ratio / 2), Probe(-epsilon, -ratio / 2)))
        return Update(direction, 1.0, curvature=gamma)

    @property
    def name(self) -> str:
        """The scheme's usual name, such as ``"F-GR"``."""
        return _NAMES[self.scheme] + (", gradient-norm penalty" if self.normalize else "")

    @property
    def constants(self) -> dict[str, float]:
        """γ and, unless the scheme is exact, ε."""
        return {"γ": self.gamma} if self.scheme == "exact" else {"γ": self.gamma, "ε": self.epsilon}

    @property
    def equation(self) -> str:
        """The gradient passed to the optimizer, on one line."""
        d = "∇L(θ)/‖∇L(θ)‖" if self.normalize else "∇L(θ)"
        return {
            "forward": f"(1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε {d})",
            "backward": f"(1 + γ/ε) ∇L(θ) − (γ/ε) ∇L(θ − ε {d})",
            "central": f"∇L(θ) + (γ/2ε) [∇L(θ + ε {d}) − ∇L(θ − ε {d})]",
            "exact": f"∇L(θ) + γ H {d}",
        }[self.scheme]


@dataclass(frozen=True)
class SAMRule:
    """Sharpness-aware minimization: g = ∇L(θ + ρ d), the gradient at the (first-order) worst point of a ball.

    Args:
        rho: The radius ρ ≥ 0, in the units of the parameters' norm (relative norm if ``adaptive``).
        adaptive: Use ASAM's scaled ball: d = (|θ|+η)² ⊙ ∇L / ‖(|θ|+η) ⊙ ∇L‖ instead of ∇L/‖∇L‖.
        eta: ASAM's η ≥ 0.

    Raises:
        ValueError: If an argument is out of its range, or ``eta`` is given without ``adaptive``.

    Source: Foret, Kleiner, Mobahi & Neyshabur (ICLR 2021, arXiv 2010.01412); Kwon, Kim, Park & Choi (ICML 2021,
    arXiv 2102.11600).

    Example::

        >>> SAMRule(rho=0.1).update()
        Update(direction='normalized', keep=0.0, probes=(Probe(distance=0.1, weight=1.0),), curvature=0.0, eta=0.0)
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number("rho", self.rho, positive=False)
        check_bool("adaptive", self.adaptive)
        check_number("eta", self.eta, positive=False)
        if self.eta and not self.adaptive:
            raise ValueError(f"Expected argument `eta` to be 0 without `adaptive=True` but got {self.eta!r}")

    def update(self, strength: float = 1.0) -> Update:
        """Return the update for the radius ``strength`` · ρ."""
        direction: Direction = "adaptive" if self.adaptive else "normalized"
        return Update(direction, 0.0, (Probe(strength * self.rho, 1.0),), eta=self.eta)

    @property
    def name(self) -> str:
        """``"SAM"`` or ``"ASAM"``."""
        return "ASAM" if self.adaptive else "SAM"

    @property
    def constants(self) -> dict[str, float]:
        """ρ and, for ASAM, η."""
        return {"ρ": self.rho, "η": self.eta} if self.adaptive else {"ρ": self.rho}

    @property
    def equation(self) -> str:
        """The gradient passed to the optimizer, on one line."""
        return "∇L(θ + ρ T²∇L/‖T∇L‖), T = |θ| + η" if self.adaptive else "∇L(θ + ρ ∇L(θ)/‖∇L(θ)‖)"
