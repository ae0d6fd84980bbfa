"""Runs the commands of ``lightning-gr``, which ``lightning_gr_startup`` parses without importing the package."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from lightning_gr.report.console import complain, show, write
from lightning_gr_startup import TRAINING, main

__all__ = ["main", "run"]


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run a command and return the exit code.

    Args:
        args: The command and its parsed arguments.
        argv: The command line, which LightningCLI parses itself. None means ``sys.argv``.
    """
    if args.command == "tune":
        return _tune(argv)
    if args.command in TRAINING:
        return _train(argv)
    return {"completion": _completion, "demo": _demo, "plot": _plot}[args.command](args)


def _fail(message: str) -> int:
    complain(f"lightning-gr: error: {message}")
    return 2


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _train(argv: Sequence[str] | None) -> int:
    if missing := _missing("jsonargparse", "docstring_parser"):
        return _fail(f"training from the command line needs {' and '.join(missing)}: pip install 'lightning_gr[cli]'")
    _find_files_here()
    from lightning_gr.cli.lightning_cli import run as run_lightning_cli

    return run_lightning_cli(argv)


def _tune(argv: Sequence[str] | None) -> int:
    if missing := _missing("optuna", "matplotlib", "jsonargparse", "docstring_parser"):
        return _fail(f"tuning needs {' and '.join(missing)}: pip install 'lightning_gr[tune]'")
    _find_files_here()
    from lightning_gr.cli.tune import run_tune

    return run_tune(argv)


def _find_files_here() -> None:
    """As with `python -m`, so that --model can name a class in a file in this folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _completion(args: argparse.Namespace) -> int:
    if missing := _missing("jsonargparse", "docstring_parser", "shtab"):
        return _fail(f"completion needs {' and '.join(missing)}: pip install 'lightning_gr[cli]'")
    from lightning_gr.cli.completion import completion_script

    write(completion_script(args.shell))
    return 0


def _demo(args: argparse.Namespace) -> int:
    if missing := _missing("sklearn", "matplotlib"):
        return _fail(f"the demo needs {' and '.join(missing)}: pip install 'lightning_gr[demo]'")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(f"cannot write to the folder {args.output}: {error.strerror}")
    # imported only now that the extra is known to be installed
    from lightning_gr.cli.demo.run import run_demo

    return run_demo(list(dict.fromkeys(args.methods)), args.seeds, args.epochs, args.output)


def _plot(args: argparse.Namespace) -> int:
    if _missing("matplotlib"):
        return _fail("plots need matplotlib: pip install 'lightning_gr[plot]'")
    from lightning_gr.report.plotting import PlotError, run_plot

    try:
        run_plot(args.runs, args.output, args.keys, args.names, args.smooth)
    except PlotError as error:
        return _fail(str(error))
    show(f"Figure: {args.output}", markup=False, soft_wrap=True)
    return 0
