"""The update family: every method is the same step with different constants. Pure Python: no Lightning, no tensors.

Every method in this package replaces the gradient of the training loss with

    g = keep · ∇L(θ) + Σₖ weightₖ · ∇L(θ + distanceₖ · d) + curvature · H d,      d = direction(∇L(θ))

An :class:`Update` holds one set of these constants. A rule (:class:`GRRule`, :class:`SAMRule`) holds the user's
settings and builds the update for a :class:`Context`. :class:`~lightning_gr.core.schedule.Schedule` decides which steps
get one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from lightning_gr._validate import check_bool, check_choice, check_number
from lightning_gr.core.state import State

__all__ = [
    "ACCUMULATIONS",
    "FULL_STRENGTH",
    "SCHEMES",
    "Accumulation",
    "Combine",
    "Context",
    "Direction",
    "GRRule",
    "MomentumSAMRule",
    "Probe",
    "Rule",
    "SAMRule",
    "Scheme",
    "Turn",
    "Update",
]

Scheme = Literal["forward", "backward", "central", "exact"]
Direction = Literal["gradient", "normalized", "adaptive"]
Accumulation = Literal["window", "micro_batch"]

SCHEMES: tuple[Scheme, ...] = ("forward", "backward", "central", "exact")
ACCUMULATIONS: tuple[Accumulation, ...] = ("window", "micro_batch")


@dataclass(frozen=True)
class Context:
    """The values that a rule's constants may depend on.

    Args:
        strength: The schedule's factor for the penalty (for the radius): 0 to 1, or up to ``interval`` if it is lazy.
        step: The optimizer step, counted from 0.
        group: The options of the optimizer's first parameter group.
    """

    strength: float = 1.0
    step: int = 0
    group: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lr(self) -> float:
        """The current learning rate of the first parameter group; 0 if there is no optimizer.

        If the optimizer keeps it in a tensor on an accelerator, asking for it waits for the device.
        """
        return float(self.group.get("lr", 0.0))


FULL_STRENGTH = Context()


class Probe(NamedTuple):
    """An additional gradient, evaluated at θ + ``distance`` · d and added with ``weight``."""

    distance: float
    weight: float


class Turn(Protocol):
    """Makes a direction from the clean gradient, in place."""

    def __call__(self, gradient: Sequence[Tensor], state: State) -> None:
        """Turn ``gradient`` into the direction before it is normalized.

        Args:
            gradient: ∇L(θ), one tensor per parameter, to be changed in place. Read nothing from the device.
            state: Vectors to keep from step to step.
        """
        ...


class Combine(Protocol):
    """Combines the two gradients of a step, in place."""

    def __call__(self, first: Sequence[Tensor], second: Sequence[Tensor], state: State) -> None:
        """Turn ``second`` (or ``first``, if there is no second pass) into the gradient for the optimizer.

        The result must be homogeneous of degree 1 in the gradients. Coefficients are 0-dimensional tensors, such as
        :func:`~lightning_gr.rules.inner_product` returns. Read nothing from the device.

        Args:
            first: ∇L(θ), one tensor per parameter.
            second: The gradient at the displaced weights; empty if the update has no probe.
            state: Vectors to keep from step to step.
        """
        ...


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
        ahead: ρ of a single pass at θ − ρ v/‖v‖, with v the optimizer's momentum, instead of all of the above.
        turn: Makes the direction from ∇L(θ) instead of taking ∇L(θ) itself. It overwrites the first gradient.
        combine: Combines the gradients instead of ``keep`` and the weights. It needs room for both gradients.
        clip: Maximum norms: of the first gradient, and of each further gradient. Larger ones are scaled down.

    Raises:
        ValueError: If the direction is adaptive and ``keep`` or ``curvature`` is not 0: the adaptive direction
            overwrites the first gradient, and so does ``turn``. If ``ahead`` comes with a second pass, or ``combine``
            with several probes.
    """

    direction: Direction
    keep: float
    probes: tuple[Probe, ...] = ()
    curvature: float = 0.0
    eta: float = 0.0
    ahead: float = 0.0
    turn: Turn | None = None
    combine: Combine | None = None
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.direction == "adaptive" and (self.keep or self.curvature):
            raise ValueError("Expected `keep` and `curvature` to be 0 with the adaptive direction, as in ASAM")
        if self.turn is not None and (self.keep or self.curvature or self.combine is not None):
            raise ValueError(
                "Expected `keep=0` and neither `curvature` nor `combine` with `turn`, which overwrites the gradient"
            )
        if self.combine is not None and (len(self.probes) > 1 or self.curvature or self.direction == "adaptive"):
            raise ValueError("Expected at most one probe, no `curvature` and no adaptive direction with `combine`")
        if self.clip is not None and (self.curvature or self.turn is not None):
            raise ValueError(
                "Expected neither `curvature` nor `turn` with `clip`, which needs each gradient separately"
            )
        if self.ahead and (self.probes or self.curvature or self.keep != 1.0):
            raise ValueError("Expected `ahead` to come with `keep=1` and without probes and curvature: it is one pass")

    def clipped(self, clip: tuple[float, float] | None) -> "Update":
        """Return this update with its gradients clipped to the given norms; None does not clip."""
        return self if clip is None else replace(self, clip=clip)

    @property
    def has_second_pass(self) -> bool:
        """Whether there is more to do once ∇L(θ) is known."""
        moves = any(probe.distance != 0.0 and probe.weight != 0.0 for probe in self.probes)
        return moves or self.curvature != 0.0 or self.combine is not None

    @property
    def is_linear(self) -> bool:
        """Whether the gradient is a linear combination of gradients at points along ∇L(θ)."""
        return self.turn is None and self.combine is None

    @property
    def is_plain(self) -> bool:
        """Whether the update reduces to g = ∇L(θ), so that the weights are not displaced."""
        return not self.has_second_pass and self.ahead == 0.0


class Rule(Protocol):
    """A method's settings. Any object with these members can be used for training."""

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """Return the update with the penalty (or the radius) multiplied by ``at.strength``."""
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
        ValueError: If an argument is out of range.

    Source: Karakida, Takase, Hayase & Osawa (ICML 2023, arXiv 2210.02720), F-GR and B-GR; Zhao, Zhang & Hu
    (ICML 2022, arXiv 2202.03599), the gradient-norm penalty.

    Example::

        >>> row = GRRule(gamma=0.1, epsilon=0.2).update()
        >>> row.direction, row.keep, row.probes
        ('gradient', 0.5, (Probe(distance=0.2, weight=0.5),))
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

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """Return the update for the penalty strength · γ. ε is not scaled."""
        direction: Direction = "normalized" if self.normalize else "gradient"
        gamma, epsilon = at.strength * self.gamma, self.epsilon
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
        ValueError: If an argument is out of range, or ``eta`` is given without ``adaptive``.

    Source: Foret, Kleiner, Mobahi & Neyshabur (ICLR 2021, arXiv 2010.01412); Kwon, Kim, Park & Choi (ICML 2021,
    arXiv 2102.11600).

    Example::

        >>> row = SAMRule(rho=0.1).update()
        >>> row.direction, row.keep, row.probes
        ('normalized', 0.0, (Probe(distance=0.1, weight=1.0),))
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

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """Return the update for the radius strength · ρ."""
        direction: Direction = "adaptive" if self.adaptive else "normalized"
        return Update(direction, 0.0, (Probe(at.strength * self.rho, 1.0),), eta=self.eta)

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


@dataclass(frozen=True)
class MomentumSAMRule:
    """Momentum-SAM: the gradient at a point ahead along the optimizer's momentum, g = ∇L(θ − ρ v/‖v‖), in one pass.

    v is the optimizer's momentum (``momentum_buffer`` or ``exp_avg``) and ‖v‖ one norm over all parameters that are
    moved. −v is the step that was just taken, so the point lies ahead of the weights. Before the first optimizer step
    there is no momentum, and the gradient is ∇L(θ).

    Args:
        rho: The radius ρ ≥ 0, in the unit of the parameters' norm.

    Raises:
        ValueError: If ``rho`` is out of range.

    Source: Becker, Altrock & Risse (2024, arXiv 2401.12033); the sign is that of the authors' code.

    Example::

        >>> MomentumSAMRule(rho=2.0).update().ahead
        2.0
    """

    rho: float = 2.0

    def __post_init__(self) -> None:
        check_number("rho", self.rho, positive=False)

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        """The row of the table for the radius strength · ρ."""
        return Update("gradient", 1.0, ahead=at.strength * self.rho)

    @property
    def name(self) -> str:
        """``"Momentum-SAM"``."""
        return "Momentum-SAM"

    @property
    def constants(self) -> dict[str, float]:
        """The radius ρ."""
        return {"ρ": self.rho}

    @property
    def equation(self) -> str:
        """The gradient that the optimizer sees, in one line."""
        return "∇L(θ − ρ v/‖v‖), v the momentum"
