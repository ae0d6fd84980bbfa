"""Plots of runs written by real loggers, and the command."""

import os
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
from modules import TinyModule, fit

from lightning_gr import SAM, GradientRegularization, SharpnessMonitor
from lightning_gr.cli import main as cli
from lightning_gr.report.plotting import COLORS, Run, draw_runs, read_run

EXAMPLES = Path(__file__).parents[2] / "examples"
# a warning of TensorBoard's dependencies
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Logs(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        self.log("train_acc", (self.net(batch[0]).argmax(1) == batch[1]).double().mean())
        return loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, each written by both loggers."""
    folder = tmp_path_factory.mktemp("runs")
    for name, callback in {"F-GR": GradientRegularization(0.1, 0.1), "SAM": SAM(0.2)}.items():
        loggers = [
            pl.loggers.CSVLogger(folder, f"{name}/csv"),
            pl.loggers.TensorBoardLogger(folder, f"{name}/tensorboard"),
        ]
        fit(Logs(), callback, SharpnessMonitor(samples=2), logger=loggers, log_every_n_steps=1, max_epochs=4)
    return folder


def test_both_loggers_give_the_same_curves(folder):
    by_csv, by_tensorboard = (read_run(folder / "SAM" / kind) for kind in ("csv", "tensorboard"))
    keys = {"train_loss", "train_acc", "gr/grad_norm", "gr/sharpness", "gr/penalty"}
    assert by_csv.curves.keys() == keys | {f"hessian/{name}" for name in ("eigenvalue", "trace", "trace_error")}
    assert by_tensorboard.curves.keys() == by_csv.curves.keys()
    for key, (steps, values) in by_csv.curves.items():
        assert by_tensorboard.curves[key][0] == steps
        assert by_tensorboard.curves[key][1] == pytest.approx(values, rel=1e-6)
    assert by_csv.curves["gr/grad_norm"][0] == list(range(12))
    assert by_csv.curves["hessian/trace"][0] == [2, 5, 8, 11]


def test_content_of_the_figure(folder):
    runs = [read_run(folder / name / "csv") for name in ("F-GR", "SAM")]
    figure = draw_runs(runs)
    pictures = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert list(pictures) == [
        "Loss",
        "Gradient norm",
        "Sharpness",
        "Largest eigenvalue",
        "Trace of the Hessian",
        "Accuracy",
    ]
    for axes in pictures.values():
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel()
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [run.name for run in runs]
        assert [line.get_color() for line in axes.lines] == list(COLORS[:2])
    for run, line in zip(runs, pictures["Gradient norm"].lines, strict=True):
        assert [list(axis) for axis in line.get_data()] == list(run.curves["gr/grad_norm"])
    smooth = draw_runs(runs[:1], keys=["train_loss"], smooth=3).axes[0]
    values = runs[0].curves["train_loss"][1]
    assert smooth.lines[1].get_ydata()[5] == pytest.approx(sum(values[4:7]) / 3)
    assert [text.get_text() for text in smooth.get_legend().get_texts()] == ["train_loss"]


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["--output", "a/plot.png"], b"\x89PNG"),
        (["--output", "b.svg", "--keys", "gr/penalty", "--smooth", "2"], b"<?xml"),
        (["--output", "c.pdf", "--names", "one", "two"], b"%PDF"),
    ],
)
def test_command(folder, flags, start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(folder / "F-GR" / "csv" / "version_0"), str(folder / "SAM" / "tensorboard")]
    assert cli.main(["plot", *runs, *flags]) == 0
    assert (tmp_path / flags[1]).read_bytes().startswith(start)
    assert capsys.readouterr().out == f"Figure: {flags[1]}\n"


@pytest.mark.parametrize(
    ("key", "title", "unit"),
    [
        ("gr/curvature", "Curvature along ∇L", "∇Lᵀ H ∇L / ‖∇L‖² (loss per unit of θ²)"),
        ("hessian/eigenvalue", "Largest eigenvalue", "eigenvalue of H (loss per unit of θ²)"),
        ("hessian/trace", "Trace of the Hessian", "tr H (loss per unit of θ²)"),
        ("gr/sharpness", "Sharpness", "L(θ + s d) − L(θ) (loss)"),
        ("gr/loss_perturbed", "Loss", "loss"),
        ("optimizer_0/grad_norm", "Gradient norm", "‖∇L‖ (loss per unit of θ)"),
    ],
)
def test_each_quantity_has_its_own_panel_with_a_unit(key, title, unit):
    others = {"loss": ([0.0], [1.0]), "gr/curvature": ([0.0], [2.0]), "hessian/eigenvalue": ([0.0], [3.0])}
    figure = draw_runs([Run("run", {**others, key: ([0.0, 1.0], [0.5, 0.25])})])
    (axes,) = [axes for axes in figure.axes if any(list(line.get_ydata()) == [0.5, 0.25] for line in axes.lines)]
    assert (axes.get_title(), axes.get_ylabel()) == (title, unit)


def test_runs_are_named_by_the_differing_parts_of_their_paths(folder, tmp_path):
    from lightning_gr.report.plotting import _label

    def named(*paths):
        return [run.name for run in _label([read_run(folder / path) for path in paths])]

    assert named("SAM/csv/version_0", "F-GR/csv/version_0") == ["SAM", "F-GR"]
    assert named("SAM/csv", "SAM/tensorboard") == ["csv", "tensorboard"]
    assert named("SAM/csv", "F-GR/tensorboard/version_0") == ["SAM/csv", "F-GR/tensorboard/version_0"]
    one = folder / "SAM" / "csv" / "version_0" / "metrics.csv"
    assert read_run(one).curves == read_run(one.parent).curves
    newer = folder / "SAM" / "csv" / "version_1"
    newer.mkdir()
    (newer / "metrics.csv").write_text("step,loss\n3,1.5\n")
    os.utime(newer / "metrics.csv", (2e9, 2e9))
    assert read_run(folder / "SAM" / "csv").curves == {"loss": ([3.0], [1.5])}
    (newer / "metrics.csv").unlink()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["{}/nothing"], "nothing does not exist: give a CSVLogger or TensorBoard folder"),
        (["{}/empty"], "empty contains neither a metrics.csv nor TensorBoard event files"),
        (["{}/SAM/csv", "--keys", "x"], "no run has x: choose from gr/grad_norm, gr/penalty"),
        (["{}/odd.csv"], "found no loss, .* only odd: choose with --keys"),
        (["{}/SAM/csv", "--output", "{}/plot.exe"], "cannot write plot.exe: use one of the suffixes .*png"),
        (["{}/SAM/csv", "--output", "{}/odd.csv/plot.png"], "cannot write .*plot.png: "),
        (["{}/SAM/csv", "--names", "a", "b"], r"expected as many names as runs \(1\) but got 2"),
    ],
)
def test_wrong_use_ends_with_one_line(folder, flags, said, capsys):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "odd.csv").write_text("step,odd\n0,1\n")
    assert cli.main(["plot", *(flag.format(folder) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(said, error)


@pytest.mark.parametrize("name", ["matplotlib", "tensorboard"])
def test_a_missing_extra_is_named(folder, name, capsys, monkeypatch, tmp_path):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    kind = "tensorboard" if name == "tensorboard" else "csv"
    assert cli.main(["plot", str(folder / "SAM" / kind), "--output", str(tmp_path / "x.png")]) == 2
    assert f"{name}: pip install 'lightning_gr[plot]'" in capsys.readouterr().err


@pytest.mark.slow
def test_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import see_it

    monkeypatch.setattr(see_it, "METHODS", {name: see_it.METHODS[name] for name in ("F-GR",)})
    see_it.main(5, tmp_path)
    assert "regularized: 40 of 40 steps" in capsys.readouterr().out
    for name in ("runs.png", "slices.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    for name in see_it.METHODS:
        assert {"train_loss", "test_acc", "gr/grad_norm", "hessian/eigenvalue"} <= read_run(
            tmp_path / name
        ).curves.keys()
