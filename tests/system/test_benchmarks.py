"""The benchmarks: what a step sends, the calculated times, and the numbers on the pages."""

import csv
import math
from pathlib import Path

import pytest
import torch
from launching import PYTHON, finish

ROOT = Path(__file__).parents[2]
LIMIT = 300
pytestmark = pytest.mark.timeout(LIMIT + 60)


def communication(folder, *flags):
    """Run the command and return its output."""
    command = ["env", "COLUMNS=80", *PYTHON, ROOT / "benchmarks/communication.py", *flags]
    codes, output = finish(folder / "log", command, limit=LIMIT)
    assert codes == [0], output[-3000:]
    return output


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """The rows of the CSV file; the ranks are only started once, since that takes most of the time."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch cannot shard on a CPU")
    folder = tmp_path_factory.mktemp("communication")
    table = communication(folder, "--steps", "1", "--limit", str(LIMIT - 30), "--csv", folder / "sent.csv")
    assert all(len(line) <= 80 for line in table.splitlines())
    with open(folder / "sent.csv", newline="", encoding="utf-8") as file:
        return {(row["case"], row["kind"]): row for row in csv.DictReader(file)}


def gradients(sent, case):
    """Return the all-reduces in the first pass and in later ones, and the bytes per parameter."""
    row = sent[case, "all-reduce"]
    second = float(row["in_second_pass"])
    return float(row["number"]) - second, second, float(row["bytes_per_parameter"])


@pytest.mark.launch
@pytest.mark.parametrize("suffix", ["", " ×4", " bf16"])
def test_gradients_sent_with_ddp(sent, suffix):
    """Synced ascent sends gradients twice, local ascent once, in its second pass; accumulation changes nothing."""
    buckets, none, once = gradients(sent, f"plain{suffix}")
    assert (none, once) == (0, 2 if "bf16" in suffix else 4)
    assert buckets > 1
    assert gradients(sent, f"F-GR synced{suffix}") == (buckets, buckets, 2 * once)
    assert gradients(sent, f"F-GR local{suffix}") == (0, buckets, once)


@pytest.mark.launch
@pytest.mark.parametrize("method", ["central", "SAM"])
def test_other_methods_send_the_same(sent, method):
    """Including the central scheme, which has three passes."""
    for mode in ("synced", "local"):
        assert gradients(sent, f"{method} {mode}") == gradients(sent, f"F-GR {mode}")


@pytest.mark.launch
def test_numbers_sent_in_addition_to_gradients(sent):
    """Only a flood level that is compared over ranks sends a number; ascents with DDP send none."""
    assert [case for case, kind in sent if kind == "scalar" and "FSDP" not in case] == ["flooding synced"]
    assert float(sent["flooding synced", "scalar"]["number"]) == 1
    assert gradients(sent, "flooding synced") == gradients(sent, "plain")


@pytest.mark.launch
@pytest.mark.parametrize("suffix", [", FSDP1", ", FSDP2", " ×4, FSDP2"])
def test_shards_sent_if_parameters_are_sharded(sent, suffix):
    """Twice as much as plain training gathers and scatters, and one number for a norm."""
    for kind in ("all-gather", "reduce-scatter"):
        once = float(sent[f"plain{suffix}", kind]["bytes"])
        assert float(sent[f"F-GR synced{suffix}", kind]["bytes"]) == 2 * once
    assert (f"plain{suffix}", "scalar") not in sent
    assert float(sent[f"F-GR synced{suffix}", "scalar"]["number"]) == 1


@pytest.mark.launch
def test_fsdp1_scatters_each_micro_batch_of_the_second_pass(sent):
    """Plain training only scatters for the last micro-batch, but gathers for each."""
    plain, ours = (sent[f"{name} ×4, FSDP1", "reduce-scatter"] for name in ("plain", "F-GR synced"))
    assert float(ours["number"]) == (1 + 4) * float(plain["number"])
    plain, ours = (sent[f"{name} ×4, FSDP1", "all-gather"] for name in ("plain", "F-GR synced"))
    assert float(ours["bytes"]) == 2 * float(plain["bytes"])


@pytest.mark.launch
def test_momentum_sam_gathers_the_outermost_unit_of_fsdp1_once_more(sent):
    plain, ours = (sent[f"{name}, FSDP1", "all-gather"] for name in ("plain", "Momentum-SAM"))
    assert float(ours["number"]) == float(plain["number"]) + 1
    assert sent["Momentum-SAM, FSDP2", "all-gather"] == {
        **sent["plain, FSDP2", "all-gather"],
        "case": "Momentum-SAM, FSDP2",
    }


@pytest.fixture
def step_time(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step_time

    return step_time


def test_calculation_of_an_all_reduce(step_time):
    """16 GPUs on two nodes, 50 MiB: 1.875 · 52,428,800 / 12.5e9 s plus two buckets · (14 + 2 · (7 · 1.25 + 8.5)) µs."""
    cluster = step_time.Cluster("Ethernet", between=12.5e9)
    assert math.isclose(step_time.all_reduce_time(cluster, 16, 50 * 2**20), 7.86432e-3 + 97e-6)


def test_calculation_of_a_step(step_time):
    """With 1 s for the forward pass, 2 s for the backward pass, and 4 s or 1 s for the all-reduce."""
    assert step_time.step_times(3, 4, overlap=True) == {"plain": 5, "synced": 10, "local": 8}
    assert step_time.step_times(3, 4, overlap=False) == {"plain": 7, "synced": 14, "local": 10}
    assert step_time.step_times(3, 1, overlap=True) == {"plain": 3, "synced": 6, "local": 6}


def test_calculation_of_the_break_even(step_time):
    """The all-reduce takes as long as the backward pass, which is two thirds of the computation."""
    cluster, work = step_time.CLUSTERS[1], step_time.WORKLOADS[0]
    samples = step_time.break_even(cluster, 64, work)
    sent = step_time.all_reduce_time(cluster, 64, work.parameters * work.sent)
    assert math.isclose(sent, 2 / 3 * samples * work.flop / (work.utilization * cluster.peak))


@pytest.mark.launch
def test_page_shows_the_output_of_the_command(tmp_path):
    page = {line.strip() for line in (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()}
    shown = [line.strip() for line in communication(tmp_path, "--calculate").splitlines()]
    assert [line for line in shown if line not in page] == []


# --- the cost of a step


DATA = [("step_cost", "step_cost.csv"), ("growth", "growth.csv"), ("cheaper", "cheaper.csv")]


@pytest.mark.launch
@pytest.mark.parametrize(("command", "data"), DATA)
def test_performance_page_shows_its_data(command, data, tmp_path):
    read = ["env", "COLUMNS=80", *PYTHON, ROOT / f"benchmarks/{command}.py", "--read", ROOT / "docs/data" / data]
    codes, output = finish(tmp_path / "log", read, limit=LIMIT)
    assert codes == [0], output[-3000:]
    page = {line.strip() for line in (ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines()}
    assert len(output.splitlines()) > 10
    assert [line for line in output.splitlines() if line.strip() not in page or len(line) > 80] == []


@pytest.mark.launch
def test_cost_of_a_step_quickly(tmp_path):
    flags = ["--quick", "--ways", "SAM", "double backward", "--csv", tmp_path / "cost.csv"]
    codes, output = finish(tmp_path / "log", [*PYTHON, ROOT / "benchmarks/step_cost.py", *flags], limit=LIMIT)
    assert codes == [0], output[-3000:]
    with open(tmp_path / "cost.csv", newline="", encoding="utf-8") as file:
        found = {(row["way"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)}
    assert 0 < found["plain", "cpu"] < found["double backward", "cpu"]
    assert round(found["SAM", "passes"], 1) == 4.0
    assert found["SAM", "memory"] <= 1.1
    assert "double backward" in output


# --- the cost on a GPU


@pytest.mark.launch
def test_gpu_benchmark_in_miniature_on_the_cpu(tmp_path, monkeypatch):
    """All parts run, and the tables show the values in the file."""
    values = tmp_path / "gpu.csv"
    flags = ["--device", "cpu", "--quick", "--models", "MLP", "--ways", "SAM", "--csv", values]
    command = ["env", "COLUMNS=80", *PYTHON, ROOT / "benchmarks/gpu.py", *flags]
    codes, output = finish(tmp_path / "log", command, limit=LIMIT)
    assert codes == [0], output[-3000:]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    rows = gpu.read_rows(values)
    found = {(row.part, row.precision, row.way, row.quantity): row.value for row in rows}
    for part, precision in (("cost", "32-true"), ("cost", "bf16-mixed"), ("compile", "32-true"), ("ranks", "gloo")):
        assert all(found[part, precision, way, "seconds"] > 0 for way in ("plain", "SAM"))
    assert found["cost", "32-true", "plain", "peak"] < found["cost", "32-true", "SAM", "peak"]
    assert round(found["bandwidth", "", "SAM", "passes"]) == 8
    assert found["ranks", "gloo", "SAM", "apart"] == 0
    assert [table.title for table in gpu.tables(rows) if table.title[:10] not in output] == []  # long titles wrap
    assert all(len(line) <= 80 for line in output.splitlines())
