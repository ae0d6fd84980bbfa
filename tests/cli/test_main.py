"""The command line: help, version and wrong use."""

import importlib.util
import os
import re
import signal
import subprocess
import sys

import pytest

import lightning_gr_startup
from lightning_gr import __version__
from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME, METHODS_BY_NAME
from lightning_gr.cli import main as cli
from lightning_gr.cli.demo.task import DEMO_METHODS


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", "0"], "expected a positive whole number but got '0'"),
        (["--epochs", "many"], "expected a positive whole number but got 'many'"),
        (["--methods", "Adam"], "invalid choice: 'Adam'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_wrong_flags_end_with_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]


@pytest.mark.parametrize("name", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_named_before_anything_runs(name, capsys, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    assert cli.main(["demo", "--output", str(tmp_path / "folder")]) == 2
    assert f"needs {name}: pip install 'lightning_gr[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_created(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file" / "folder")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.launch
def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "lightning_gr", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == f"lightning-gr {__version__}"


def test_the_flag_has_the_methods_of_the_demonstration():
    assert list(DEMO_METHODS) == list(lightning_gr_startup.DEMO_NAMES)


def test_help_texts_have_no_unformatted_placeholders():
    parser = lightning_gr_startup.make_parser()
    (commands,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for each in (parser, *commands.values()):
        assert not re.search(r"%%|%\(|\{\w*\}", each.format_help().replace("{bash,zsh,tcsh}", "")), each.prog
    assert "20% of the labels" in " ".join(commands["demo"].format_help().split())


@pytest.mark.parametrize("name", DEMO_METHODS)
def test_methods_are_named_in_any_case(name):
    for spelled in (name.lower(), name.upper()):
        assert lightning_gr_startup.make_parser().parse_args(["demo", "--methods", spelled]).methods == [name]
    assert lightning_gr_startup.make_parser().parse_args(["demo", "--methods", "gr"]).methods == ["F-GR"]


def test_all_commands_know_the_same_names():
    assert [lightning_gr_startup.method_name(name.lower()) for name in METHODS_BY_NAME] == list(METHODS_BY_NAME)
    assert set(lightning_gr_startup.DEMO_NAMES) - {"plain"} <= set(METHODS_BY_NAME)
    assert {key for key, _ in METHODS_BY_NAME.values()} == set(CALLBACKS_BY_NAME)


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background does not have
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
"""
MAIN = """
from lightning_gr_startup import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.launch
@pytest.mark.parametrize("flags", [["demo"], ["fit"], ["plot", "run"]])
def test_ctrl_c_while_torch_is_imported(flags):
    command = [sys.executable, "-c", IMPORTING + MAIN, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "lightning-gr: interrupted\n")


@pytest.mark.launch
def test_ctrl_c_while_python_m_imports_the_package(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(IMPORTING)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "lightning_gr", "demo"]
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    # there is no `main` yet that could return 130, so Python ends by the signal, which shells report as 130
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "lightning-gr: interrupted\n")
