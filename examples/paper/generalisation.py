"""Generalization of all methods on digits, MNIST and mnist1d, with constants selected on a validation split.

`python examples/paper/generalisation.py` measures the runs missing in results/: `selection.csv` (validation accuracy of
all candidates) and `generalisation.csv` (test accuracy with the selected constants). `--tasks`, `--methods` and
`--seeds` select parts. `studies.py` has the tasks and the candidates.
"""

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from common import (
    COLORS,
    HERE,
    IN_A_ROW,
    arguments,
    console,
    main,
    mean_and_error,
    new_panels,
    new_table,
    plus_minus,
    run_missing,
    save,
    say,
    text,
)
from studies import CONSTANTS, STUDIES, TASKS, UNTUNED, factors, make
from tasks import score, train

SEEDS = (0, 1, 2, 3, 4)
METHODS = list(dict.fromkeys(name for study in STUDIES.values() for name in study.grid))
STATES = HERE.parent.parent / "outputs" / "paper" / "states"
SETTINGS = (*CONSTANTS, "learning_rate")  # selected on the validation split
REACH = 12  # percent below plain training that the figures show
PAIRS = (("F-GR", "B-GR"), ("F-GR", "DB"), ("SAM", "F-GR"), ("MSAM", "F-GR"), ("MSAM", "nesterov"))


def measure(task: str, method: str, seed: int, epochs: int, validation: bool, keep: Path | None = None, **chosen):
    """Train once and evaluate the final weights."""
    began = time.process_time()
    # digits use the Trainer, as a user would; the plain loop gives the same weights faster (tests/system/test_paper.py)
    net, data = trained(task, method, seed, epochs, trainer=task.startswith("digits"), **chosen)
    seconds = time.process_time() - began
    accuracy, _ = score(net, data.validation if validation else data.test)
    train_accuracy, train_loss = score(net, data.train)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), keep)
    names = ("accuracy", "train_accuracy", "train_loss", "seconds")
    return dict(zip(names, (accuracy, train_accuracy, train_loss, seconds), strict=True))


def trained(task: str, method: str, seed: int, epochs: int, learning_rate: float, trainer: bool = False, **constants):
    """A trained network and its data."""
    settings = dataclasses.replace(TASKS[task], learning_rate=learning_rate)
    return train(settings, make(method, **constants), seed, epochs, trainer=trainer)


def state_file(task: str, method: str, epochs: int, seed: int, **chosen) -> Path:
    """The file for the final weights of a run, outside version control."""
    parts = [task, method, *(text(value) for value in chosen.values() if value is not None), str(epochs), str(seed)]
    return STATES / ("-".join(parts) + ".pt")


def select(args, task: str, epochs: int) -> list[dict]:
    """Measure the validation accuracy of each candidate, plain training first, for its learning rate."""
    study, few = STUDIES[task], 2 if args.fast else None
    names = [name for name in methods(args, task) if name != UNTUNED]

    def run(names: list[str], tuned: dict[int, float]) -> list[dict]:
        runs = [
            {**_row(task, name, rate, **constants), "epochs": factor * epochs, "seed": seed}
            for seed in study.selection_seeds[: 1 if args.fast else None]
            for name in names
            for factor in (factors(name) if study.rates else (1,))
            for rate in study.rates_of(name, tuned.get(factor))[:few]
            for constants in study.grid[name][:few]
        ]
        return run_missing(args, "selection", runs, lambda **one: measure(**one, validation=True)) if runs else []

    rows = run(["plain"], {})
    tuned = {factor: best(rows, "plain", factor * epochs) for factor in (1, 2) if study.rates}
    rates = {factor: found["learning_rate"] for factor, found in tuned.items() if found}
    return rows + run([name for name in names if name != "plain"], rates)


def _row(task: str, method: str, learning_rate: float, **constants) -> dict:
    nothing = dict.fromkeys(CONSTANTS)
    return {"task": task, "method": method, **nothing, **constants, "learning_rate": learning_rate}


def methods(args, task: str) -> list[str]:
    """The methods to compare, always with plain training."""
    return [name for name in STUDIES[task].grid if name == "plain" or not args.methods or name in args.methods]


def best(rows: list[dict], name: str, epochs: int) -> dict:
    """The settings with the highest mean validation accuracy over seeds; the first in case of ties."""
    means: dict[tuple, list[float]] = {}
    for row in rows:
        if (row["method"], row["epochs"]) == (name, epochs):
            means.setdefault(tuple((key, row[key]) for key in SETTINGS), []).append(row["accuracy"])
    return dict(max(means, key=lambda key: sum(means[key]) / len(means[key]))) if means else {}


def untuned(task: str, selection: list[dict], epochs: int) -> dict:
    """The settings of plain training with the task's own learning rate, if another one was selected."""
    tuned, own = best(selection, "plain", epochs), TASKS[task].learning_rate
    return {**tuned, "learning_rate": own} if tuned and tuned["learning_rate"] != own else {}


def report(args, task: str, epochs: int, selection: list[dict]) -> list[dict]:
    """Measure the test accuracy with the selected settings."""
    study, runs = STUDIES[task], []
    for seed in args.seeds:
        for name in methods(args, task):
            for factor in factors(name):
                at = (factor if study.rates else 1) * epochs
                chosen = untuned(task, selection, at) if name == UNTUNED else best(selection, name, at)
                if chosen:  # not with --draw-only, if there are no results
                    runs.append({"task": task, "method": name, **chosen, "epochs": factor * epochs, "seed": seed})

    def run(**one):
        return measure(**one, validation=False, keep=None if args.fast else state_file(**one))

    return run_missing(args, "generalisation", runs, run) if runs else []


def label(row: dict, epochs: int) -> str:
    """The name of a method, marked if it ran for twice the epochs."""
    return row["method"] + (", 2×" if row["epochs"] == 2 * epochs else "")


def show_settings(row: dict) -> str:
    signs = {"gamma": "γ", "epsilon": "ε", "rho": "ρ", "level": "b"}
    if STUDIES[row["task"]].rates:
        signs["learning_rate"] = "η"
    found = {sign: f"{row[name]:g}" for name, sign in signs.items() if row[name] is not None}
    return " ".join(f"{sign}={value.removeprefix('0') or 0}" for sign, value in found.items())


def by_label(rows: list[dict], epochs: int) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(label(row, epochs), []).append(row)
    return found


def gains(groups: dict[str, list[dict]], one: str, other: str) -> list[float]:
    """How much more accurate a method is than another one with the same seed."""
    found = {row["seed"]: row["accuracy"] for row in groups.get(other, [])}
    return [row["accuracy"] - found[row["seed"]] for row in groups.get(one, []) if row["seed"] in found]


def show(task: str, rows: list[dict], epochs: int) -> None:
    """Print means over seeds; differences are paired by seed."""
    groups = by_label(rows, epochs)
    title = f"{task}: {epochs} epochs, {len({row['seed'] for row in rows})} seeds"
    caption = "± is the standard error over seeds; 2×: twice the epochs"
    columns = ["test acc. %", "− plain", "− plain, 2×", "train %"]
    made = new_table(title, ["method", "chosen"], columns, caption)
    for name, group in groups.items():
        pairs = [gains(groups, name, other) if name != other else [] for other in ("plain", "plain, 2×")]
        cells = [plus_minus(values) if values else "" for values in ([row["accuracy"] for row in group], *pairs)]
        fitted = sum(row["train_accuracy"] for row in group) / len(group)
        made.add_row(name, show_settings(group[0]), *cells, f"{fitted:.1f}")
    console.print(made)
    for one, other in PAIRS:
        if found := gains(groups, one, other):
            say(f"{task}: {one} − {other} = {plus_minus(found, 2)}")


def show_rates(task: str, selection: list[dict], epochs: int) -> None:
    """Print how accurate plain training is on the validation split with each learning rate."""
    rates = STUDIES[task].rates
    title = f"{task}: validation accuracy % of plain training, by learning rate η"
    made = new_table(title, [], ["epochs", *(f"η={rate:g}" for rate in rates)])
    for factor in (1, 2):
        rows = [row for row in selection if (row["method"], row["epochs"]) == ("plain", factor * epochs)]
        found = [[row["accuracy"] for row in rows if row["learning_rate"] == rate] for rate in rates]
        made.add_row(f"{factor * epochs}", *(f"{sum(one) / len(one):.1f}" if one else "" for one in found))
    console.print(made)


def labels_of(groups: Iterable[dict[str, list[dict]]]) -> list[str]:
    """The labels of all tasks, in the order of ``METHODS``."""
    found = set().union(*groups)
    return [name for method in METHODS for name in (method, f"{method}, 2×") if name in found]


def show_gains(tests: dict[str, list[dict]], epochs: dict[str, int]) -> None:
    """Print how much each method gains on MNIST: a table for each training set, with a column for each network."""
    sets: dict[tuple[int, float], dict[str, dict[str, list[dict]]]] = {}
    for task, rows in tests.items():
        groups = by_label(rows, epochs[task])
        network = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet"}[task.split("-")[1]]
        sets.setdefault((TASKS[task].sizes[1], TASKS[task].noise), {})[network] = groups
    for (images, noise), networks in sets.items():
        title = f"MNIST, {images:,} images, {f'{noise:.0%} of the labels random' if noise else 'clean labels'}"
        caption = "plain: test accuracy in %; others: paired gains over it, in points"
        made = new_table(title, ["method"], list(networks), caption)
        for name in labels_of(networks.values()):
            pairs = [gains(groups, name, "plain") for groups in networks.values()]
            if name == "plain":
                pairs = [[row["accuracy"] for row in groups["plain"]] for groups in networks.values()]
            made.add_row(name, *(plus_minus(values) if values else "" for values in pairs))
        console.print(made)


def draw(args, tests: dict[str, list[dict]], epochs: dict[str, int], name: str) -> None:
    """Plot the test accuracy of each method, with one panel per task. A mean left of a panel is written there."""
    groups = {task: by_label(rows, epochs[task]) for task, rows in tests.items()}
    labels = labels_of(groups.values())[::-1]
    figure, panels = new_panels(len(tests), 0.7 + 0.2 * len(labels))
    for position, (one, (task, found)) in enumerate(zip(panels, groups.items(), strict=True)):
        plain, _ = mean_and_error([row["accuracy"] for row in found["plain"]])
        one.axvline(plain, color="black", linewidth=0.8, linestyle=":")
        for label_, group in found.items():
            draw_group(one, labels.index(label_), group, plain - REACH, hollow="2×" in label_)
        one.set_xlim(*limits([row["accuracy"] for group in found.values() for row in group], plain - REACH))
        one.set_yticks(range(len(labels)), labels if position % IN_A_ROW == 0 else [""] * len(labels))
        one.set_ylim(-0.6, len(labels) - 0.4)
        one.set(title=task, xlabel="test accuracy (%)")
    save(figure, args.figures, name)


def limits(values: list[float], least: float) -> tuple[float, float]:
    """The limits of an axis with a margin; values below ``least`` are left out."""
    margin = 0.05 * (max(values) - max(min(values), least))
    return max(min(values) - margin, least), max(values) + margin


def draw_group(axes, height: int, group: list[dict], left: float, hollow: bool) -> None:
    """Plot the runs of a method, with mean and standard error."""
    values, color = [row["accuracy"] for row in group], COLORS[group[0]["method"]]
    mean, error = mean_and_error(values)
    look = {"color": color, "markerfacecolor": "none" if hollow else color, "capsize": 3, "markersize": 5}
    axes.plot(values, [height] * len(values), "|", color=color, alpha=0.5, markersize=6)
    if mean < left:
        axes.text(left, height, f" ◂ {mean:.0f}", color=color, verticalalignment="center", fontsize=8)
    else:
        axes.errorbar(mean, height, xerr=error, fmt="o", **look)


def draw_grid(args, selections: dict[str, list[dict]], epochs: dict[str, int], name: str) -> None:
    """Plot validation accuracy over ε for each γ: F-GR, B-GR and DB, with the best of the learning rates."""
    figure, panels = new_panels(len(selections), 3.6)
    for one, (task, rows) in zip(panels, selections.items(), strict=True):
        found = [row for row in rows if row["epochs"] == epochs[task]]
        gammas = sorted({row["gamma"] for row in found if row["method"] == "F-GR"})
        shades = dict(zip(gammas, (0.3, 0.55, 0.8, 1.0), strict=False))
        for name_, style in (("F-GR", "-"), ("B-GR", "--"), ("DB", ":")):
            for gamma in gammas:
                points = over_epsilon([row for row in found if (row["method"], row["gamma"]) == (name_, gamma)])
                look = {"color": COLORS[name_], "alpha": shades[gamma], "linestyle": style}
                if name_ == "DB" and points:
                    one.axhline(points[0.0], label=f"DB γ={gamma:g}", **look)
                elif points:
                    one.plot(list(points), points.values(), "o", markersize=4, label=f"{name_} γ={gamma:g}", **look)
        level = over_epsilon([row for row in found if row["method"] == "plain"])[0.0]
        one.axhline(level, color="black", linewidth=0.8, label="plain")
        shown = [row["accuracy"] for row in found if row["method"] in ("plain", "DB", "B-GR", "F-GR")]
        one.set(title=task, xlabel="ε", ylabel="validation accuracy (%)", xscale="log")
        one.set_ylim(*limits(shown, level - 6))
        epsilons = sorted({row["epsilon"] for row in found if row["method"] == "F-GR"})
        one.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons], minor=False)
        one.set_xticks([], minor=True)
        one.legend(fontsize="xx-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save(figure, args.figures, name)


def over_epsilon(rows: list[dict]) -> dict[float, float]:
    """The mean accuracy over seeds for each ε (0 if there is none), with the best learning rate."""
    found: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        found.setdefault((row["epsilon"] or 0.0, row["learning_rate"]), []).append(row["accuracy"])
    best: dict[float, float] = {}
    for (epsilon, _), values in found.items():
        best[epsilon] = max(best.get(epsilon, 0.0), sum(values) / len(values))
    return best


def parse_parts(doc: str):
    """Parse the command line, with flags for parts of the comparison."""
    seeds = {"type": int, "nargs": "+", "default": list(SEEDS)}
    tasks = {"nargs": "+", "choices": list(TASKS), "default": list(TASKS)}
    some = {"nargs": "+", "choices": METHODS, "help": "compare some methods with plain training; default: all"}
    args = arguments(doc, seeds=seeds, tasks=tasks, methods=some)
    if args.fast:
        args.seeds, args.tasks = args.seeds[:2], args.tasks[:1]
    return args


def experiment() -> None:
    args = parse_parts(__doc__.splitlines()[0])
    tests, selections, epochs = {}, {}, {}
    for task in args.tasks:
        epochs[task] = 1 if args.fast else TASKS[task].epochs
        selection = select(args, task, epochs[task])
        rows = report(args, task, epochs[task], selection)
        if rows:  # with --draw-only, there may be no results
            tests[task], selections[task] = rows, selection
            show(task, rows, epochs[task])
        if STUDIES[task].rates and selection:
            show_rates(task, selection, epochs[task])
    for name, on_mnist in (("generalisation", False), ("generalisation_mnist", True)):
        chosen = [task for task in tests if bool(STUDIES[task].rates) == on_mnist]
        if chosen and on_mnist:
            show_gains({task: tests[task] for task in chosen}, epochs)
        if chosen:
            draw(args, {task: tests[task] for task in chosen}, epochs, name)
        grids = {task: selections[task] for task in chosen if any(row["method"] == "F-GR" for row in selections[task])}
        if grids:
            draw_grid(args, grids, epochs, f"{name}_grid")


if __name__ == "__main__":
    main(experiment)
