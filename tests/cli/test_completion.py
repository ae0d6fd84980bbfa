"""The completion scripts: what a shell offers at each position."""

import inspect
import shutil
import subprocess
import sys

import pytest

from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME
from lightning_gr_startup import TRAINING, make_parser

pytestmark = pytest.mark.launch
COMMANDS = [*TRAINING, "completion", "demo", "plot"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The script for each shell, printed by a separate process as for a user."""
    folder = tmp_path_factory.mktemp("scripts")
    code = "import sys; from lightning_gr.cli import main; main.main(['completion', sys.argv[1]])"
    made = {}
    for shell in ("bash", "zsh", "tcsh"):
        command = [sys.executable, "-W", "ignore", "-c", code, shell]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, cwd=folder)
        made[shell] = ended.stdout
    return made


def offered(script, folder, *words):
    """Return what bash offers for the last of ``words``."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    (folder / "script").write_text(script)
    quoted = " ".join(f"'{word}'" for word in ("lightning-gr", *words))
    code = (
        f"source ./script; COMP_WORDS=({quoted}); COMP_CWORD={len(words)};"
        ' _shtab_lightning_gr; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout.split()


def test_commands(scripts, tmp_path):
    found = offered(scripts["bash"], tmp_path, "")
    assert {word for word in found if not word.startswith("-")} == set(COMMANDS)
    flags = {word for word in offered(scripts["bash"], tmp_path, "-") if word.startswith("-")}
    assert flags == {"-h", "--help", "--version"}
    assert offered(scripts["bash"], tmp_path, "d") == ["demo"]
    assert offered(scripts["bash"], tmp_path, "completion", "z") == ["zsh"]


@pytest.mark.parametrize("command", ["demo", "plot"])
def test_flags_of_commands_that_do_not_train(command, scripts, tmp_path):
    (commands,) = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    flags = {flag for action in commands[command]._actions for flag in action.option_strings}
    assert set(offered(scripts["bash"], tmp_path, command, "-")) == flags


@pytest.mark.parametrize("key", CALLBACKS_BY_NAME)
def test_flags_of_each_method(key, scripts, tmp_path):
    parameters = inspect.signature(CALLBACKS_BY_NAME[key]).parameters
    expected = {f"--{key}.{name}" for name in (*parameters, "help")}
    for command in TRAINING:
        assert set(offered(scripts["bash"], tmp_path, command, f"--{key}.")) == expected


def test_flags_of_training(scripts, tmp_path):
    found = set(offered(scripts["bash"], tmp_path, "fit", "--"))
    assert {"--config", "--model", "--data", "--trainer.max_epochs", "--ckpt_path", "--print_config"} <= found
    assert not [flag for flag in found if flag.startswith(("--print_shtab", "--print_completion"))]
    assert {"--monitor", "--trials", "--storage", "--model"} <= set(offered(scripts["bash"], tmp_path, "tune", "--"))
    # no flags of default classes, which may not be the ones that are used
    assert {flag for flag in found if flag.startswith(("--model.", "--data."))} == {"--model.help", "--data.help"}
    assert set(offered(scripts["bash"], tmp_path, "fit", "--sam.adaptive", "")) == {"true", "false"}
    (tmp_path / "config.yaml").write_text("")
    assert offered(scripts["bash"], tmp_path, "fit", "--config", "conf") == ["config.yaml"]
    assert offered(scripts["bash"], tmp_path, "demo", "--methods", "S") == ["SAM"]


def test_every_shell_has_every_command(scripts):
    for script in scripts.values():
        assert [name for name in COMMANDS if name not in script] == []
        assert "gr.gamma" in script
