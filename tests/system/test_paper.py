"""The paper's experiments: fast versions by their own commands, the underlying identities, and the pages."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gr import GRRule, MomentumSAMRule, SAMRule
from lightning_gr.cli.demo import task as demo

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
PROGRAMS = ["diagonal", "flooding", "cost", "generalisation", "sharpness", "ablations", "one_pass", "relatives"]
COMMITTED = sorted((PAPER / "results").glob("*.csv"))


@pytest.fixture
def paper(monkeypatch):
    """A function that imports the programs as modules."""
    monkeypatch.syspath_prepend(PAPER)
    import common

    monkeypatch.setattr(common.console, "width", 80)
    return __import__


def run(program, folder, *flags):
    places = ["--results", folder, "--figures", folder]
    command = [sys.executable, PAPER / f"{program}.py", "--fast", *places, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def experiment(program):
    """Run a program's experiment in this process."""
    threads = torch.get_num_threads()
    try:
        program.experiment()
    finally:
        torch.set_num_threads(threads)


def rows(file):
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def numbers(file, column):
    return [float(row[column]) for row in rows(file)]


def assert_drawn(folder, *names):
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / f"{name}.svg").read_text(encoding="utf-8")


# --- fast versions


@pytest.mark.launch
def test_diagonal(tmp_path):
    out = run("diagonal", tmp_path)
    assert_drawn(tmp_path, "diagonal")
    by_method = {row["method"]: float(row["alpha_eff"]) for row in rows(tmp_path / "diagonal.csv")}
    assert by_method["F-GR ε=.2"] < 0.1 < 0.29 < by_method["GD"] < 0.31 < by_method["B-GR ε=.1"]
    assert max(numbers(tmp_path / "diagonal.csv", "worst_coordinate")) < 1e-4
    assert "α_eff" in out


@pytest.mark.launch
def test_flooding_and_a_second_run(paper, tmp_path, monkeypatch, capsys):
    run("flooding", tmp_path)
    assert_drawn(tmp_path, "flooding")
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.csv")}
    assert max(numbers(tmp_path / "flooding_identity.csv", "difference")) < 1e-12
    monkeypatch.setattr(sys, "argv", ["flooding.py", "--fast", "--results", str(tmp_path), "--figures", str(tmp_path)])
    experiment(paper("flooding"))
    assert " runs" not in capsys.readouterr().out  # no run was missing
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.csv")} == before


@pytest.mark.launch
def test_generalisation_and_sharpness(tmp_path):
    run("generalisation", tmp_path)
    assert_drawn(tmp_path, "generalisation", "generalisation_grid")
    tests = rows(tmp_path / "generalisation.csv")
    assert len({row["method"] for row in tests}) == 9
    assert {row["epochs"] for row in tests if row["method"] == "plain"} == {"1", "2"}
    run("sharpness", tmp_path)
    assert_drawn(tmp_path, "sharpness")
    assert all(value > 0 for value in numbers(tmp_path / "sharpness.csv", "eigenvalue"))


@pytest.mark.launch
def test_generalisation_on_mnist(tmp_path):
    """Plain training has a tuned learning rate, another one for twice the epochs, and a row with the default one."""
    run("generalisation", tmp_path, "--tasks", "mnist-mlp-500", "--methods", "MSAM", "plain, untuned", "--seeds", "3")
    assert_drawn(tmp_path, "generalisation_mnist")
    tried = [row for row in rows(tmp_path / "selection.csv") if row["method"] == "plain"]
    best = {
        epochs: max((row for row in tried if row["epochs"] == epochs), key=lambda row: float(row["accuracy"]))
        for epochs in ("1", "2")
    }
    tests = rows(tmp_path / "generalisation.csv")
    plain = {row["epochs"]: row["learning_rate"] for row in tests if row["method"] == "plain"}
    assert plain == {epochs: row["learning_rate"] for epochs, row in best.items()}
    assert {row["learning_rate"] for row in tests if row["method"] == "plain, untuned"} == {"0.05"}
    assert {(row["method"], row["seed"]) for row in tests} == {
        (name, "3") for name in ("plain", "plain, untuned", "MSAM")
    }


@pytest.mark.launch
def test_ablations(tmp_path):
    run("ablations", tmp_path)
    assert_drawn(tmp_path, "ablations")
    assert {row["m"] for row in rows(tmp_path / "ascent_sync.csv")} == {"1", "8"}


@pytest.mark.launch
def test_one_pass_and_relatives(tmp_path):
    run("one_pass", tmp_path, "--tasks", "digits-noise", "mnist-cnn")
    tests = rows(tmp_path / "one_pass.csv")
    assert len(tests) == 2 * 6
    assert {row["rho"] for row in tests if row["method"] == "MSAM, ρ=2"} == {"2"}
    run("relatives", tmp_path)
    assert {row["method"] for row in rows(tmp_path / "relatives.csv")} == {
        "plain", "SAM", "GSAM", "Friendly SAM", "LookSAM",
    }  # fmt: skip
    accuracies = numbers(tmp_path / "relatives.csv", "accuracy")
    assert len(set(accuracies)) > 3  # methods have different results
    assert all(0 < accuracy <= 100 for accuracy in accuracies)


@pytest.mark.launch
def test_cost(tmp_path):
    run("cost", tmp_path)
    assert_drawn(tmp_path, "cost")
    ratios = {row["method"]: float(row["flop_ratio"]) for row in rows(tmp_path / "cost.csv")}
    assert ratios["plain"] == 1
    assert ratios["F-GR"] == ratios["B-GR"] == ratios["SAM"] == 2
    assert 2.5 < ratios["DB"] < 3


def test_bad_flags(paper, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generalisation.py", "--tasks", "imagenet"])
    with pytest.raises(SystemExit) as ended:
        paper("generalisation").experiment()
    assert ended.value.code == 2
    assert "choose from" in capsys.readouterr().err


# --- the runner


class Arguments:
    def __init__(self, folder, draw_only=False):
        self.results, self.draw_only = folder, draw_only


def test_runner_continues_after_an_interruption(paper, tmp_path):
    common, seen = paper("common"), []

    def measure(a, b):
        seen.append(a)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"twice": 2.0 * a}

    runs = [{"a": a, "b": None} for a in (0.1, 0.2, 0.3)]
    with pytest.raises(KeyboardInterrupt):
        common.run_missing(Arguments(tmp_path), "x", runs, measure)
    assert common.run_missing(Arguments(tmp_path, draw_only=True), "x", runs, measure) == [
        {"a": 0.1, "b": None, "twice": 0.2}
    ]
    all_rows = common.run_missing(Arguments(tmp_path), "x", runs, measure)
    assert seen == [0.1, 0.2, 0.2, 0.3]
    assert [row["twice"] for row in all_rows] == [0.2, 0.4, 0.6]
    assert "python" in (tmp_path / "x.json").read_text()


def test_runner_keeps_curves_together(paper, tmp_path):
    common = paper("common")
    runs = [{"seed": seed} for seed in (0, 1)]
    made = common.run_missing(Arguments(tmp_path), "x", runs, lambda seed: [{"step": s, "v": seed + s} for s in (0, 1)])
    assert [row["v"] for row in made] == [0, 1, 1, 2]
    assert made == common.run_missing(Arguments(tmp_path, draw_only=True), "x", runs, None)


def test_runner_refuses_a_file_with_other_columns(paper, tmp_path):
    (tmp_path / "x.csv").write_text("a,c\n1,2\n")
    with pytest.raises(SystemExit, match="delete it"):
        paper("common").run_missing(Arguments(tmp_path), "x", [{"a": 1, "b": 2}], None)


# --- identities


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("order", ["up, down", "down, up"])
def test_two_flooded_steps_equal_one_step_of_gradient_regularization(paper, order, activation):
    found = paper("flooding_walks").measure_identity(order, 0.1, 1, activation)
    below, above = ("loss_before", "loss_between") if order == "up, down" else ("loss_between", "loss_before")
    assert found[below] < found[above]
    assert found["moved"] > 1e-5
    assert found["difference"] < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_drift_with_momentum(paper, momentum):
    found = paper("flooding_walks").measure_drift(momentum, 1e-3)
    assert found["drift"] == pytest.approx(1 / (1 - momentum**2), rel=1e-3)


@pytest.mark.parametrize(("gamma", "epsilon"), [(0.0, None), (0.02, 0.0), (0.02, 0.2), (0.02, -0.1)])
def test_field_of_the_package_equals_the_closed_form(paper, gamma, epsilon):
    diagonal = paper("diagonal_flow")
    problem = diagonal.Problem(3, n=10, d=20)
    weights = np.random.default_rng(0).uniform(0.1, 0.5, (2, 20))
    ours = diagonal.package_field(problem, gamma, epsilon)(*weights)
    by_hand = diagonal.closed_field(problem, gamma, epsilon)(*weights)
    np.testing.assert_allclose(ours, by_hand, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_effective_scale_of_a_small_problem(paper):
    """After some time, √(w₊w₋) = α·exp(−γ∫g∘g′dt)."""
    diagonal = paper("diagonal_flow")
    problem = diagonal.Problem(0, n=10, d=20)
    plus, minus, integral, *_ = diagonal.flow(problem, 0.02, 0.2, source="package", time=0.05)
    assert integral.max() > 10
    np.testing.assert_allclose(np.sqrt(plus * minus), 0.3 * np.exp(-0.02 * integral), rtol=1e-5)


def test_networks_side_by_side_do_not_mix(paper):
    """A rule applied to several independent networks gives each the same gradient as when it is alone."""
    diagonal = paper("diagonal_flow")
    problems = [diagonal.Problem(seed, n=10, d=20) for seed in range(3)]
    together = diagonal.DiagonalNetworks(problems)
    diagonal.regularized_backward(together.loss, together, GRRule(0.02, 0.2))
    for number, problem in enumerate(problems):
        alone = diagonal.DiagonalNetworks([problem])
        diagonal.regularized_backward(alone.loss, alone, GRRule(0.02, 0.2))
        torch.testing.assert_close(together.plus.grad[number], alone.plus.grad[0], rtol=1e-12, atol=0)


# --- training


@pytest.mark.parametrize(
    ("rule", "level"),
    [
        (None, None),
        ("nesterov", None),
        (GRRule(0.3, 0.1), None),
        (GRRule(0.3, scheme="exact"), None),
        (SAMRule(0.2, adaptive=True), 2.0),
        (MomentumSAMRule(1.0), None),
    ],
)
def test_trainer_and_plain_loop_give_the_same_weights(paper, rule, level):
    tasks = paper("tasks")
    method = tasks.Method(nesterov=True) if rule == "nesterov" else tasks.Method(rule, level)
    one, other = (tasks.train(tasks.DIGITS, method, 0, 1, trainer=trainer)[0] for trainer in (True, False))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_in_trainer_and_plain_loop(paper):
    tasks = paper("tasks")
    method = tasks.Method(GRRule(0.3, 0.1), schedule=tasks.Schedule(start_step=2, warmup_steps=4))
    one, other = (tasks.train(tasks.DIGITS, method, 0, 1, trainer=trainer)[0] for trainer in (True, False))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("task", "method", "tuned", "expected"),
    [
        ("mnist-cnn-500", "plain", None, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]),
        ("mnist-mlp-500", "plain", None, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]),
        ("mnist-mlp-500", "SAM", 0.01, [0.01, 0.05]),
        ("mnist-mlp-500", "SAM", 0.2, [0.2, 0.05]),
        ("mnist-mlp-500", "SAM", 0.05, [0.05]),
        ("digits", "plain", None, [0.05]),
        ("mnist1d-vit", "SAM", None, [3e-3]),
    ],
)
def test_learning_rates_to_try(paper, task, method, tuned, expected):
    """Plain training tries the whole range, and other methods its best rate and the task's."""
    assert paper("studies").STUDIES[task].rates_of(method, tuned) == expected


@pytest.mark.slow
def test_mnist_splits_are_disjoint(paper):
    """Only training labels are noisy, and the test images are the same for all seeds."""
    tasks = paper("tasks")
    one, other = (tasks.mnist_task("cnn", 500, 0.2).split(seed) for seed in (0, 1))
    assert [len(part[1]) for part in one] == [500, 2500, 2000]
    assert torch.equal(one.test[0], other.test[0])
    assert not torch.equal(one.train[0], other.train[0])
    images = torch.cat([part[0] for part in one])
    assert len(images.unique(dim=0)) == len(tasks.mnist()[0].unique(dim=0))


def test_data_equals_that_of_the_demonstration(paper):
    tasks = paper("tasks")
    ours, theirs = tasks.split(*tasks.digits(), 897, 500, 0.2, seed=3), demo.Digits.load(3)
    for part in ("train", "validation", "test"):
        for a, b in zip(getattr(ours, part), getattr(theirs, part), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_mnist1d_is_created_without_changing_numpys_random_state(paper):
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    x, y = paper("tasks").mnist1d()
    assert (x.shape, y.shape) == ((5000, 40), (5000,))
    assert np.random.get_state()[1].tolist() == before


# --- pages


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_page_shows_the_committed_numbers(paper, program, tmp_path, capsys, monkeypatch):
    """The figure and the table are created from the committed files, and the page contains each line of the table."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--draw-only", "--figures", str(tmp_path)])
    experiment(paper(program))
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.svg"))) >= 1
    page = {line.strip() for line in (PAPER / "README.md").read_text(encoding="utf-8").splitlines()}
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if "Figure:" not in line]
    assert len(shown) > 5
    assert [line for line in shown if line not in page] == []


def test_results_have_a_description_of_their_origin():
    assert len(COMMITTED) == 19
    assert all(file.with_suffix(".json").exists() for file in COMMITTED)
