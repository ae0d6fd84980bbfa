"""Flooding and the gradient-regularization steps that it performs: identity, walks at the level, momentum, noise."""

import dataclasses
import functools
import itertools
import math

import torch
from tasks import digits
from torch import Tensor, nn

from lightning_gr import GRRule, flood, regularized_backward
from lightning_gr.rules import FULL_STRENGTH, Context, Probe, Update

LEVEL, EXAMPLES, WIDTH = 0.2, 200, 64
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclasses.dataclass(frozen=True)
class PenaltyOnly:
    """A custom rule: (∇L(θ ± ε∇L) − ∇L)/±ε ≈ H∇L, which is finite-difference GR without the gradient of the loss."""

    epsilon: float

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        return Update("gradient", -1.0 / self.epsilon, (Probe(self.epsilon, at.strength / self.epsilon),))

    @property
    def equation(self) -> str:
        return "(∇L(θ + ε∇L(θ)) − ∇L(θ))/ε"


class Net(nn.Module):
    """An MLP in float64, with its training data and loss."""

    def __init__(self, seed: int, activation: str, examples: int = EXAMPLES) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            act = ACTIVATIONS[activation]
            self.net = nn.Sequential(nn.Linear(64, WIDTH), act(), nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, 10))
        self.double()
        x, y = digits()
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:examples]
        self.x, self.y = x[chosen].double(), y[chosen]

    def loss(self, indices: Tensor | slice = slice(None)) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x[indices]), self.y[indices])

    def gradient(self, indices: Tensor | slice = slice(None)) -> tuple[float, Tensor]:
        """The loss and its gradient, as one vector."""
        loss = self.loss(indices)
        grads = torch.autograd.grad(loss, list(self.net.parameters()))
        return loss.item(), nn.utils.parameters_to_vector(grads)

    @torch.no_grad()
    def move(self, by: Tensor) -> None:
        weights = nn.utils.parameters_to_vector(self.net.parameters())
        nn.utils.vector_to_parameters(weights + by, self.net.parameters())

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.net.parameters()).detach().clone()


@functools.lru_cache(8)
def _weights_at(level: float, seed: int, activation: str) -> Tensor:
    net = Net(seed, activation)
    optimizer = torch.optim.SGD(net.net.parameters(), lr=0.1, momentum=0.9)
    while True:
        optimizer.zero_grad()
        loss = net.loss()
        if loss < level:
            return net.weights()
        loss.backward()
        optimizer.step()


def net_at(level: float, seed: int, activation: str) -> Net:
    """Train plainly on full batches until the loss is below ``level``."""
    net = Net(seed, activation)
    # copy, because vector_to_parameters makes the parameters views of its argument
    nn.utils.vector_to_parameters(_weights_at(level, seed, activation).clone(), net.net.parameters())
    return net


# --- the identity


def two_flooded_steps(net: nn.Module, loss, level: float, eta: float) -> list[float]:
    """Take two SGD steps on |L − b| + b; return the losses before each step."""
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=eta), []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss()
        losses.append(value.item())
        flood(value, level).backward()
        optimizer.step()
    return losses


def one_penalty_step(net: nn.Module, loss, eta: float, sign: int) -> None:
    """Take a step of size η² along the penalty of F-GR (sign 1) or B-GR (−1) with ε = η, using the package."""
    optimizer = torch.optim.SGD(net.parameters(), lr=eta**2)
    optimizer.zero_grad()
    regularized_backward(loss, net, PenaltyOnly(sign * eta))
    optimizer.step()


def measure_identity(order: str, eta: float, seed: int, activation: str) -> dict:
    """Measure the largest difference in a weight between two flooded steps and one penalty step."""
    flooded, explicit = (net_at(LEVEL, seed, activation) for _ in range(2))
    here, gradient = flooded.gradient()
    sign = 1 if order == "up, down" else -1
    flooded.move(sign * eta * gradient)
    there = flooded.loss().item()
    flooded.move(-flooded.weights() + explicit.weights())
    before = flooded.weights()
    losses = two_flooded_steps(flooded.net, flooded.loss, (here + there) / 2, eta)
    one_penalty_step(explicit.net, explicit.loss, eta, sign)
    moved = (explicit.weights() - before).abs().max().item()
    difference = (flooded.weights() - explicit.weights()).abs().max().item()
    return {"loss_before": losses[0], "loss_between": losses[1], "moved": moved, "difference": difference}


# --- curves at the level


def flooded_walk(net: Net, eta: float, momentum: float, steps: int, batch: int | None = None):
    """Run flooded SGD with the package; yield the sign of each step."""
    optimizer = torch.optim.SGD(net.net.parameters(), lr=eta, momentum=momentum)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        indices = torch.randperm(len(net.y), generator=draw)[:batch] if batch else slice(None)
        optimizer.zero_grad()
        loss = regularized_backward(lambda: net.loss(indices), net.net, GRRule(gamma=0.0), level=LEVEL)  # noqa: B023
        optimizer.step()
        yield 1 if loss >= LEVEL else -1


def explicit_walk(net: Net, eta: float, momentum: float, steps: int):
    """Replace every two flooding steps by a step η²/(1 − μ²) along F-GR's penalty (ε = η), then return to the level."""
    optimizer = torch.optim.SGD(net.net.parameters(), lr=eta**2 / (1 - momentum**2))
    for step in range(steps):
        if step % 2:
            optimizer.zero_grad()
            regularized_backward(net.loss, net.net, PenaltyOnly(eta))
            optimizer.step()
            _to_level(net)
        yield 0


def random_walk(net: Net, eta: float, momentum: float, steps: int):
    """The control: steps as long as the penalty's, but in random directions along the level set."""
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step % 2:
            _, gradient = net.gradient()
            before = net.weights()
            net.move(eta * gradient)
            _, ahead = net.gradient()
            length = (eta * (ahead - gradient)).norm()
            direction = torch.randn(gradient.shape, generator=draw, dtype=gradient.dtype)
            direction -= (direction @ gradient) / (gradient @ gradient) * gradient
            net.move(before - net.weights() + length * direction / direction.norm())
            _to_level(net)
        yield 0


def _to_level(net: Net) -> None:
    loss, gradient = net.gradient()
    net.move((LEVEL - loss) / (gradient @ gradient) * gradient)


WALKS = {"flooding": flooded_walk, "explicit": explicit_walk, "random": random_walk}


def measure_curve(kind: str, eta: float, momentum: float, activation: str, seed: int, time: float) -> list[dict]:
    """Measure loss and gradient norm on the full training set along a walk, at increasing intervals."""
    net = net_at(LEVEL, seed, activation)
    steps = round(time * (1 - momentum**2) / eta**2)
    if kind == "mini-batches":
        walk = flooded_walk(net, eta, momentum, steps, batch=64)
    else:
        walk = WALKS[kind](net, eta, momentum, steps)
    recorded = {0, *(round(steps ** (i / 80)) for i in range(81))}
    last, turns, rows = 0, 0, []
    for step, sign in enumerate(itertools.chain([0], walk)):
        turns += sign != last and sign != 0
        last = sign
        if step in recorded:
            loss, gradient = net.gradient()
            rows.append({"step": step, "loss": loss, "gradient_norm": gradient.norm().item(), "turns": turns})
    return rows


# --- momentum and noise


def measure_drift(momentum: float, eta: float) -> dict:
    """Measure the drift per two strictly alternating heavy-ball steps on a quadratic, in units of η² H∇L."""
    curvatures = torch.linspace(0.5, 2.0, 50, dtype=torch.float64)
    weights = nn.Parameter(torch.ones(50, dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], lr=eta, momentum=momentum)
    sign = -1.0
    drift = None
    for step in range(402):
        optimizer.zero_grad()
        (sign * (curvatures * weights**2).sum() / 2).backward()
        if step == 400:  # the velocity has settled
            before = weights.detach().clone()
        optimizer.step()
        sign = -sign
    moved = weights.detach() - before
    middle = (weights.detach() + before) / 2
    direction = eta**2 * curvatures**2 * middle
    drift = -(moved @ direction / (direction @ direction)).item()
    return {"drift": drift, "predicted": 1 / (1 - momentum**2)}


def measure_noise(eta: float, batch: int, seed: int, pairs: int) -> dict:
    """Compare the mean of two flooded steps on different mini-batches with its noise."""
    net = net_at(LEVEL, seed, "gelu")
    start, draw = net.weights(), torch.Generator().manual_seed(seed)
    _, gradient = net.gradient()
    net.move(eta * gradient)
    effect = eta * (net.gradient()[1] - gradient)  # η² · Δ_F(η), as with full batches
    squares = []
    for _ in range(pairs):
        first, second = (torch.randperm(len(net.y), generator=draw)[:batch] for _ in range(2))
        net.move(start - net.weights())
        _, up = net.gradient(first)
        net.move(eta * up)
        _, down = net.gradient(second)
        squares.append((eta * (up - down) + effect).square().sum().item())
    noise = math.sqrt(sum(squares) / len(squares))
    return {"effect": effect.norm().item(), "noise": noise, "ratio": noise / effect.norm().item()}
