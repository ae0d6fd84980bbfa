"""Time and memory of a step of F-GR, B-GR, SAM and double backward relative to plain SGD, over depth and width.

`python examples/paper/cost.py` measures the runs that results/cost.csv lacks. Double backward is the cheapest variant:
one graph, (L + γ/2 ‖∇L‖²).backward(), with ∇L from autograd.grad(..., create_graph=True).
"""

import statistics
import time

import torch
from common import COLORS, MARKS, arguments, console, main, new_figure, new_table, run_missing, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_gr import GRRule, SAMRule, regularized_backward

GAMMA, EPSILON = 0.01, 0.05
RULES = {
    "F-GR": GRRule(GAMMA, EPSILON),
    "B-GR": GRRule(GAMMA, EPSILON, scheme="backward"),
    "SAM": SAMRule(0.05),
}
METHODS = ("plain", *RULES, "DB")
THEORY = {"two passes": 2.0, "double backward": 3.0}


class Block(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm, and a shortcut with matching width and resolution."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        first = [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
        second = [nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)]
        self.net = nn.Sequential(*first, *second)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.net(x))


def network(kind: str, depth: int, width: int) -> nn.Module:
    """An MLP with ``depth`` linear layers, or a ResNet with 6·``depth`` + 2 layers for images of 32 × 32."""
    if kind == "MLP":
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))
    blocks, inside = [], width
    for stage in range(3):
        for number in range(depth):
            outside = width * 2**stage
            blocks.append(Block(inside, outside, 2 if stage and not number else 1))
            inside = outside
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks, *head)


class Steps:
    """Training steps of one network with any of the methods."""

    def __init__(self, kind: str, depth: int, width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.net = network(kind, depth, width)
        self.x = torch.randn(batch, width) if kind == "MLP" else torch.randn(batch, 3, 32, 32)
        self.y = torch.randint(10, (batch,))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def step(self, method: str) -> None:
        self.optimizer.zero_grad()
        if method == "plain":
            self.loss().backward()
        elif method == "DB":
            loss = self.loss()
            grads = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
            (loss + GAMMA / 2 * sum(grad.square().sum() for grad in grads)).backward()
        else:
            regularized_backward(self.loss, self.net, RULES[method])
        self.optimizer.step()


def peak_bytes(steps: Steps, method: str) -> int:
    """The peak of allocated bytes in a step, including the weights, from the allocator events in a profile."""
    steps.step(method)
    steps.optimizer.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        steps.step(method)
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most + sum(p.nbytes for p in steps.net.parameters())


def count_flops(steps: Steps, method: str) -> int:
    """Count the FLOPs of matrix products and convolutions in a step."""
    with FlopCounterMode(display=False) as counter:
        steps.step(method)
    return counter.get_total_flops()


def measure(kind: str, depth: int, width: int, batch: int, rounds: int) -> list[dict]:
    """Measure all methods in alternating rounds: medians, and medians of the ratios within a round."""
    steps = Steps(kind, depth, width, batch)
    flops = {method: count_flops(steps, method) for method in METHODS}
    memory = {method: peak_bytes(steps, method) for method in METHODS}
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        turn = number % len(METHODS)
        for method in METHODS[turn:] + METHODS[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps.step(method)
            times[method].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for method in METHODS:
        row = {"method": method, "parameters": sum(p.numel() for p in steps.net.parameters())}
        for position, clock in enumerate(("wall", "cpu")):
            # the first round warms up
            pairs = [
                (one[position], plain[position])
                for one, plain in zip(times[method][1:], times["plain"][1:], strict=True)
            ]
            row[f"{clock}_ms"] = 1e3 * statistics.median(one for one, _ in pairs)
            row[f"{clock}_ratio"] = statistics.median(one / plain for one, plain in pairs)
        row["flop_ratio"] = flops[method] / flops["plain"]
        row["peak_mib"] = memory[method] / 2**20
        row["memory_ratio"] = memory[method] / memory["plain"]
        rows.append(row)
    return rows


def runs(fast: bool) -> list[dict]:
    mlps = (
        [("MLP", 4, 64)]
        if fast
        else [("MLP", depth, 512) for depth in (2, 4, 8, 16)] + [("MLP", 4, w) for w in (64, 128, 256, 1024)]
    )
    resnets = [] if fast else [("ResNet", 1, 16), ("ResNet", 2, 16), ("ResNet", 3, 16), ("ResNet", 1, 32)]
    rounds = 3 if fast else 25
    few = {"batch": 16 if fast else 128}
    made = [{"kind": kind, "depth": depth, "width": width, **few, "rounds": rounds} for kind, depth, width in mlps]
    slow = {"batch": 32, "rounds": 11}
    return made + [{"kind": kind, "depth": depth, "width": width, **slow} for kind, depth, width in resnets]


def show(rows: list[dict]) -> None:
    columns = ["CPU time ×", "wall time ×", "FLOP ×", "peak memory ×", "CPU ms"]
    caption = "medians of ratios to plain SGD in the same round; network: layers × width"
    made = new_table("one step, one thread", ["network", "method"], columns, caption)
    for row in rows:
        name = f"{row['kind']} {row['depth']:.0f}×{row['width']:.0f}" if row["method"] == "plain" else ""
        ratios = [f"{row[key]:.2f}" for key in ("cpu_ratio", "wall_ratio", "flop_ratio", "memory_ratio")]
        made.add_row(name, row["method"], *ratios, f"{row['cpu_ms']:.1f}", end_section=row["method"] == METHODS[-1])
    console.print(made)


def draw(args, rows: list[dict]) -> None:
    """Plot ratios of time over depth and width and for ResNets, and of memory."""
    figure, axes = new_figure(1, 4, 14, 3.2)
    mlps, resnets = ([row for row in rows if row["kind"] == kind] for kind in ("MLP", "ResNet"))
    depths = [row for row in mlps if row["width"] == 512] or mlps
    widths = sorted((row for row in mlps if row["depth"] == 4), key=lambda row: row["width"])
    _ratios(axes[0, 0], depths, "cpu_ratio", "MLP, width 512", "layers", lambda row: f"{row['depth']:.0f}")
    _ratios(axes[0, 1], widths, "cpu_ratio", "MLP, 4 layers", "width", lambda row: f"{row['width']:.0f}")
    _ratios(axes[0, 2], resnets, "cpu_ratio", "ResNet", "n × width, 6n + 2 layers", size)
    some = [row for row in [*depths, *resnets] if row["depth"] != 2]
    _ratios(axes[0, 3], some, "memory_ratio", "peak memory", "", lambda row: f"{row['kind']}\n{size(row)}")
    axes[0, 0].legend(fontsize="small", loc="lower right")
    save(figure, args.figures, "cost")


def size(row: dict) -> str:
    return f"{row['depth']:.0f}×{row['width']:.0f}"


def _ratios(one, rows: list[dict], y: str, title: str, label: str, name) -> None:
    places = {text: place for place, text in enumerate(dict.fromkeys(name(row) for row in rows))}
    for number, method in enumerate(METHODS[1:]):
        points = [(places[name(row)] + 0.12 * (number - 1.5), row[y]) for row in rows if row["method"] == method]
        if points:
            look = {"color": COLORS[method], "label": method, "markersize": 5}
            one.plot(*zip(*points, strict=True), MARKS[method], **look)
    if y == "cpu_ratio":
        for text, value in THEORY.items():
            one.axhline(value, color="black", linestyle=":", linewidth=0.9)
            one.text(-0.4, value + 0.03, f"theory, {text}", fontsize="x-small")
    one.set(title=title, xlabel=label, ylabel=f"{'CPU time' if y == 'cpu_ratio' else 'memory'}, plain SGD = 1")
    one.set_ylim(0, 4)
    one.set_xlim(-0.5, max(len(places), 1) - 0.5)
    one.set_xticks(list(places.values()), list(places), fontsize="small")


def experiment() -> None:
    args = arguments(__doc__.splitlines()[0])
    rows = run_missing(args, "cost", runs(args.fast), measure)
    show(rows)
    draw(args, rows)


if __name__ == "__main__":
    main(experiment)
