"""Flooding performs gradient regularization: the identity of its steps, the falling gradient norm, rates and noise.

`python examples/paper/flooding.py` measures the runs missing in results/: `flooding_identity.csv`,
`flooding_curves.csv`, `flooding_momentum.csv` and `flooding_noise.csv`.
"""

import itertools
import math

from common import COLORS, arguments, console, main, new_figure, new_table, run_missing, save, say
from flooding_walks import LEVEL, measure_curve, measure_drift, measure_identity, measure_noise

ETAS, MOMENTA = (0.025, 0.05, 0.1), (0.0, 0.5, 0.9)
PAIR_TIME = 4.0  # steps · η²/(1 − μ²)


def steps_to(rows: list[dict], fraction: float) -> float:
    """The first step at which ‖∇L‖ is below a fraction of its initial value, or NaN."""
    below = (row["step"] for row in rows if row["gradient_norm"] < fraction * rows[0]["gradient_norm"])
    return next(below, math.nan)


def of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def show(identity: list[dict], curves: list[dict], drifts: list[dict], noise: list[dict]) -> None:
    most, least = max(row["difference"] for row in identity), min(row["moved"] for row in identity)
    say(f"two flooded steps differ from one GR step by at most {most:.1e}, while weights move by at least {least:.1e}")
    columns = ["η", "μ", "steps", "last loss", "‖∇L‖", "→", "to 60%", "scaled", "turns"]
    title = f"at the level b = {LEVEL}, means over seeds"
    caption = "to 60%: steps until ‖∇L‖ is at 60% of its start; scaled: times η²/(1−μ²);"
    caption += "\nturns: fraction of steps that reverse the direction of the previous one"
    made = new_table(title, ["walk"], columns, caption)
    for (kind, eta, momentum, activation), rows in grouped(curves).items():
        curve = [of(rows, seed=seed) for seed in sorted({row["seed"] for row in rows})]
        first, last = [one[0] for one in curve], [one[-1] for one in curve]
        fallen = sum(steps_to(one, 0.6) for one in curve) / len(curve)
        scaled = fallen * eta**2 / (1 - momentum**2)
        loss, before, after = mean(last, "loss"), mean(first, "gradient_norm"), mean(last, "gradient_norm")
        name = kind.removeprefix("mini-") if activation == "gelu" else activation
        cells = [f"{eta:g}", f"{momentum:g}", f"{last[0]['step']:.0f}", f"{loss:.3f}", f"{before:.3f}", f"{after:.3f}"]
        turns = mean(last, "turns") / last[0]["step"]
        made.add_row(name, *cells, *never_or(fallen, scaled), f"{turns:.2f}" if turns else "")
    console.print(made)
    for row in drifts:
        ratio = f"{row['drift']:.3f} η²H∇L per two strictly alternating steps; 1/(1 − μ²) = {row['predicted']:.3f}"
        say(f"μ = {row['momentum']:g}: drift {ratio}")
    for row in noise:
        both = f"effect {row['effect']:.1e}, noise {row['noise']:.1e}, ratio {row['ratio']:.0f}"
        say(f"η = {row['eta']:g}, batches of {row['batch']:.0f}: {both}")


def never_or(steps: float, scaled: float) -> tuple[str, str]:
    return ("never", "") if math.isnan(steps) else (f"{steps:.0f}", f"{scaled:.2f}")


def mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def grouped(curves: list[dict]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in curves:
        found.setdefault((row["kind"], row["eta"], row["momentum"], row["activation"]), []).append(row)
    return found


def draw(args, curves: list[dict], noise: list[dict]) -> None:
    """Plot loss, gradient norm, the collapse over η and μ, and the noise."""
    figure, axes = new_figure(1, 4, 14, 3.2)
    colors = {
        "flooding": COLORS["flooding"],
        "explicit": COLORS["F-GR"],
        "random": "#777777",
        "mini-batches": COLORS["B-GR"],
    }
    styles = {"flooding": "-", "explicit": "--", "random": ":", "mini-batches": "-."}
    names = {"explicit": "steps η²Δ_F(η) of F-GR", "random": "random walk at the level"}
    first, groups = ETAS[1], grouped(curves)
    for kind, color in colors.items():
        rows = [row for row in groups.get((kind, first, 0.0, "gelu"), []) if row["seed"] == 0]
        look = {"color": color, "linestyle": styles[kind], "label": names.get(kind, kind)}
        x = [row["step"] for row in rows]
        axes[0, 0].plot(x, [row["loss"] for row in rows], **look)
        axes[0, 1].plot(x, [row["gradient_norm"] for row in rows], **look)
    steps = max(row["step"] for row in curves if row["eta"] == first)
    along = {"xlabel": "step", "xscale": "symlog", "xlim": (0, steps)}
    axes[0, 0].axhline(LEVEL, color="black", linewidth=0.6)
    axes[0, 0].set(ylabel="training loss", title=f"loss, b = {LEVEL}, η = {first:g}", ylim=(0, 2 * LEVEL), **along)
    axes[0, 1].set(ylabel="‖∇L‖", title="gradient norm", ylim=(0, 0.8), **along)
    axes[0, 1].legend(fontsize="x-small")
    shades = {0.0: "-", 0.5: "--", 0.9: ":"}
    for (kind, eta, momentum, activation), rows in groups.items():
        if kind == "flooding" and activation == "gelu":
            one = of(rows, seed=0)
            x = [row["step"] * eta**2 / (1 - momentum**2) for row in one]
            color = dict(zip(ETAS, ("#56B4E9", "#0072B2", "#000000"), strict=True))[eta]
            look = {"color": color, "linestyle": shades[momentum], "label": f"η={eta:g} μ={momentum:g}"}
            axes[0, 2].plot(x, [row["gradient_norm"] for row in one], **look)
    axes[0, 2].set(xlabel="steps · η²/(1 − μ²)", ylabel="‖∇L‖", title="one curve for all η and μ, if stable")
    axes[0, 2].set(xscale="log", xlim=(0.005, PAIR_TIME), ylim=(0, 0.5))
    axes[0, 2].legend(fontsize="xx-small", ncols=3, loc="lower left")
    etas = [row["eta"] for row in noise]
    axes[0, 3].plot(etas, [row["effect"] for row in noise], "o-", color=COLORS["F-GR"], label="effect, η² Δ_F")
    axes[0, 3].plot(etas, [row["noise"] for row in noise], "s--", color=COLORS["B-GR"], label="noise of mini-batches")
    axes[0, 3].set(xscale="log", yscale="log", xlabel="η", ylabel="length of two steps", title="mini-batches of 64")
    axes[0, 3].legend(fontsize="x-small")
    save(figure, args.figures, "flooding")


def runs_of_curves(seeds: range, fast: bool) -> list[dict]:
    walks = [("flooding", eta, momentum, "gelu") for eta in ETAS for momentum in MOMENTA]
    walks += [(kind, ETAS[1], 0.0, "gelu") for kind in ("explicit", "random", "mini-batches")]
    walks += [("flooding", ETAS[1], 0.0, "relu")]
    walks = [walk for walk in walks if not fast or walk[1:] == (ETAS[1], 0.0, "gelu")]
    return [
        {
            "kind": kind,
            "eta": eta,
            "momentum": momentum,
            "activation": activation,
            "seed": seed,
            "time": 0.3 if fast else PAIR_TIME,
        }
        for kind, eta, momentum, activation in walks
        for seed in seeds
    ]


def experiment() -> None:
    args = arguments(__doc__.splitlines()[0])
    seeds = range(1 if args.fast else 3)
    pairs = itertools.product(("up, down", "down, up"), ETAS, seeds, ("gelu", "relu"))
    names = ("order", "eta", "seed", "activation")
    identity = [dict(zip(names, values, strict=True)) for values in pairs]
    rows = run_missing(args, "flooding_identity", identity, measure_identity)
    drifts = [{"momentum": momentum, "eta": 0.001} for momentum in MOMENTA]
    drift = run_missing(args, "flooding_momentum", drifts, measure_drift)
    noises = [{"eta": eta, "batch": 64, "seed": 0, "pairs": 20 if args.fast else 200} for eta in (0.01, *ETAS)]
    noise = run_missing(args, "flooding_noise", noises, measure_noise)
    curves = run_missing(args, "flooding_curves", runs_of_curves(seeds, args.fast), measure_curve)
    show(rows, curves, drift, noise)
    draw(args, curves, noise)


if __name__ == "__main__":
    main(experiment)
