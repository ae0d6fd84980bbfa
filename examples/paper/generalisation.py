"""Generalization of all methods on digits and mnist1d, with constants selected on a validation split.

`python examples/paper/generalisation.py` measures the runs missing in results/: `selection.csv` (validation accuracy of
all candidates) and `generalisation.csv` (test accuracy with the selected constants).
"""

import dataclasses
import functools
import itertools
import math
import time
from pathlib import Path

import torch
from common import (
    COLORS,
    HERE,
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
from tasks import DIGITS, RESNET, VIT, Method, Task, score, train

from lightning_gr import GRRule, SAMRule

TASKS: dict[str, Task] = {
    "digits-noise20": dataclasses.replace(DIGITS, noise=0.2),
    "digits": DIGITS,
    "mnist1d-resnet": RESNET,
    "mnist1d-vit": VIT,
}
# different from the seeds of the report
SELECTION_SEEDS = {task: (100, 101) if task in ("digits-noise20", "mnist1d-resnet") else (100,) for task in TASKS}
SEEDS = (0, 1, 2, 3, 4)
STATES = HERE.parent.parent / "outputs" / "paper" / "states"


def pairs(gammas, epsilons) -> list[dict]:
    return [{"gamma": gamma, "epsilon": epsilon} for gamma, epsilon in itertools.product(gammas, epsilons)]


def each(name: str, values) -> list[dict]:
    return [{name: value} for value in values]


def candidates(gammas, epsilons, rhos, adaptive_rhos, levels, pair_for_flooding) -> dict[str, list[dict]]:
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
GRID = {
    "digits-noise20": ON_DIGITS((0.5, 0.8, 1.1), {"gamma": 0.3, "epsilon": 0.3}),
    "digits": ON_CLEAN_DIGITS((0.02, 0.05, 0.1), {"gamma": 0.3, "epsilon": 0.3}),
    "mnist1d-resnet": ON_MNIST1D((0.03, 0.1), {"gamma": 0.03, "epsilon": 0.3}),
    "mnist1d-vit": candidates(
        (0.003, 0.03), (0.03, 0.3), (0.02, 0.1), (0.2, 1.0), (0.1, 0.3), {"gamma": 0.003, "epsilon": 0.3}
    ),
}
PAIRS = (("F-GR", "B-GR"), ("F-GR", "DB"), ("SAM", "F-GR"))
# for equal compute, methods with one pass per step also run for twice the epochs
TWICE = ("plain", "flooding")


def method(name: str, gamma=None, epsilon=None, rho=None, level=None) -> Method:
    """Create a method of the grid; the arguments match the columns of the CSV files."""
    rule = None
    if name in ("SAM", "ASAM"):
        rule = SAMRule(rho, adaptive=name == "ASAM")
    elif name == "DB":
        rule = GRRule(gamma, scheme="exact")
    elif gamma:
        rule = GRRule(gamma, epsilon, scheme="backward" if name == "B-GR" else "forward")
    return Method(rule, level)


NONE = {"gamma": None, "epsilon": None, "rho": None, "level": None}


def constants(row: dict) -> dict:
    return {name: row.get(name) for name in NONE}


def measure(task: str, method: Method, seed: int, epochs: int, validation: bool, keep: Path | None = None) -> dict:
    """Train once and evaluate the final weights."""
    began = time.process_time()
    # digits use the Trainer, as a user would; the plain loop gives the same weights faster (tests/system/test_paper.py)
    net, data = train(TASKS[task], method, seed, epochs, trainer=task.startswith("digits"))
    seconds = time.process_time() - began
    accuracy, _ = score(net, data.validation if validation else data.test)
    train_accuracy, train_loss = score(net, data.train)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), keep)
    names = ("accuracy", "train_accuracy", "train_loss", "seconds")
    return dict(zip(names, (accuracy, train_accuracy, train_loss, seconds), strict=True))


def state_file(task: str, method: str, epochs: int, seed: int, **chosen) -> Path:
    """The file for the final weights of a run, outside version control."""
    parts = [task, method, *(text(value) for value in chosen.values() if value is not None), str(epochs), str(seed)]
    return STATES / ("-".join(parts) + ".pt")


def select(args, task: str, epochs: int) -> list[dict]:
    """Measure the validation accuracy of each candidate."""
    runs = [
        {"task": task, "method": name, **NONE, **chosen, "epochs": epochs, "seed": seed}
        for seed in SELECTION_SEEDS[task][: args.selection_seeds]
        for name, tried in GRID[task].items()
        for chosen in tried[: 2 if args.fast else None]
    ]
    return run_missing(
        args,
        "selection",
        runs,
        lambda task, method, epochs, seed, **some: measure(task, make(method, **some), seed, epochs, True),
    )


make = method  # for functions with an argument named `method`


def best(rows: list[dict], name: str) -> dict:
    """The constants with the highest mean validation accuracy over seeds; the first in case of ties."""
    means: dict[tuple, list[float]] = {}
    for row in rows:
        if row["method"] == name:
            means.setdefault(tuple(constants(row).items()), []).append(row["accuracy"])
    return dict(max(means, key=lambda key: sum(means[key]) / len(means[key]))) if means else {}


def final_runs(task: str, epochs: int, selection: list[dict], seeds) -> list[dict]:
    """The settings of the report: each method with its selected constants."""
    runs = []
    for seed in seeds:
        for name in GRID[task]:
            chosen = best(selection, name)
            if not chosen:  # with --draw-only, if there are no results
                continue
            row = {"task": task, "method": name, **chosen}
            runs += [{**row, "epochs": factor * epochs, "seed": seed} for factor in ((1, 2) if name in TWICE else (1,))]
    return runs


def report(args, task: str, epochs: int, selection: list[dict]) -> list[dict]:
    """Measure the test accuracy with the selected constants."""

    def run(task, method, epochs, seed, **chosen):
        keep = None if args.fast else state_file(task, method, epochs, seed, **chosen)
        return measure(task, make(method, **chosen), seed, epochs, False, keep)

    return run_missing(args, "generalisation", final_runs(task, epochs, selection, args.seeds), run)


def label(row: dict, epochs: int) -> str:
    """The name of a method, marked if it ran for twice the epochs."""
    return row["method"] + (", 2×" if row["epochs"] == 2 * epochs else "")


def show_constants(row: dict) -> str:
    signs = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b"}
    return " ".join(f"{sign}={row[name]:g}" for name, sign in signs.items() if row[name] is not None)


def by_label(rows: list[dict], epochs: int) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(label(row, epochs), []).append(row)
    return found


def show(task: str, rows: list[dict], epochs: int) -> None:
    """Print means over seeds; differences from plain training are paired by seed."""
    columns = ["test accuracy %", "− plain", "training acc. %", "CPU s"]
    title = f"{task}: {epochs} epochs, {len({row['seed'] for row in rows})} seeds"
    made = new_table(title, ["method", "chosen"], columns, "± is the standard error over seeds; 2×: twice the epochs")
    groups = by_label(rows, epochs)
    plain = {row["seed"]: row["accuracy"] for row in groups["plain"]}
    for name, group in groups.items():
        gains = [row["accuracy"] - plain[row["seed"]] for row in group]
        values = [[row[key] for row in group] for key in ("accuracy", "train_accuracy", "seconds")]
        cells = plus_minus(values[0]), plus_minus(gains) if name != "plain" else "", plus_minus(values[1])
        made.add_row(name, show_constants(group[0]), *cells, f"{sum(values[2]) / len(group):.1f}")
    console.print(made)
    for one, other in PAIRS:
        found = {row["seed"]: row["accuracy"] for row in groups[other]}
        gains = [row["accuracy"] - found[row["seed"]] for row in groups[one]]
        say(f"{task}: {one} − {other} = {plus_minus(gains, 2)}")


def draw(args, tests: dict[str, list[dict]], epochs: dict[str, int]) -> None:
    """Plot the test accuracy of each method, with one panel per task."""
    wide = min(4, len(tests))
    high = math.ceil(len(tests) / wide)
    figure, axes = new_figure(high, wide, 3.6 * wide, 2.7 * high)
    for one in axes.flat[len(tests) :]:
        one.remove()
    for position, (one, (task, rows)) in enumerate(zip(axes.flat, tests.items(), strict=False)):
        groups = by_label(rows, epochs[task])
        names = list(groups)[::-1]
        for height, name in enumerate(names):
            values = [row["accuracy"] for row in groups[name]]
            mean, error = mean_and_error(values)
            color = COLORS[groups[name][0]["method"]]
            hollow = "none" if "2×" in name else color
            one.plot(values, [height] * len(values), "|", color=color, alpha=0.5, markersize=6)
            one.errorbar(
                mean, height, xerr=error, fmt="o", color=color, markerfacecolor=hollow, capsize=3, markersize=5
            )
        mean, _ = mean_and_error([row["accuracy"] for row in groups["plain"]])
        one.axvline(mean, color="black", linewidth=0.8, linestyle=":")
        one.set_yticks(range(len(names)), names if position % wide == 0 else [""] * len(names))
        one.set(title=task, xlabel="test accuracy (%)")
    save(figure, args.figures, "generalisation")


def draw_grid(args, selections: dict[str, list[dict]]) -> None:
    """Plot validation accuracy over ε for each γ: F-GR, B-GR and DB."""
    figure, axes = new_figure(1, len(selections), 3.6 * len(selections), 3.6)
    for one, (task, rows) in zip(axes[0], selections.items(), strict=True):
        gammas = sorted({row["gamma"] for row in rows if row["method"] == "F-GR"})
        shades = dict(zip(gammas, (0.3, 0.55, 0.8, 1.0), strict=False))
        for name, style in (("F-GR", "-"), ("B-GR", "--"), ("DB", ":")):
            for gamma in gammas:
                points: dict[float, list[float]] = {}
                for row in rows:
                    if row["method"] == name and row["gamma"] == gamma:
                        points.setdefault(row["epsilon"] or 0.0, []).append(row["accuracy"])
                look = {"color": COLORS[name], "alpha": shades[gamma], "linestyle": style}
                values = [sum(found) / len(found) for found in points.values()]
                if name == "DB":
                    one.axhline(values[0], label=f"DB γ={gamma:g}", **look)
                else:
                    one.plot(list(points), values, "o", markersize=4, label=f"{name} γ={gamma:g}", **look)
        plain = [row["accuracy"] for row in rows if row["method"] == "plain"]
        level = sum(plain) / len(plain)
        one.axhline(level, color="black", linewidth=0.8, label="plain")
        shown = [row["accuracy"] for row in rows if row["method"] in ("plain", "DB", "B-GR", "F-GR")]
        one.set(title=task, xlabel="ε", ylabel="validation accuracy (%)", xscale="log")
        one.set_ylim(bottom=max(level - 6, min(shown) - 0.5))
        epsilons = sorted({row["epsilon"] for row in rows if row["method"] == "F-GR"})
        one.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons], minor=False)
        one.set_xticks([], minor=True)
        one.legend(fontsize="xx-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save(figure, args.figures, "generalisation_grid")


def experiment() -> None:
    seeds = {"type": int, "nargs": "+", "default": list(SEEDS)}
    tasks = {"nargs": "+", "choices": list(TASKS), "default": list(TASKS)}
    args = arguments(__doc__.splitlines()[0], seeds=seeds, tasks=tasks)
    args.selection_seeds = None
    if args.fast:
        args.seeds, args.selection_seeds, args.tasks = [0, 1], 1, args.tasks[:1]
    tests, selections, epochs = {}, {}, {}
    for task in args.tasks:
        epochs[task] = 1 if args.fast else TASKS[task].epochs
        selections[task] = select(args, task, epochs[task])
        tests[task] = report(args, task, epochs[task], selections[task])
        if not tests[task]:  # with --draw-only, if there are no results
            del tests[task], selections[task]
            continue
        show(task, tests[task], epochs[task])
    draw(args, tests, epochs)
    draw_grid(args, selections)


if __name__ == "__main__":
    main(experiment)
