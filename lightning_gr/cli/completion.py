"""Makes the script that completes the command line in a shell, for all commands with their own flags."""

import argparse
import inspect
from pathlib import Path
from typing import Any

import shtab

from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME
from lightning_gr.cli.lightning_cli import GradientRegularizationCLI
from lightning_gr_startup import make_parser

__all__ = ["completion_script"]


def completion_script(shell: str) -> str:
    """Return the script for ``shell``: bash, zsh or tcsh."""
    parser = make_parser()
    commands = _commands(parser)
    training = _commands(_parser_of(GradientRegularizationCLI))
    for name, flags in {**training, **_tune()}.items():
        _add_flags(commands[name], flags)
    for each in commands.values():
        for action in each._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, found as shtab itself finds them."""
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


def _tune() -> dict[str, argparse.ArgumentParser]:
    """The parser of ``tune``, which needs Optuna to run; without it, its name alone is completed."""
    try:
        from lightning_gr.cli.tune import TuneCLI
    except ModuleNotFoundError:
        return {}
    return {"tune": _parser_of(TuneCLI, run=False)}


class _Parsed(Exception):  # noqa: N818, not an error
    """Carries the parser out of LightningCLI, instead of an instance that trains."""


def _parser_of(kind: type, **options: Any) -> argparse.ArgumentParser:
    """The parser of a LightningCLI, which is created with ``options`` but parses nothing."""

    def stop(self: Any, parser: argparse.ArgumentParser, args: Any) -> None:
        raise _Parsed(parser)

    try:
        type(kind.__name__, (kind,), {"parse_arguments": stop})(**options)
    except _Parsed as parsed:
        parser: argparse.ArgumentParser = parsed.args[0]
        return parser
    raise AssertionError(f"{kind.__name__} has not parsed its arguments")


def _add_flags(command: argparse.ArgumentParser, training: argparse.ArgumentParser) -> None:
    """Give a command the flags of LightningCLI's parser, and those of the methods, which that parser adds when used."""
    for action in training._actions:
        # the forms that append to a list, such as --trainer.callbacks+, are no flags of their own to complete
        names = [name for name in action.option_strings if not name.endswith("+")]
        if names and action.help != argparse.SUPPRESS:
            takes_file = action.dest == "config"
            command.add_argument(*names, dest=names[-1], help=_first_line(action), type=Path if takes_file else str)
    for key, kind in CALLBACKS_BY_NAME.items():
        for name, parameter in inspect.signature(kind).parameters.items():
            switch = ("true", "false") if parameter.annotation is bool else None
            command.add_argument(f"--{key}.{name}", choices=switch, help=f"{name} of {kind.__name__}")


def _first_line(action: argparse.Action) -> str:
    return (action.help or "").partition("\n")[0].partition("%(")[0].replace("%", "%%").strip()
