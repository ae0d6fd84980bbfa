"""Diagonal linear networks: problems, the package's update as a vector field, its closed form, and their flow."""

import dataclasses
import functools
import math

import numpy as np
import torch
from torch import nn

from lightning_gr import GRRule, regularized_backward

MOST_EVALUATIONS = 60_000


@dataclasses.dataclass(frozen=True)
class Problem:
    """y = X β* with a sparse teacher β*: 1/√5 on 5 of ``d`` coordinates.

    Args:
        seed: The seed of the data.
        mean: The mean of the entries of X.
        variance: The variance of the entries of X.
        n: The number of examples.
        d: The number of coordinates.
        alpha: The initial value α of w₊ and w₋.
    """

    seed: int
    mean: float = 5.0
    variance: float = 5.0
    n: int = 50
    d: int = 100
    alpha: float = 0.3

    @functools.cached_property
    def x(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(self.mean, self.variance**0.5, (self.n, self.d))

    @functools.cached_property
    def teacher(self) -> np.ndarray:
        return np.r_[np.full(5, 5**-0.5), np.zeros(self.d - 5)]

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        return self.x.T @ self.x / self.n

    def residual_gradient(self, plus: np.ndarray, minus: np.ndarray) -> np.ndarray:
        """G = Xᵀ(Xβ − y)/n, for weights with the coordinates along the last axis."""
        return (plus**2 - minus**2 - self.teacher) @ self.covariance

    def loss(self, plus: np.ndarray, minus: np.ndarray) -> float:
        """‖Xβ − y‖²/(4n)."""
        error = plus**2 - minus**2 - self.teacher
        return float(error @ self.covariance @ error / 4)

    def test_error(self, plus: np.ndarray, minus: np.ndarray) -> float:
        """E(x·(β − β*))² / E(x·β*)² over new x, in closed form."""

        def second_moment(v: np.ndarray) -> float:
            return self.variance * v @ v + self.mean**2 * v.sum() ** 2

        return second_moment(plus**2 - minus**2 - self.teacher) / second_moment(self.teacher)


class DiagonalNetworks(nn.Module):
    """Independent networks β = w₊² − w₋², one per problem.

    The gradient of the sum of their losses has one block per network, and so does its unnormalized regularization. A
    single step of the package therefore takes the step of each network.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__()
        start = np.stack([np.full(p.d, p.alpha) for p in problems])
        self.plus, self.minus = (nn.Parameter(torch.tensor(start)) for _ in range(2))
        self.x = torch.tensor(np.stack([p.x for p in problems]))
        self.y = torch.tensor(np.stack([p.x @ p.teacher for p in problems]))

    def loss(self) -> torch.Tensor:
        beta = self.plus**2 - self.minus**2
        return ((self.x @ beta.unsqueeze(-1)).squeeze(-1) - self.y).square().sum() / (4 * self.x.shape[1])


def rule(gamma: float, epsilon: float | None) -> GRRule:
    """The rule for a signed ε: negative is B-GR, 0 is double backward, None (with γ = 0) is gradient descent."""
    if not epsilon:
        return GRRule(gamma, scheme="exact")
    return GRRule(gamma, abs(epsilon), scheme="forward" if epsilon > 0 else "backward")


def package_field(problem: Problem, gamma: float, epsilon: float | None):
    """The negative of the package's update, −g, as a function of the weights."""
    net, chosen = DiagonalNetworks([problem]), rule(gamma, epsilon)

    def field(plus: np.ndarray, minus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            net.plus[0].copy_(torch.from_numpy(plus))
            net.minus[0].copy_(torch.from_numpy(minus))
        net.zero_grad()
        regularized_backward(net.loss, net, chosen)
        return -net.plus.grad[0].numpy(), -net.minus.grad[0].numpy()

    return field


def closed_field(problem: Problem, gamma: float, epsilon: float | None):
    """The same field in closed form, without the package and without autograd."""

    def field(plus: np.ndarray, minus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        g = problem.residual_gradient(plus, minus)
        if not gamma:
            return -plus * g, minus * g
        ahead = ascended(problem, plus, minus, g, epsilon)
        if not epsilon:
            # H ∇L: the derivative of (w₊ g, −w₋ g) along (w₊ g, −w₋ g)
            slope = (2 * (plus**2 + minus**2) * g) @ problem.covariance
            return -plus * (g + gamma * (g * g + slope)), -minus * (-g + gamma * (g * g - slope))
        mixed = (1 - gamma / epsilon) * g + gamma / epsilon * ahead
        return -plus * (mixed + gamma * g * ahead), -minus * (-mixed + gamma * g * ahead)

    return field


def ascended(problem: Problem, plus: np.ndarray, minus: np.ndarray, g: np.ndarray, epsilon: float | None) -> np.ndarray:
    """G at the ascended point w± (1 ± ε g)."""
    step = epsilon or 0.0
    return problem.residual_gradient(plus * (1 + step * g), minus * (1 - step * g)) if step else g


def flow(problem: Problem, gamma: float, epsilon: float | None, *, source: str, time: float = 1e4, tol: float = 1e-10):
    """Integrate dθ/dt = field(θ) along with ∫ g∘g′ dt, until the loss reaches ``tol`` or until ``time``.

    SciPy's LSODA chooses the step sizes. Its Newton iterations use the Jacobian of the closed form, which speeds them
    up and does not affect the solution.
    """
    from scipy.integrate import solve_ivp

    by_hand = closed_field(problem, gamma, epsilon)
    field = package_field(problem, gamma, epsilon) if source == "package" else by_hand
    d, evaluations = problem.d, 0

    def rate(state: np.ndarray, field) -> np.ndarray:
        plus, minus = state[..., :d], state[..., d : 2 * d]
        g = problem.residual_gradient(plus, minus)
        return np.concatenate([*field(plus, minus), g * ascended(problem, plus, minus, g, epsilon)], axis=-1)

    def right_side(_, state: np.ndarray) -> np.ndarray:
        nonlocal evaluations
        evaluations += 1
        if evaluations > MOST_EVALUATIONS or not np.isfinite(state).all():
            raise FloatingPointError
        return rate(state, field)

    def jacobian(_, state: np.ndarray) -> np.ndarray:
        width = 1e-7
        columns = (rate(state + width * np.eye(3 * d)[: 2 * d], by_hand) - rate(state, by_hand)) / width
        return np.concatenate([columns, np.zeros((d, 3 * d))]).T

    def fitted(_, state: np.ndarray) -> float:
        return math.log(max(problem.loss(state[:d], state[d : 2 * d]), 1e-300) / tol)

    fitted.terminal = True
    start = np.r_[np.full(2 * d, problem.alpha), np.zeros(d)]
    options = {"method": "LSODA", "rtol": 1e-8, "atol": 1e-10, "first_step": 1e-6}
    try:
        done = solve_ivp(right_side, (0, time), start, jac=jacobian, events=fitted, **options)
    except FloatingPointError:
        return None
    return (*np.split(done.y[:, -1], 3), done.t[-1], evaluations)
