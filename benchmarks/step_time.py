"""Calculates from published bandwidths when communication dominates a step: plain, synced and local ascent.

``python benchmarks/communication.py --calculate`` prints the tables. ``docs/scaling.md`` lists the sources and the
limitations of the model.
"""

import math
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

GPU_COUNTS = (8, 64, 1024)


@dataclass(frozen=True)
class Cluster:
    """Nodes with several GPUs each. Bandwidths are unidirectional, in byte/s; times are in seconds."""

    name: str
    between: float  # bandwidth between nodes, per node
    inside: float = 450e9  # bandwidth within a node, per GPU: H100, NVLink 4
    gpus_per_node: int = 8
    peak: float = 989e12  # FLOP/s of a GPU: H100, bfloat16, dense
    call: float = 14e-6  # to start an all-reduce
    hop_inside: float = 1.25e-6  # latency of one hop in its tree
    hop_between: float = 8.5e-6


@dataclass(frozen=True)
class Workload:
    """A model, and the work of one GPU in a step."""

    name: str
    parameters: float
    sent: int  # bytes of gradient per parameter
    flop: float  # per sample, forward and backward
    utilization: float  # of the peak
    samples: int
    unit: str


CLUSTERS = (Cluster("InfiniBand", between=8 * 50e9), Cluster("Ethernet", between=12.5e9))
WORKLOADS = (
    Workload("ResNet-50, float32 gradients", 25.6e6, 4, 3 * 2 * 4.1e9, 0.10, 64, "images"),
    Workload("1 B transformer, bfloat16 gradients", 1e9, 2, 6 * 1e9, 0.40, 8192, "tokens"),
)
LOOK: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
BUCKET = 25 * 2**20  # bytes, DDP's default


def all_reduce_time(cluster: Cluster, gpus: int, nbytes: float) -> float:
    """Seconds to average a gradient: each GPU sends 2(n − 1)/n of it, and each bucket goes up and down a tree."""
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    bandwidth = cluster.inside if nodes == 1 else min(cluster.inside, cluster.between)
    hops = (min(gpus, cluster.gpus_per_node) - 1) * cluster.hop_inside + math.log2(nodes) * cluster.hop_between
    return 2 * (gpus - 1) / gpus * nbytes / bandwidth + math.ceil(nbytes / BUCKET) * (cluster.call + 2 * hops)


def compute_time(cluster: Cluster, work: Workload) -> float:
    """Seconds for one forward and backward pass; the backward pass takes two thirds."""
    return work.flop * work.samples / (work.utilization * cluster.peak)


def step_times(compute: float, communication: float, *, overlap: bool) -> dict[str, float]:
    """Seconds for a step whose all-reduces overlap with the backward pass, or run after it."""
    forward, backward = compute / 3, 2 * compute / 3
    reduced = forward + (max(backward, communication) if overlap else backward + communication)
    return {"plain": reduced, "synced": 2 * reduced, "local": compute + reduced}


def break_even(cluster: Cluster, gpus: int, work: Workload) -> float:
    """Samples per GPU below which the all-reduce takes longer than the backward pass that could hide it."""
    backward_of_one = 2 / 3 * compute_time(cluster, work) / work.samples
    return all_reduce_time(cluster, gpus, work.parameters * work.sent) / backward_of_one


def table(work: Workload) -> Table:
    """Build the table of one workload on all clusters; pairs are with and without overlap."""
    compute = 1e3 * compute_time(CLUSTERS[0], work)
    title = f"{work.name}, {work.samples:,} {work.unit} per GPU\n"
    title += f"forward {compute / 3:.1f} ms, backward {2 * compute / 3:.1f} ms"
    made = Table(title=title, caption="overlapped / not overlapped with the backward pass", **LOOK)
    made.add_column("network")
    for column in ("GPUs", "all-reduce\nms", "plain step\nms", "synced\n×", "local\n×", f"hidden from\n{work.unit}"):
        made.add_column(column, justify="right")
    rows = {}
    for cluster in CLUSTERS:
        for gpus in GPU_COUNTS:
            sent = all_reduce_time(cluster, gpus, work.parameters * work.sent)
            steps = [step_times(compute_time(cluster, work), sent, overlap=overlap) for overlap in (True, False)]
            plain = _pair([f"{1e3 * times['plain']:.1f}" for times in steps])
            ratios = [_pair([f"{times[kind] / times['plain']:.2f}" for times in steps]) for kind in ("synced", "local")]
            least = f"{math.ceil(break_even(cluster, gpus, work)):,}"
            name = "NVLink" if gpus <= cluster.gpus_per_node else cluster.name
            rows[name, gpus] = f"{1e3 * sent:.1f}", plain, *ratios, least
    for (name, gpus), cells in rows.items():
        made.add_row(name, f"{gpus:,}", *cells)
    return made


def _pair(values: list[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def tables() -> list[Table]:
    """Build one table per workload."""
    return [table(work) for work in WORKLOADS]
