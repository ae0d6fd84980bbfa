"""The panel at the start and the table at the end: their content in 80 columns, and never within a live bar."""

import re
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from modules import METHODS, TinyModule, make_loader, make_trainer, mlp
from rich.console import Console

from lightning_gr import SAM, Flooding, GradientRegularization
from lightning_gr.report.display import Summary, make_panel, shows

BARS = {"rich": pl.callbacks.RichProgressBar, "tqdm": pl.callbacks.TQDMProgressBar}


@pytest.fixture
def shown(capsys, monkeypatch):
    """A function that trains and returns what was printed, with a width of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def train(*callbacks, module=None, **options):
        options = {"enable_progress_bar": True, "max_epochs": 2, "log_every_n_steps": 1, **options}
        trainer = make_trainer(*callbacks, **options)
        capsys.readouterr()
        trainer.fit(TinyModule() if module is None else module, make_loader())
        return capsys.readouterr().out

    return train


@pytest.mark.parametrize("bar", BARS)
def test_panel_before_and_table_after_the_bar(shown, bar):
    callback = GradientRegularization(0.1, 0.05, start_step=2, warmup_steps=100, exclude=["*.bias"], prog_bar=True)
    out = shown(callback, Flooding(100.0), BARS[bar]())
    panel, table = out.index("regularized of"), out.index("logged steps")
    bars = [match.start() for match in re.finditer("Epoch", out)]
    assert panel < bars[0]
    assert table > bars[-1]
    assert "gr/grad_norm" in out[bars[0] : table]
    for line in (
        "F-GR", "g = (1 − γ/ε) ∇L(θ) + (γ/ε) ∇L(θ + ε ∇L(θ))", "γ = 0.1, ε = 0.05", "64 regularized of 75 trainable",
        "2 per regularized step", "every step from step 2, growing over 100 steps", "|L − b| + b, b = 100",
        "regularized: 3 of 6 steps", "flooded: 6 of 6 losses below the level",
    ):  # fmt: skip
        assert line in out
    assert "\x1b" not in out[table:]  # the output is redirected
    assert max(len(line) for line in out[table:].splitlines()) <= 80


def test_the_table_shows_first_last_smallest_and_largest_values(shown):
    rows = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            rows.append(trainer.callback_metrics["gr/grad_norm"].item())

    out = shown(SAM(0.1), Notes(), enable_progress_bar=False, enable_model_summary=True)
    line = next(line for line in out.splitlines() if "gr/grad_norm" in line)
    assert [float(x) for x in re.findall(r"\d+\.\d+", line)] == pytest.approx(
        [rows[0], rows[-1], min(rows), max(rows)], rel=1e-3
    )


NOT_ASKED = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "log_every_n_steps")


@pytest.mark.parametrize(
    ("callback", "options"),
    [
        (SAM(0.1, verbose=False), {}),
        (SAM(0.1), {"enable_progress_bar": False}),
        (SAM(0.1), {"barebones": True, **dict.fromkeys(NOT_ASKED)}),
    ],
)
def test_quiet(shown, callback, options):
    out = shown(callback, **options)
    assert "per regularized step" not in out
    assert "logged steps" not in out


def test_only_on_the_first_rank():
    bar = BARS["tqdm"]()
    for first in (True, False):
        assert shows(SimpleNamespace(callbacks=[bar], is_global_zero=first, barebones=False)) == first


def test_panel_and_table_of_repeated_runs_without_metrics(shown):
    callback = SAM(0.1, metrics=())
    for _ in range(2):
        out = shown(callback)
        assert out.count("per regularized step") == out.count("regularized: 6 of 6 steps") == 1


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_name_and_fits_80_columns(name, capsys):
    rule = METHODS[name].rule
    Console(width=80).print(make_panel(Summary(rule.name, {"gradient": f"g = {rule.equation}"})))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert re.sub(r"\s", "", rule.equation) in re.sub(r"[\s│]", "", out)
    assert any(word in out.splitlines()[0] for word in ("GR", "SAM"))


def test_a_custom_schedule_is_named(shown):
    class Late(SAM):
        def should_regularize(self, step):
            return step > 2

    out = shown(Late(0.1), module=TinyModule(mlp()))
    assert "by should_regularize(step)" in out
    assert "regularized: 3 of 6 steps" in out


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize(("stop", "shown_once"), [(KeyboardInterrupt, True), (ValueError, False)])
def test_the_table_is_also_shown_after_ctrl_c(bar, stop, shown_once, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    class Stops(TinyModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 5:
                raise stop

    callbacks = [GradientRegularization(0.1, 0.05), Flooding(100.0), BARS[bar]()]
    trainer = make_trainer(*callbacks, enable_progress_bar=True, max_epochs=3, log_every_n_steps=1)
    with pytest.raises(SystemExit if stop is KeyboardInterrupt else stop):
        trainer.fit(Stops(), make_loader())
    out = capsys.readouterr().out
    for line in ("logged steps", "regularized: 5 of 5 steps", "flooded: 5 of 5 losses below the level"):
        assert out.count(line) == shown_once
    if shown_once:
        assert out.index("logged steps") > out.rindex("Epoch")


@pytest.mark.parametrize("bar", BARS)
def test_flooding_alone(shown, bar):
    out = shown(Flooding(100.0), BARS[bar]())
    assert out.index("|L − b| + b") < out.index("Epoch")
    assert out.index("b = 100") < out.index("Epoch")
    assert out.index("flooded: 6 of 6 losses below the level") > out.rindex("Epoch")
    out = shown(Flooding(100.0, verbose=False), BARS[bar]())
    assert "flooded:" not in out
    assert "|L" not in out
