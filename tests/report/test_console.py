"""Outputs with other encodings or widths, and outputs that are closed, full, missing or not a terminal."""

import io
import os
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from modules import METHODS, TinyModule, make_loader, make_trainer

from lightning_gr import Flooding, GradientRegularization
from lightning_gr.report.console import complain, make_console, make_outputs_printable, printable, show
from lightning_gr.report.display import Summary, make_panel


def redirected(monkeypatch, encoding, columns=80):
    """Replace standard output by one with another encoding; return a function that reads what was written."""
    monkeypatch.setenv("COLUMNS", str(columns))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))

    def written():
        sys.stdout.flush()
        return raw.getvalue().decode(encoding)

    return written


def train_a_little(*callbacks):
    # this summary uses the log, while those of rich and progress bars print directly
    summary = pl.callbacks.ModelSummary()
    trainer = make_trainer(*callbacks, summary, enable_model_summary=True, log_every_n_steps=1)
    trainer.fit(TinyModule(), make_loader())
    assert trainer.global_step == 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("columns", [40, 80])
def test_each_encoding_and_width(encoding, columns, monkeypatch):
    written = redirected(monkeypatch, encoding, columns)
    train_a_little(GradientRegularization(0.1, 0.05), Flooding(100.0))
    out = written()
    assert "?" not in out
    assert max(map(len, out.splitlines())) <= columns
    framed = {len(line) for line in out.splitlines() if line.startswith(("|", "+", "│", "╭", "╰"))}
    assert len(framed) <= 2  # a panel and a table, each with aligned borders
    for letter, name in (("γ = 0.1", "gamma = 0.1"), ("∇L(θ)", "grad L(theta)"), ("╭", "+-")):
        assert (letter if encoding == "utf-8" else name) in re.sub(r"\s+", " ", out)


@pytest.mark.parametrize("callback", [GradientRegularization(0.1, 0.05, verbose=False), Flooding(100.0)])
def test_lightning_s_rich_bar_does_not_stop_training(callback, monkeypatch):
    """Lightning uses it if rich is installed, which this package requires; without our callback it fails here."""
    written = redirected(monkeypatch, "ascii")
    bar = pl.callbacks.RichProgressBar()
    trainer = make_trainer(callback, bar, enable_progress_bar=True)
    trainer.fit(TinyModule(), make_loader())
    assert trainer.global_step == 3
    assert "3/3 0:00:0" in written()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", METHODS)
def test_all_letters_of_all_methods_have_an_ascii_spelling(name, encoding, monkeypatch):
    written = redirected(monkeypatch, encoding)
    rule = METHODS[name].rule
    lines = {"gradient": rule.equation, "constants": " ".join(rule.constants)}
    show(make_panel(Summary(rule.name, lines)))
    assert "?" not in written()


def test_other_characters_are_escaped(monkeypatch):
    written = redirected(monkeypatch, "ascii")
    show("weights γ of 模")
    assert written() == "weights gamma of \\u6a21\n"
    assert printable("ascii only") == "ascii only"


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def full():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"), encoding="utf-8", write_through=True)


def broken():
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(io.FileIO(writer, "w"), encoding="utf-8", write_through=True)


@pytest.mark.parametrize("output", [closed, full, broken])
def test_warns_if_the_output_fails(output, monkeypatch):
    stream = output()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.warns(UserWarning, match="lightning_gr could not print to standard output: "):
        train_a_little(GradientRegularization(0.1, 0.05))
    with suppress(OSError):  # closing flushes again
        stream.close()


def test_a_program_without_an_output_trains(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    train_a_little(GradientRegularization(0.1, 0.05))


def test_the_console_bypasses_the_proxy_of_a_live_bar(monkeypatch):
    behind = io.StringIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(rich_proxied_file=behind, encoding="utf-8"))
    make_console().print("text")
    assert behind.getvalue() == "text\n"


class Tee:
    """A custom output without `flush` and encoding."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text


class Refuses(Tee):
    def write(self, text):
        raise RuntimeError("refused")


@pytest.mark.parametrize("output", [Tee, Refuses])
def test_a_custom_output_does_not_stop_training(output, monkeypatch):
    stream = output()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.warns(UserWarning, match="could not print to standard output: "):
        train_a_little(GradientRegularization(0.1, 0.05))
    assert ("regularized: 3 of 3 steps" in stream.written) == (output is Tee)


@pytest.mark.parametrize("output", [closed, full, broken])
def test_a_failing_output_never_raises_even_if_warnings_cannot_be_shown(output, monkeypatch):
    stream = output()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", closed())
    # like `warnings` with a closed standard error
    monkeypatch.setattr(warnings, "showwarning", lambda *args: sys.stderr.write("text"))
    for action in ("error", "always"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            show("text")
        complain("text")
    with suppress(OSError):
        stream.close()


def test_warns_if_content_cannot_be_printed(monkeypatch):
    class Broken:
        def __rich__(self):
            raise RuntimeError("broken")

    with pytest.warns(UserWarning, match="could not print to standard output: broken"):
        show(Broken())


def test_an_unknown_encoding_is_treated_as_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="klingon"))
    assert printable("γ = 1") == "gamma = 1"


def test_surrogates_of_a_path_are_escaped(monkeypatch):
    written = redirected(monkeypatch, "utf-8")
    show("name\udcff", markup=False)
    assert written() == "name\\udcff\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_of_others_is_spelled_in_our_command(encoding, monkeypatch):
    written = redirected(monkeypatch, encoding)
    make_outputs_printable()
    print("γ ≥ 0")
    assert written() == ("γ ≥ 0\n" if encoding == "utf-8" else "gamma >= 0\n")


# run in a terminal or not, with or without NO_COLOR
PROGRAM = """
import warnings
warnings.simplefilter("ignore")
from lightning_gr.report.console import make_console
from lightning_gr.report.display import Summary, make_panel
make_console().print(make_panel(Summary("F-GR", {"constants": "γ = 0.1"})), style="red")
"""


@pytest.mark.launch
@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("no_color", [True, False])
def test_in_a_terminal(columns, no_color):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    environment = {key: value for key, value in environment.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"NO_COLOR": "1"} if no_color else {}
    try:
        subprocess.run([sys.executable, "-c", PROGRAM], stdout=theirs, env=environment, timeout=120, check=True)
        said = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    lines = re.sub("\x1b\\[[0-9;]*m", "", said).splitlines()
    assert max(map(len, lines)) <= columns
    assert "γ = 0.1" in said
    assert "\x1b[1m" in said or "\x1b[1;" in said  # bold text is not a color
    assert bool(re.search(r"\x1b\[([0-9]+;)*31m", said)) != no_color


@pytest.mark.launch
def test_no_terminal_means_no_colors():
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "TERM": "xterm"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=120, check=True
    )
    assert b"\x1b" not in ended.stdout
    assert "gamma = 0.1" in ended.stdout.decode("cp1252")
