"""Sharpness at the end of the generalization runs: largest eigenvalue and trace of the training loss's Hessian.

`python examples/paper/sharpness.py` measures each run of results/generalisation.csv that results/sharpness.csv lacks.
It reads the weights that `generalisation.py` saved in outputs/paper/states, and trains again if they are missing.
`--tasks`, `--methods` and `--seeds` select parts.
"""

import torch
from common import (
    COLORS,
    IN_A_ROW,
    MARKS,
    console,
    main,
    mean_and_error,
    new_panels,
    new_table,
    plus_minus,
    read,
    run_missing,
    save,
)
from generalisation import METHODS, SETTINGS, by_label, parse_parts, state_file, trained
from studies import TASKS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gr import hessian_eigenvalue, hessian_trace


def final(args, task: str, method: str, epochs: int, seed: int, **chosen) -> tuple[nn.Module, tuple]:
    """The final network of a run, in eval mode, and its training split."""
    file = state_file(task, method, epochs, seed, **chosen)
    if args.fast or not file.exists():
        net, data = trained(task, method, seed, epochs, **chosen)
        return net, data.train
    net = TASKS[task].network().eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    return net, TASKS[task].split(seed).train


def measure(args, task: str, method: str, epochs: int, seed: int, **chosen) -> dict:
    """Measure at the final weights, on the full training split with the labels used in training."""
    net, (x, y) = final(args, task, method, epochs, seed, **chosen)

    def loss():
        return nn.functional.cross_entropy(net(x), y)

    grads = torch.autograd.grad(loss(), list(net.parameters()))
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        largest = hessian_eigenvalue(loss, net, tolerance=0.02, max_iterations=40)
        trace = hessian_trace(loss, net, min_samples=5, max_samples=10, tolerance=0.05)
    return {
        "eigenvalue": largest.value,
        "residual": largest.residual,
        "trace": trace.value,
        "trace_error": trace.standard_error,
        "gradient_norm": torch.cat([grad.flatten() for grad in grads]).norm().item(),
    }


def show(task: str, rows: list[dict], epochs: int) -> None:
    columns = ["largest eigenvalue", "trace", "‖∇L‖"]
    made = new_table(
        f"{task}: Hessian of the training loss at the end", ["method"], columns, "± is the standard error over seeds"
    )
    for name, group in by_label(rows, epochs).items():
        values = [[row[key] for row in group] for key in ("eigenvalue", "trace", "gradient_norm")]
        made.add_row(name, plus_minus(values[0], 2), plus_minus(values[1], 1), plus_minus(values[2], 3))
    console.print(made)


def draw(args, rows: list[dict], tests: list[dict], name: str) -> None:
    """Plot each method's mean test accuracy over its largest eigenvalue."""
    from matplotlib.ticker import LogLocator, NullFormatter

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = new_panels(len(tasks), 3.2)
    accuracy = {key(row): row["accuracy"] for row in tests}
    for one, task in zip(panels, tasks, strict=True):
        found = [row for row in rows if row["task"] == task]
        for method in dict.fromkeys(row["method"] for row in found):
            group = [row for row in found if row["method"] == method and row["epochs"] == found[0]["epochs"]]
            x, x_error = mean_and_error([row["eigenvalue"] for row in group])
            y, y_error = mean_and_error([accuracy[key(row)] for row in group])
            look = {"color": COLORS[method], "marker": MARKS[method], "capsize": 2, "linestyle": "none"}
            one.errorbar(x, y, xerr=x_error, yerr=y_error, label=method, **look)
        one.set(xlabel="largest eigenvalue of the Hessian", ylabel="test accuracy (%)", title=task, xscale="log")
        one.xaxis.set_major_locator(LogLocator(subs=(1, 3, 5)))
        one.xaxis.set_major_formatter("{x:g}")
        one.xaxis.set_minor_formatter(NullFormatter())
    marks = [zip(*one.get_legend_handles_labels(), strict=True) for one in panels]
    handles = {label: handle for pairs in marks for handle, label in pairs}  # a task may lack a method
    look = {"fontsize": "x-small", "loc": "center left", "bbox_to_anchor": (1, 0.5)}
    panels[:IN_A_ROW][-1].legend(handles.values(), handles.keys(), **look)
    save(figure, args.figures, name)


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("task", "method", *SETTINGS, "epochs", "seed"))


def settings(row: dict) -> dict:
    """What a row of generalisation.csv says about how to train."""
    found = {name: row[name] for name in ("task", "method", *SETTINGS)}
    return {**found, "epochs": int(row["epochs"]), "seed": int(row["seed"])}


def experiment() -> None:
    args = parse_parts(__doc__.splitlines()[0])
    tests = read(args.results / "generalisation.csv")
    names = ["plain", *(args.methods or METHODS)]
    runs = [settings(row) for row in tests if row["task"] in args.tasks and row["method"] in names]
    runs = [run for run in runs if run["seed"] in args.seeds][: 3 if args.fast else None]
    if not runs:
        raise SystemExit("No runs to look at: run generalisation.py first, with the same --fast or --results")
    runs.sort(key=lambda run: list(TASKS).index(run["task"]))
    rows = run_missing(args, "sharpness", runs, lambda **run: measure(args, **run))
    for task in dict.fromkeys(row["task"] for row in rows):
        found = [row for row in rows if row["task"] == task]
        show(task, found, min(row["epochs"] for row in found))
    for name, on_mnist in (("sharpness", False), ("sharpness_mnist", True)):
        chosen = [row for row in rows if row["task"].startswith("mnist-") == on_mnist]
        if chosen:
            draw(args, chosen, tests, name)


if __name__ == "__main__":
    main(experiment)
