"""The table and the verdicts of the demonstration."""

import pytest
from rich.console import Console

from lightning_gr.cli.demo.report import constants, make_table, verdicts
from lightning_gr.cli.demo.task import DEMO_METHODS, EpochRecord


def records_of(**accuracies):
    return [
        EpochRecord(method.replace("_", "-"), seed, 1, 0.0, 0.0, accuracy)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_a_method_that_does_not_help_is_named():
    helped, not_clear, worse, slightly, spread_out = (0.90, 0.91), (0.81, 0.82), (0.7, 0.7), (0.8, 0.81), (0.9, 0.15)
    lines = verdicts(
        records_of(plain=(0.80, 0.82), SAM=helped, F_GR=not_clear, B_GR=worse, MSAM=slightly, flooding=spread_out)
    )
    assert lines == [
        "F-GR does not help here: +0.5 points, within the spread over seeds (±1.4).",
        "B-GR is worse than plain training here: -11.0 points, beyond the spread over seeds (±1.4).",
        "MSAM is worse than plain training here: -0.5 points, within the spread over seeds (±1.4).",
        "flooding is worse than plain training here: -28.5 points, within the spread over seeds (±53.0).",
    ]


def test_one_seed_has_no_spread(capsys):
    records = records_of(plain=(0.8,), SAM=(0.9,), F_GR=(0.7,), B_GR=(0.8,), MSAM=(0.79999,))
    assert verdicts(records) == [
        "F-GR is worse than plain training here: -10.0 points, one seed, so there is no spread over seeds.",
        "B-GR does not help here: +0.0 points, one seed, so there is no spread over seeds.",
        "MSAM does not help here: +0.0 points, one seed, so there is no spread over seeds.",
    ]
    Console(width=80).print(make_table(records, {}, "title"))
    out = capsys.readouterr().out
    assert "±" not in out
    assert "one seed, so there is no spread" in out


@pytest.mark.parametrize("width", [40, 80])
def test_the_table_fits_the_terminal(width, capsys):
    records = records_of(**dict.fromkeys(DEMO_METHODS, (0.8, 0.81)))
    Console(width=width).print(make_table(records, dict.fromkeys(DEMO_METHODS, 1.0), "title"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out


def test_constants_are_named_by_greek_letters():
    assert [constants(name) for name in DEMO_METHODS] == ["", "γ=1 ε=0.5", "γ=0.5 ε=0.3", "ρ=0.5", "ρ=2", "b=0.8"]
