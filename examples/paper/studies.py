"""What `generalisation.py` compares: tasks, methods, and the candidates for their constants."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

from tasks import DIGITS, MNIST_NETWORKS, RESNET, VIT, Method, Task, mnist_task

from lightning_gr import GRRule, MomentumSAMRule, SAMRule

__all__ = ["CONSTANTS", "STUDIES", "TASKS", "UNTUNED", "Study", "factors", "make"]

Grid = dict[str, list[dict[str, float]]]
CONSTANTS = ("gamma", "epsilon", "rho", "level")
# plain training with the task's learning rate, if another one is better
UNTUNED = "plain, untuned"
# for equal compute, methods with one pass per step also run for twice the epochs
ONE_PASS = ("plain", "nesterov", "flooding", "MSAM")


class Study(NamedTuple):
    """A task and what is compared on it.

    Args:
        task: The data, the network and the training settings.
        grid: The candidates for the constants of each method.
        selection_seeds: Seeds that are different from those of the report.
        rates: Candidates for the learning rate of plain training. The other methods choose between the best of these
            and the task's own. If there are none, all methods use the task's.
    """

    task: Task
    grid: Grid
    selection_seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()

    def rates_of(self, method: str, tuned: float | None) -> list[float]:
        """The learning rates to try; ``tuned`` is the best one for plain training."""
        own = self.task.learning_rate
        if method == "plain" and self.rates:
            return list(self.rates)
        return [own] if tuned in (None, own) else [tuned, own]


def make(name: str, gamma=None, epsilon=None, rho=None, level=None) -> Method:
    """Create a method of a grid; the arguments match the columns of the CSV files."""
    rule = None
    if name == "MSAM":
        rule = MomentumSAMRule(rho)
    elif name in ("SAM", "ASAM"):
        rule = SAMRule(rho, adaptive=name == "ASAM")
    elif name == "DB":
        rule = GRRule(gamma, scheme="exact")
    elif gamma:
        rule = GRRule(gamma, epsilon, scheme="backward" if name == "B-GR" else "forward")
    return Method(rule, level, nesterov=name == "nesterov")


def factors(method: str) -> tuple[int, ...]:
    """How many times the epochs a method runs."""
    return (1, 2) if method in ONE_PASS else (1,)


def pairs(gammas, epsilons) -> list[dict]:
    return [{"gamma": gamma, "epsilon": epsilon} for gamma, epsilon in itertools.product(gammas, epsilons)]


def each(name: str, values) -> list[dict]:
    return [{name: value} for value in values]


def candidates(gammas, epsilons, rhos, adaptive_rhos, levels, pair_for_flooding) -> Grid:
    """The candidate constants of each method."""
    return {
        "plain": [{}],
        "DB": each("gamma", gammas),
        "B-GR": pairs(gammas, epsilons),
        "F-GR": pairs(gammas, epsilons),
        "SAM": each("rho", rhos),
        "ASAM": each("rho", adaptive_rhos),
        "flooding": each("level", levels),
        "GR+flooding": [{**pair_for_flooding, "level": level} for level in levels],
    }


ON_DIGITS = functools.partial(
    candidates, (0.1, 0.3, 1.0, 3.0), (0.03, 0.1, 0.3, 1.0), (0.1, 0.2, 0.5, 1.0), (0.5, 1.0, 2.0, 4.0)
)
ON_CLEAN_DIGITS = functools.partial(candidates, (0.1, 1.0), (0.03, 0.3), (0.1, 0.5), (1.0, 4.0))
ON_MNIST1D = functools.partial(candidates, (0.01, 0.03, 0.1), (0.03, 0.3), (0.05, 0.2), (0.5, 2.0))
PAIR, SMALL_PAIR = {"gamma": 0.3, "epsilon": 0.3}, {"gamma": 0.1, "epsilon": 0.3}

AHEAD: Grid = {"MSAM": each("rho", (0.5, 1.0, 2.0))}

STUDIES = {
    "digits-noise20": Study(
        dataclasses.replace(DIGITS, noise=0.2), ON_DIGITS((0.5, 0.8, 1.1), PAIR) | AHEAD, (100, 101)
    ),
    "digits": Study(DIGITS, ON_CLEAN_DIGITS((0.02, 0.05, 0.1), PAIR) | AHEAD, (100,)),
    "mnist1d-resnet": Study(RESNET, ON_MNIST1D((0.03, 0.1), {"gamma": 0.03, "epsilon": 0.3}), (100, 101)),
    "mnist1d-vit": Study(
        VIT,
        candidates((0.003, 0.03), (0.03, 0.3), (0.02, 0.1), (0.2, 1.0), (0.1, 0.3), {"gamma": 0.003, "epsilon": 0.3}),
        (100,),
    ),
}


def mnist_study(network: str, training: int, noise: float) -> Study:
    """The methods above, Momentum-SAM and ``nesterov=True`` on MNIST, with a learning rate tuned for plain training."""
    levels = (0.5, 1.0) if noise else (0.02, 0.1)
    if network == "mlp":
        grid = candidates((0.1, 0.3, 1.0), (0.03, 0.3, 0.6), (0.1, 0.2, 0.5), (1.0, 4.0), levels, PAIR)
        radii = (0.5, 1.0, 2.0)
    else:
        grid = candidates((0.03, 0.1), (0.1, 0.5), (0.05, 0.1, 0.2), (0.5, 1.0), levels, SMALL_PAIR)
        radii = (0.3, 1.0, 2.0)
    plain = {"plain": [{}], UNTUNED: [{}], "nesterov": [{}]}
    # the MLP's best rate is 0.2 in some cases, so it needs a larger one
    rates = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) + ((0.5,) if network == "mlp" else ())
    # a method that fails in some runs only is not selected by chance as easily; larger sets take too long
    seeds = (100, 101) if noise and training == 500 else (100,)
    return Study(mnist_task(network, training, noise), {**plain, **grid, "MSAM": each("rho", radii)}, seeds, rates)


STUDIES |= {
    f"mnist-{network}-{training}" + ("-noise20" if noise else ""): mnist_study(network, training, noise)
    for training in (500, 2000)
    for network in MNIST_NETWORKS
    for noise in (0.0, 0.2)
}
TASKS = {name: study.task for name, study in STUDIES.items()}
