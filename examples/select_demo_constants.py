"""Select the constants of `lightning-gr demo` with a grid search on its validation split.

Run it with `python examples/select_demo_constants.py` (about five minutes on two cores). The demo itself reports on the
test split, with different seeds.
"""

import argparse
import statistics

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_gr import SAM, Flooding, GradientRegularization, MomentumSAM
from lightning_gr.cli.demo.task import train

PAIRS = [(0.1, 0.1), (0.3, 0.2), (0.5, 0.5), (1.0, 0.5), (1.0, 1.0)]
GRID = {
    "plain": {"": list},
    "F-GR": {f"γ={g:g} ε={e:g}": lambda g=g, e=e: [GradientRegularization(g, e)] for g, e in PAIRS},
    "B-GR": {
        f"γ={g:g} ε={e:g}": lambda g=g, e=e: [GradientRegularization(g, e, scheme="backward")]
        for g, e in [(0.1, 0.1), (0.2, 0.2), (0.3, 0.2), (0.3, 0.3), (0.5, 0.3), (0.5, 0.5)]
    },
    "SAM": {f"ρ={rho:g}": lambda rho=rho: [SAM(rho)] for rho in (0.1, 0.2, 0.5, 1.0)},
    "MSAM": {f"ρ={rho:g}": lambda rho=rho: [MomentumSAM(rho)] for rho in (0.5, 1.0, 2.0, 3.0)},
    "flooding": {f"b={level:g}": lambda level=level: [Flooding(level)] for level in (0.5, 0.8, 1.1, 1.3)},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[100, 101], help="should differ from the demo's 0, 1, 2"
    )
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID))
    args = parser.parse_args()

    table = Table("method", "constants", "validation accuracy", "selected")
    runs = [(method, name) for method in args.methods for name in GRID[method]]
    means = {}
    for method, name in track(runs, "validating"):
        scores = [
            train(method, GRID[method][name](), seed, args.epochs, validation=True)[-1].accuracy for seed in args.seeds
        ]
        means[method, name] = statistics.mean(scores)
    for method, name in runs:
        best = max(means[other] for other in runs if other[0] == method)
        mark = "*" if means[method, name] == best else ""
        table.add_row(method, name, f"{100 * means[method, name]:.1f}%", mark)
    Console().print(table)


if __name__ == "__main__":
    main()
