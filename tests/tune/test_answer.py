"""The statistics, the table and the summary sentence."""

import io
import math
import statistics

import pytest
from rich.console import Console

from lightning_gr.tune.answer import Gain, Row, TuneResult, make_tables, sentence
from lightning_gr.tune.trial import Goal

PLAIN = {1: 0.80, 2: 0.82, 3: 0.81}
ACCURACY, LOSS = Goal("val_acc", "max"), Goal("val_loss", "min")


def row(method, gains, constants=None, cost=2.0, plain=PLAIN, **fields):
    values = {seed: plain[seed] + gain for seed, gain in zip(plain, gains, strict=True)}
    return Row(method, constants or {"rho": 0.2}, values, plain, cost, **fields)


def rows(*others):
    return [Row("plain", {}, PLAIN, PLAIN, 1.0), *others]


def test_differences_are_paired_by_seed():
    gain = Gain.of({1: 0.9, 2: 0.8, 7: 0.0}, {1: 0.5, 2: 0.6, 3: 0.1}, 1.0)
    assert gain.count == 2
    assert gain.mean == pytest.approx(0.3)
    assert gain.error == pytest.approx(statistics.stdev([0.4, 0.2]) / math.sqrt(2))


@pytest.mark.parametrize(
    ("gains", "clear"),
    # Student's t is 4.303 for two degrees of freedom
    [([0.03, 0.04, 0.05], True), ([0.01, 0.04, 0.07], False), ([0.04], False), ([-0.03, -0.04, -0.05], True)],
)
def test_differences_beyond_the_spread_over_seeds(gains, clear):
    gain = Gain.of(dict(enumerate(gains)), dict.fromkeys(range(len(gains)), 0.0), 1.0)
    assert gain.is_clear is clear
    assert gain.helps is (clear and gains[0] > 0)


def test_the_sentence_names_what_helps_best_first():
    result = rows(row("MomentumSAM", [0.03, 0.032, 0.034], {"rho": 2.0}, 1.1), row("SAM", [0.05, 0.052, 0.054]))
    assert sentence(result, ACCURACY) == (
        "SAM(rho=0.2) helps: +5.2 ± 0.1 points at 2.0 times the cost;"
        " MomentumSAM(rho=2) gives +3.2 ± 0.1 points at 1.1 times the cost."
    )


def test_a_lower_loss_is_better():
    plain = {1: 2.0, 2: 2.1, 3: 2.2}
    better = row("SAM", [-0.50, -0.52, -0.54], plain=plain)
    result = [Row("plain", {}, plain, plain, 1.0), better]
    assert sentence(result, LOSS) == "SAM(rho=0.2) helps: -0.520 ± 0.012 in val_loss at 2.0 times the cost."
    assert "no method helps" in sentence([result[0], row("SAM", [0.5, 0.52, 0.54], plain=plain)], LOSS)


def test_the_sentence_says_if_nothing_helps():
    assert sentence(rows(row("SAM", [-0.01, 0.01, 0.0])), ACCURACY) == (
        "no method helps here beyond the spread of seeds."
    )


def test_the_sentence_asks_for_more_seeds_if_a_method_may_help():
    said = sentence(rows(row("SAM", [0.01, 0.04, 0.07])), ACCURACY)
    assert "SAM(rho=0.2) comes closest" in said
    assert "more --seeds" in said


def test_one_seed_leaves_the_spread_unknown():
    result = [Row("plain", {}, {1: 0.8}, {1: 0.8}, 1.0), Row("SAM", {"rho": 1.0}, {1: 0.9}, {1: 0.8}, 2.0)]
    assert "with one seed the spread of seeds is unknown" in sentence(result, ACCURACY)


def test_best_is_plain_if_nothing_helps():
    nothing = TuneResult(ACCURACY, rows(row("SAM", [-0.01, 0.01, 0.0])), [], {})
    assert nothing.best.method == "plain"
    helps = TuneResult(ACCURACY, rows(row("SAM", [0.05, 0.051, 0.052]), row("F-GR", [0.06, 0.061, 0.062])), [], {})
    assert helps.best.method == "F-GR"


def printed(result):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in make_tables(result):
        console.print(table)
    return console.export_text()


def test_the_table_fits_80_columns_and_warns_that_the_metric_selected():
    result = TuneResult(
        ACCURACY,
        rows(row("MomentumSAM", [0.05, 0.052, 0.054], {"epsilon": 0.123, "gamma": 0.456})),
        [],
        {},
        {"SAM": "ValueError: no"},
    )
    text = printed(result)
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("81.0 ± 1.0", "+5.2 ± 0.1", "2.00×", "it also chose the", "ValueError: no", "gamma=0.456"):
        assert part in text
    assert "test" not in text


def test_the_test_set_has_its_own_table():
    tested = row("SAM", [0.05, 0.052, 0.054], test={1: 0.7, 2: 0.72}, plain_test={1: 0.6, 2: 0.61})
    assert "+10.5" in printed(TuneResult(ACCURACY, rows(tested), [], {}))
