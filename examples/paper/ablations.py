"""Three ablations: ReLU or a smooth activation, ascent along parts of a batch (m), and warm-up with Adam.

`python examples/paper/ablations.py` measures the runs missing in results/: `curvature.csv`, `activations.csv`,
`ascent_sync.csv` and `warmup.csv`. No constants are selected: all that were tried are shown, on the test split.
"""

import torch
from common import (
    COLORS,
    arguments,
    console,
    main,
    mean_and_error,
    new_figure,
    new_table,
    plus_minus,
    run_missing,
    save,
    say,
)
from generalisation import TASKS
from tasks import ACTIVATIONS, Method, score, train
from torch import nn

from lightning_gr import GRRule, SAMRule, regularized_backward
from lightning_gr.rules import FULL_STRENGTH, Context, Probe, Schedule, Update

NOISY, VIT = "digits-noise20", "mnist1d-vit"
KINDS = {
    "plain": None,
    "DB": lambda gamma: GRRule(gamma, scheme="exact"),
    "F-GR ε=.03": lambda gamma: GRRule(gamma, 0.03),
    "F-GR ε=.3": lambda gamma: GRRule(gamma, 0.3),
}
CURVATURE_STEPS = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)


class Penalty:
    """A custom rule: the gradient of the penalty alone, (∇L(θ + ε∇L) − ∇L)/ε, or the exact H∇L if ε is None."""

    equation = "H∇L"

    def __init__(self, epsilon: float | None) -> None:
        self.epsilon = epsilon

    def update(self, at: Context = FULL_STRENGTH) -> Update:
        if self.epsilon is None:
            return Update("gradient", 1.0, curvature=at.strength)
        return Update("gradient", -1.0 / self.epsilon, (Probe(self.epsilon, at.strength / self.epsilon),))


def penalty_gradient(net: nn.Module, loss, epsilon: float | None) -> torch.Tensor:
    net.zero_grad()
    regularized_backward(loss, net, Penalty(epsilon))
    gradient = nn.utils.parameters_to_vector([p.grad for p in net.parameters()]).clone()
    if epsilon is None:  # subtract ∇L, which the exact update includes
        net.zero_grad()
        loss().backward()
        gradient -= nn.utils.parameters_to_vector([p.grad for p in net.parameters()])
    return gradient


def measure_curvature(activation: str, seed: int, epochs: int) -> list[dict]:
    """Compare finite steps with autodiff's H∇L, in float64, after a short plain training."""
    net, data = train(TASKS[NOISY], Method(), seed, epochs, activation=activation)
    net.double()
    x, y = data.train[0].double(), data.train[1]

    def loss():
        return nn.functional.cross_entropy(net(x), y)

    grads = torch.autograd.grad(loss(), list(net.parameters()))
    gradient = nn.utils.parameters_to_vector(grads)
    exact = penalty_gradient(net, loss, None)
    rows = []
    for epsilon in CURVATURE_STEPS:
        ahead = penalty_gradient(net, loss, epsilon)
        apart = ((ahead - exact).norm() / exact.norm()).item()
        rows.append(
            {"epsilon": epsilon, "along_gradient": (gradient @ ahead / (gradient @ exact)).item(), "apart": apart}
        )
    return rows


def accuracy(task: str, method: Method, seed: int, epochs: int, **more) -> dict:
    net, data = train(TASKS[task], method, seed, epochs, **more)
    return {"accuracy": score(net, data.test)[0], "train_loss": score(net, data.train)[1]}


def measure_activation(activation: str, kind: str, gamma: float | None, epochs: int, seed: int) -> dict:
    rule = KINDS[kind](gamma) if gamma else None
    return accuracy(NOISY, Method(rule), seed, epochs, activation=activation)


def measure_parts(method: str, strength: float, m: int, epochs: int, seed: int) -> dict:
    """Train with m micro-batches per step, each with its own ascent, like `ascent_sync=False` on m devices."""
    rule = SAMRule(strength) if method == "SAM" else GRRule(strength, 0.1)
    return accuracy(NOISY, Method(rule), seed, epochs, micro_batches=m)


def measure_warmup(variant: str, gamma: float | None, epochs: int, seed: int) -> dict:
    """Train with F-GR and Adam, whose learning rate rises over the first fifth of the steps."""
    task = TASKS[VIT]
    rise = int(task.warmup * epochs * task.steps_per_epoch())
    schedule = {
        "from the first step": Schedule(),
        "rising with the learning rate": Schedule(warmup_steps=rise),
        "rising after it": Schedule(start_step=rise, warmup_steps=rise),
    }
    method = Method(GRRule(gamma, 0.1), schedule=schedule[variant]) if gamma else Method()
    return accuracy(VIT, method, seed, epochs)


def grid(**values) -> list[dict]:
    """All combinations of values; the last name varies fastest."""
    made: list[dict] = [{}]
    for name, choices in values.items():
        made = [{**row, name: choice} for row in made for choice in choices]
    return made


def runs(fast: bool) -> dict[str, tuple[list[dict], object]]:
    """The settings of each CSV file and the function that measures them."""
    seeds, long = (range(1), [1]) if fast else (range(3), [TASKS[NOISY].epochs])
    vit = [1] if fast else [TASKS[VIT].epochs]
    everything, activations = (["relu"], ["relu"]) if fast else (list(ACTIVATIONS), ["relu", "gelu"])
    plain = grid(activation=activations, kind=["plain"], gamma=[None], epochs=long, seed=seeds)
    kinds = [kind for kind in KINDS if kind != "plain"]
    penalized = grid(activation=activations, kind=kinds, gamma=[1.0], epochs=long, seed=seeds)
    parts = [
        run
        for method, strengths in (("F-GR", (0.1, 1.0)), ("SAM", (0.1, 0.5)))
        for run in grid(
            method=[method], strength=strengths[-1:] if fast else strengths, m=[1, 8], epochs=long, seed=seeds[:2]
        )
    ]
    variants = ["from the first step", "rising with the learning rate", "rising after it"]
    without = grid(variant=["plain"], gamma=[None], epochs=vit, seed=seeds)
    ramps = without + grid(variant=variants, gamma=[0.1], epochs=vit, seed=seeds)
    return {
        "curvature": (grid(activation=everything, seed=seeds, epochs=[1] if fast else [10]), measure_curvature),
        "activations": (plain + penalized, measure_activation),
        "warmup": (ramps, measure_warmup),
        "ascent_sync": (parts, measure_parts),
    }


def means(rows: list[dict], names: tuple[str, ...], value: str = "accuracy") -> dict[tuple, list[float]]:
    found: dict[tuple, list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row[value])
    return found


def show(title: str, rows: list[dict], names: tuple[str, ...], values: dict[str, int]) -> None:
    made = new_table(title, list(names), list(values), "± is the standard error over seeds")
    columns = [means(rows, names, value) for value in values]
    for key in columns[0]:
        cells = [plus_minus(column[key], digits) for column, digits in zip(columns, values.values(), strict=True)]
        made.add_row(
            *["" if part is None else f"{part:g}" if isinstance(part, float) else part for part in key], *cells
        )
    console.print(made)


def draw(args, rows: dict[str, list[dict]]) -> None:
    """Draw one panel per ablation."""
    figure, axes = new_figure(1, 4, 14, 3.3)
    colors = {"relu": "#D55E00", "gelu": "#0072B2", "softplus": "#009E73"}
    for (activation,) in means(rows["curvature"], ("activation",), "apart"):
        found = [row for row in rows["curvature"] if row["activation"] == activation]
        points = means(found, ("epsilon",), "apart")
        look = {"color": colors[activation], "label": activation}
        axes[0, 0].plot(
            [key[0] for key in points], [sum(v) / len(v) for v in points.values()], "o-", markersize=4, **look
        )
    axes[0, 0].set(xscale="log", yscale="log", xlabel="ε", ylabel="‖Δ_F(ε) − H∇L‖/‖H∇L‖", title="vs. autodiff's H∇L")
    axes[0, 0].legend(fontsize="x-small")
    _bars(axes[0, 1], rows["activations"], ("activation", "kind", "gamma"), "digits-noise20", "kind")
    _bars(axes[0, 2], rows["ascent_sync"], ("method", "strength", "m"), "digits-noise20: m parts", "m")
    _bars(axes[0, 3], rows["warmup"], ("gamma", "variant"), "mnist1d-vit, Adam", "variant")
    save(figure, args.figures, "ablations")


PALETTE = {
    "plain": "#000000",
    "DB": COLORS["DB"],
    "F-GR ε=.03": "#56B4E9",
    "F-GR ε=.3": COLORS["F-GR"],
    1.0: "#E69F00",
    8.0: "#0072B2",
    "from the first step": "#D55E00",
    "rising with the learning rate": "#E69F00",
    "rising after it": "#0072B2",
}


def _bars(one, rows: list[dict], names: tuple[str, ...], title: str, colored: str) -> None:
    """Draw points with standard errors, top to bottom; ``colored`` names go to the legend, the others to the side."""
    ticks, seen = [], set()
    for height, (key, values) in enumerate(means(rows, names).items()):
        parts = dict(zip(names, key, strict=True))
        what = parts.pop(colored)
        what = float(what) if isinstance(what, int) else what
        mean, error = mean_and_error(values)
        name = f"m = {what:g}" if isinstance(what, float) else what
        label = None if name in seen else name
        seen.add(name)
        one.errorbar(mean, -height, xerr=error, fmt="o", color=PALETTE[what], capsize=2, markersize=4, label=label)
        signs = {"gamma": "γ = ", "strength": "γ or ρ = "}
        ticks.append(
            ", ".join(f"{signs.get(n, '')}{v:g}" if isinstance(v, float) else v for n, v in parts.items() if v)
        )
    one.set_yticks([-height for height in range(len(ticks))], ticks, fontsize="x-small")
    one.set(title=title, xlabel="test accuracy (%)")
    one.legend(fontsize="x-small")


def experiment() -> None:
    args = arguments(__doc__.splitlines()[0])
    rows = {name: run_missing(args, name, settings, measure) for name, (settings, measure) in runs(args.fast).items()}
    two = {"apart": 3, "along_gradient": 2}
    show("finite steps vs. autodiff's H∇L", rows["curvature"], ("activation", "epsilon"), two)
    show("activations, digits-noise20", rows["activations"], ("activation", "kind", "gamma"), {"accuracy": 1})
    for activation in dict.fromkeys(row["activation"] for row in rows["activations"]):
        by_kind = means([row for row in rows["activations"] if row["activation"] == activation], ("kind",))
        gains = [one - other for one, other in zip(by_kind["F-GR ε=.03",], by_kind["DB",], strict=True)]
        say(f"{activation}: F-GR ε=.03 − DB = {plus_minus(gains, 2)}")
    show(
        "ascent along m parts of a batch",
        rows["ascent_sync"],
        ("method", "strength", "m"),
        {"accuracy": 1, "train_loss": 2},
    )
    show("ViT with Adam", rows["warmup"], ("variant", "gamma"), {"accuracy": 1, "train_loss": 2})
    draw(args, rows)


if __name__ == "__main__":
    main(experiment)
