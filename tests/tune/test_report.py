"""The files of a study."""

import csv

import pytest
import yaml

from lightning_gr.tune.answer import Row, TuneResult
from lightning_gr.tune.ranges import Range
from lightning_gr.tune.report import draw_final, draw_ranges, draw_search, write_files
from lightning_gr.tune.sweep import Sweep
from lightning_gr.tune.trial import Goal

PLAIN = {1: 0.80, 2: 0.82}
BETTER = {1: 0.90, 2: 0.921}


def trial(stage, method, index, state="COMPLETE", value=0.8, **constants):
    return {"stage": stage, "method": method, "index": index, "state": state, "value": value, "constants": constants}


@pytest.fixture
def result():
    sweep = Sweep("rho", (0.1, 1.0, 10.0), (0.01, 1.0, float("nan")), 2.0, 1.0)
    ranges = {
        "SAM": Range("SAM", sweep, {"rho": (0.02, 2.0)}, {"rho": 0.5}),
        "F-GR": Range(
            "F-GR", Sweep("epsilon", (0.1, 1.0), (0.1, 3.0), 2.0, 1.0), {"epsilon": (0.01, 1.0)}, {"epsilon": 1.0}
        ),
    }
    trials = [
        trial("search", "SAM", 0, rho=0.5),
        trial("search", "SAM", 1, "PRUNED", 0.3, rho=1.5),
        trial("search", "SAM", 2, "FAIL", None, rho=1.9) | {"error": "ValueError: no"},
        trial("search", "F-GR", 0, epsilon=0.5, gamma=0.1),
        trial("final", "SAM", 0, value=0.9, rho=0.5) | {"test": {"test_acc": 0.88}},
    ]
    rows = [Row("plain", {}, PLAIN, PLAIN, 1.0), Row("SAM", {"rho": 0.5}, BETTER, PLAIN, 2.0)]
    return TuneResult(Goal("val_acc", "max"), rows, trials, ranges)


def test_the_files(result, tmp_path):
    paths = write_files(result, tmp_path, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert {path.suffix for path in paths} == {".yaml", ".csv", ".png"}
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")


def test_best_contains_the_method_with_its_settings_below_the_answer(result, tmp_path):
    write_files(result, tmp_path, {"trainer": {"max_epochs": 3}}, {"sam": {"interval": 2}})
    text = (tmp_path / "best.yaml").read_text()
    assert text.startswith("# SAM(rho=0.5): SAM(rho=0.5) helps: +10.1 ± 0.1 points at 2.0 times the cost.")
    content = yaml.safe_load(text)
    assert content["sam"] == {"interval": 2, "adaptive": False, "rho": 0.5}
    assert content["trainer"] == {"max_epochs": 3}
    assert content["gr"] is content["flooding"] is content["msam"] is None


def test_best_is_plain_if_nothing_helps(result, tmp_path):
    nothing = TuneResult(result.goal, [result.rows[0]], [], {})
    write_files(nothing, tmp_path, {"trainer": {}}, {})
    content = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert [content[key] for key in ("gr", "sam", "msam", "flooding")] == [None] * 4


def test_each_trial_has_a_row(result, tmp_path):
    write_files(result, tmp_path, {}, {})
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]
    assert rows[0]["constants"] == "rho=0.5"
    assert rows[2]["error"] == "ValueError: no"
    assert rows[4]["test"] == "test_acc=0.88"


def test_the_plots_show_bounds_pruned_trials_and_each_seed(result):
    ranges = draw_ranges(result).axes
    assert [axes.get_title() for axes in ranges[:2]] == ["SAM", "F-GR"]
    labels = [text.get_text() for text in ranges[0].get_legend().get_texts()]
    assert "upper bound 2" in labels
    search = draw_search(result).axes
    assert [text.get_text() for text in search[0].get_legend().get_texts()] == ["to the end", "pruned", "plain"]
    (final,) = draw_final(result).axes
    assert len(final.patches) == 2
    assert [label.get_text() for label in final.get_xticklabels()] == ["plain", "SAM\nrho=0.5"]
