"""Diagonal linear network: a larger ascent step of F-GR biases training to the rich regime and lowers the test error.

`python examples/paper/diagonal.py` measures the runs missing in results/: `diagonal.csv` (the table, with the package's
update and with a closed form), `diagonal_steps.csv` (SGD steps vs. the gradient flow) and `diagonal_map.csv`.
"""

import math

import numpy as np
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
    text,
)
from diagonal_flow import DiagonalNetworks, Problem, flow, rule

from lightning_gr import regularized_backward

GAMMA = 0.02
METHODS = {
    "GD": (0.0, None),
    "DB": (GAMMA, 0.0),
    "B-GR ε=.1": (GAMMA, -0.1),
    "B-GR ε=.03": (GAMMA, -0.03),
    "F-GR ε=.03": (GAMMA, 0.03),
    "F-GR ε=.1": (GAMMA, 0.1),
    "F-GR ε=.2": (GAMMA, 0.2),
    "F-GR ε=.4": (GAMMA, 0.4),
}
# test error and geometric mean of α_eff from earlier, independent code
EXPECTED = {
    "GD": (0.01427, 0.300),
    "DB": (0.01442, 0.299),
    "B-GR ε=.1": (0.01502, 0.340),
    "B-GR ε=.03": (0.01466, 0.313),
    "F-GR ε=.03": (0.01410, 0.284),
    "F-GR ε=.1": (0.01272, 0.238),
    "F-GR ε=.2": (0.00299, 0.084),
    "F-GR ε=.4": (0.00524, 0.113),
}
ASCENDING = ["B-GR ε=.1", "B-GR ε=.03", "DB", "F-GR ε=.03", "F-GR ε=.1", "F-GR ε=.2"]


def measure(mean: float, method: str, source: str, gamma: float, epsilon: float | None, seed: int, **_) -> dict:
    """Train one network to convergence."""
    problem = Problem(seed, mean, 5.0 if mean else 1.0)
    ended = flow(problem, gamma, epsilon, source=source)
    names = ("test_error", "alpha_eff", "alpha_predicted", "worst_coordinate", "loss", "time", "evaluations")
    if ended is None:
        return dict.fromkeys(names, math.nan)
    plus, minus, integral, time, evaluations = ended
    effective, predicted = np.sqrt(plus * minus), problem.alpha * np.exp(-gamma * integral)
    worst = np.abs(effective / predicted - 1).max()
    means = (np.exp(np.log(values).mean()) for values in (effective, predicted))
    values = (problem.test_error(plus, minus), *means, worst, problem.loss(plus, minus), time, evaluations)
    return dict(zip(names, map(float, values), strict=True))


def measure_steps(
    method: str, gamma: float, epsilon: float | None, rate: float, time: float, late_rate, late_time, seeds: int
) -> dict:
    """Compare SGD with the package's update, for all data seeds at once, with the flow at the same time.

    Args:
        method: The method's name.
        gamma: γ.
        epsilon: The signed ε.
        rate: The learning rate of the first steps, where the flow is stiff: eigenvalues of H reach 1,000, plus γH².
        time: The sum of the learning rates of these steps.
        late_rate: The learning rate of the remaining steps.
        late_time: The sum of the learning rates of the remaining steps.
        seeds: The number of data seeds.
    """
    problems = [Problem(seed) for seed in range(seeds)]
    net, chosen = DiagonalNetworks(problems), rule(gamma, epsilon)
    phases = [(rate, round(time / rate)), (late_rate, round(late_time / late_rate) if late_rate else 0)]
    for learning_rate, steps in phases:
        optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate or 0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            regularized_backward(net.loss, net, chosen)
            optimizer.step()
    walked = [w.detach().numpy() for w in (net.plus, net.minus)]
    whole = time + (late_time or 0.0)
    flows = [flow(p, gamma, epsilon, source="closed form", time=whole) for p in problems]
    flowed = [np.stack(parts) for parts in list(zip(*flows, strict=True))[:2]]
    measured = {"steps": sum(steps for _, steps in phases)}
    for name, (plus, minus) in {"": walked, "_flow": flowed}.items():
        ends = list(zip(problems, plus, minus, strict=True))
        measured["loss" + name] = max(p.loss(*weights) for p, *weights in ends)
        measured["test_error" + name] = float(np.mean([p.test_error(*weights) for p, *weights in ends]))
        measured["alpha_eff" + name] = float(np.exp(np.log(np.abs(plus * minus)).mean(1) / 2).mean())
    beta, beta_flow = walked[0] ** 2 - walked[1] ** 2, flowed[0] ** 2 - flowed[1] ** 2
    return {**measured, "beta_distance": float(np.abs(beta - beta_flow).max() / np.abs(beta_flow).max())}


def runs_of_steps(seeds: int, methods: dict, fast: bool) -> list[dict]:
    """Settings for the first, stiff phase with decreasing learning rates, and for two methods to convergence."""
    none = {"late_rate": None, "late_time": None, "seeds": seeds}
    rates = (2e-5,) if fast else (2e-5, 1e-5, 5e-6, 2.5e-6)
    runs = [
        {"method": name, "gamma": gamma, "epsilon": epsilon, "rate": rate, "time": 0.002 if fast else 0.01, **none}
        for name, (gamma, epsilon) in methods.items()
        for rate in rates
    ]
    late = {} if fast else {"GD": (5e-4, 25.0), "F-GR ε=.2": (8e-4, 48.0)}
    for name, (rate, time) in late.items():
        gamma, epsilon = METHODS[name]
        start = {"method": name, "gamma": gamma, "epsilon": epsilon, "rate": 2.5e-6, "time": 0.01}
        runs.append({**start, "late_rate": rate, "late_time": time, "seeds": seeds})
    return runs


def runs_of_table(seeds: range, methods: dict, data_means: tuple[float, ...]) -> list[dict]:
    return [
        {"mean": mean, "method": name, "source": source, "gamma": gamma, "epsilon": epsilon, "seed": seed}
        for mean in data_means
        for source in (("package", "closed form") if mean else ("package",))
        for name, (gamma, epsilon) in methods.items()
        for seed in seeds
    ]


def runs_of_map(seeds: range, points: int) -> list[dict]:
    """A grid of γ and ε, and more of the line γ = ε."""
    line = [] if points < 3 else np.logspace(-2, 0, 2 * points - 1).tolist()
    grid = [(gamma, epsilon) for gamma in np.logspace(-3, -1, points) for epsilon in np.logspace(-2, 0, points)]
    # as they are in the file, so that a point that is in both is one
    pairs = dict.fromkeys(
        (float(text(float(a))), float(text(float(b)))) for a, b in [*grid, *zip(line, line, strict=True)]
    )
    return [
        {"mean": 5.0, "method": "F-GR", "source": "closed form", "gamma": gamma, "epsilon": epsilon, "seed": seed}
        for gamma, epsilon in pairs
        for seed in seeds
    ]


def choose(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def show(rows: list[dict], steps: list[dict], cells: list[dict]) -> None:
    columns = ["test error", "before*", "α_eff", "α·exp(−γ∫)", "before*", "zero mean"]
    title = f"diagonal network, γ = {GAMMA}: non-centered data, means over data seeds"
    made = new_table(title, ["method"], columns, "*: from earlier code; zero mean: the test error of the control")
    for name in METHODS:
        found = choose(rows, mean=5.0, method=name, source="package")
        control = choose(rows, mean=0.0, method=name)
        if found:
            error = plus_minus([row["test_error"] for row in found], 5)
            alphas = [
                f"{mean_and_error([row[key] for row in found])[0]:.3f}" for key in ("alpha_eff", "alpha_predicted")
            ]
            before = [f"{EXPECTED[name][0]:.5f}", f"{EXPECTED[name][1]:.3f}"]
            mean = f"{mean_and_error([row['test_error'] for row in control])[0]:.4f}" if control else ""
            made.add_row(name, error, before[0], *alphas, before[1], mean)
    console.print(made)
    check(rows, steps)
    check_map(cells)


def check(rows: list[dict], steps: list[dict]) -> None:
    """Print the claims with their measured values."""
    ours = choose(rows, mean=5.0, source="package")
    by_hand = {(row["method"], row["seed"]): row for row in choose(rows, mean=5.0, source="closed form")}
    pairs = [(row, by_hand[row["method"], row["seed"]]) for row in ours if (row["method"], row["seed"]) in by_hand]
    for key in ("test_error", "alpha_eff"):
        most = max((abs(a[key] / b[key] - 1) for a, b in pairs), default=math.nan)
        say(f"package vs. closed form, {key}: relative difference at most {most:.0e} (7 digits are stored)")
    worst = max(row["worst_coordinate"] for row in ours)
    say(f"α_eff vs. α·exp(−γ∫g∘g′dt): relative difference {worst:.0e} in the worst coordinate")
    seeds = sorted({row["seed"] for row in ours})
    for key in ("test_error", "alpha_eff"):
        falling = 0
        for seed in seeds:
            values = [row[key] for name in ASCENDING for row in choose(ours, method=name, seed=seed)]
            falling += values == sorted(values, reverse=True)
        say(f"{key} decreases monotonically from ε = −.1 to +.2 in {falling} of {len(seeds)} seeds")
    for row in steps:
        if row["late_rate"] or row["rate"] == 2.5e-6:
            both = f"α_eff {row['alpha_eff']:.4f}, flow {row['alpha_eff_flow']:.4f}"
            run = f"{row['method']}: {row['steps']:.0f} steps of SGD to L = {row['loss']:.0e}"
            say(f"{run}: {both}; β differs by {row['beta_distance']:.1e}")


def check_map(cells: list[dict]) -> None:
    """Print the best constants overall and with γ = ε, by the mean over seeds."""
    means: dict[tuple, list[float]] = {}
    for row in cells:
        means.setdefault((row["gamma"], row["epsilon"]), []).append(row["test_error"])
    errors = {pair: sum(values) / len(values) for pair, values in means.items() if not math.isnan(sum(values))}
    on_line = {pair: error for pair, error in errors.items() if pair[0] == pair[1]}
    for name, found in (("of all γ and ε", errors), ("with γ = ε", on_line)):
        if found:
            (gamma, epsilon), error = min(found.items(), key=lambda item: item[1])
            say(f"map, best {name}: test error {error:.2g} at γ = {gamma:.3g}, ε = {epsilon:.3g}")


def draw(args, rows: list[dict], cells: list[dict]) -> None:
    """Plot test error and α_eff over the signed step, and the map."""
    figure, axes = new_figure(1, 3, 11, 3.3)
    steps = [(name, METHODS[name][1]) for name in [*ASCENDING, "F-GR ε=.4"]]
    for one, key, word in ((axes[0, 0], "test_error", "normalized test error"), (axes[0, 1], "alpha_eff", "α_eff")):
        ours = choose(rows, mean=5.0, source="package")
        for seed in sorted({row["seed"] for row in ours}):
            line = [(step, row[key]) for name, step in steps for row in choose(ours, method=name, seed=seed)]
            one.plot(*zip(*line, strict=True), color=COLORS["F-GR"], alpha=0.3, linewidth=1)
        for name, step in steps:
            values = [row[key] for row in choose(ours, method=name)]
            color = COLORS[name.split(maxsplit=1)[0]]
            if values:
                one.plot(step, sum(values) / len(values), "o", color=color)
        plain = [row[key] for row in choose(ours, method="GD")]
        one.axhline(sum(plain) / len(plain), color="black", linewidth=0.8, linestyle=":", label="gradient descent")
        one.set(xlabel="signed step ε (B-GR < 0 = DB < F-GR)", ylabel=word, title=f"γ = {GAMMA}")
        one.set_ylim(bottom=0)
        one.legend(fontsize="small")
    if cells:
        _draw_map(figure, axes[0, 2], cells)
    save(figure, args.figures, "diagonal")


def _draw_map(figure, one, cells: list[dict]) -> None:
    """Draw the grid, without the additional points on the line γ = ε."""
    from matplotlib.colors import LogNorm

    rows_of: dict[float, list[dict]] = {}
    for row in cells:
        rows_of.setdefault(row["gamma"], []).append(row)
    most = max(len(rows) for rows in rows_of.values())
    gammas = sorted(gamma for gamma, rows in rows_of.items() if len(rows) == most)
    epsilons = sorted({row["epsilon"] for row in rows_of[gammas[0]]})
    values = np.full((len(epsilons), len(gammas)), np.nan)
    for i, epsilon in enumerate(epsilons):
        for j, gamma in enumerate(gammas):
            values[i, j] = np.mean([row["test_error"] for row in choose(cells, gamma=gamma, epsilon=epsilon)])
    one.grid(visible=False)
    shades = {"cmap": "cividis", "norm": LogNorm(1e-3, 1e-1)}
    picture = one.pcolormesh(gammas, epsilons, values, shading="nearest", rasterized=True, **shades)
    line = [epsilons[0], gammas[-1]]
    one.plot(line, line, "--", color="black", label="γ = ε (SAM without normalization)")
    one.plot(GAMMA, 0.2, "*", color="white", markeredgecolor="black", markersize=9, label="best of the table")
    one.set(xscale="log", yscale="log", xlabel="γ", ylabel="ε", title="test error of F-GR")
    one.legend(fontsize="x-small", loc="lower left")
    figure.colorbar(picture, ax=one, extend="both")


def experiment() -> None:
    args = arguments(__doc__.splitlines()[0])
    methods = {name: METHODS[name] for name in ("GD", "B-GR ε=.1", "F-GR ε=.2")} if args.fast else METHODS
    seeds = range(1 if args.fast else 5)
    table = run_missing(args, "diagonal", runs_of_table(seeds, methods, (5.0,) if args.fast else (5.0, 0.0)), measure)
    walks = runs_of_steps(len(seeds), methods, args.fast)
    steps = run_missing(args, "diagonal_steps", walks, measure_steps)
    cells_of = runs_of_map(range(1 if args.fast else 3), 2 if args.fast else 11)
    cells = run_missing(args, "diagonal_map", cells_of, measure)
    show(table, steps, cells)
    draw(args, table, cells)


if __name__ == "__main__":
    main(experiment)
