"""The command ``lightning-gr``."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_gr._version import __version__

__all__ = ["main"]

TRAINING = {
    "fit": "train any LightningModule, regularized by --gr.gamma, --sam.rho, --flooding.level, ...",
    "validate": "evaluate it on the validation set",
    "test": "evaluate it on the test set",
    "predict": "let it predict",
}
DEMO_METHODS = ("plain", "F-GR", "B-GR", "SAM", "flooding")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if next(iter(sys.argv[1:] if argv is None else argv), None) in TRAINING:
        return _train(argv)
    args = _parser().parse_args(argv)
    run: int = args.run(args)
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-gr", description="Flat minima for PyTorch Lightning: gradient regularization, SAM and flooding."
    )
    parser.add_argument("--version", action="version", version=f"lightning-gr {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in TRAINING.items():  # listed here, parsed by LightningCLI
        commands.add_parser(name, help=summary, add_help=False)
    completion = commands.add_parser(
        "completion",
        help="print a script for the shell that completes the flags of fit, validate, test and predict",
        description="Print a script that completes flags: lightning-gr completion bash > FILE, then source it.",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=_completion)
    demo = commands.add_parser(
        "demo",
        help="train a small classifier with each method and compare them",
        description="Train a small classifier on scikit-learn's digits (500 images, 20 %% of their labels random) plain"
        " and with each method, and compare test accuracy, gradient norm and cost. About two minutes on two cores.",
    )
    demo.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of each method (default: 3)")
    demo.add_argument("--epochs", type=_positive, default=60, metavar="N", help="epochs of each run (default: 60)")
    demo.add_argument(
        "--methods",
        nargs="+",
        choices=DEMO_METHODS,
        default=list(DEMO_METHODS),
        metavar="NAME",
        help=f"some of {', '.join(DEMO_METHODS)} (default: all)",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("outputs", "demo"),
        metavar="FOLDER",
        help="where the figure and the CSV file go; made if need be (default: outputs/demo)",
    )
    demo.set_defaults(run=_demo)
    _add_plot(commands)
    return parser


def _add_plot(commands: Any) -> None:
    plot = commands.add_parser(
        "plot",
        help="draw loss, gradient norm, sharpness and accuracy of runs",
        description="Draw loss, gradient norm, sharpness and accuracy of one or several runs, as far as they logged"
        " them, from what CSVLogger or TensorBoardLogger wrote.",
    )
    plot.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a folder such as lightning_logs/version_0, or a metrics.csv"
    )
    plot.add_argument(
        "--output",
        type=Path,
        default=Path("plot.png"),
        metavar="FILE",
        help="the picture, in the format of its suffix: png, svg, pdf, … (default: plot.png)",
    )
    plot.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="draw these keys, one picture for each")
    plot.add_argument("--names", nargs="+", default=[], metavar="NAME", help="what the legend calls the runs")
    plot.add_argument(
        "--smooth", type=_positive, default=1, metavar="N", help="draw the mean over N logged values (default: 1)"
    )
    plot.set_defaults(run=_plot)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number but got {text!r}")
    return int(text)


def _fail(message: str) -> int:
    print(f"lightning-gr: error: {message}", file=sys.stderr)
    return 2


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _train(argv: Sequence[str] | None) -> int:
    if missing := _missing("jsonargparse", "docstring_parser"):
        return _fail(f"training from the command line needs {' and '.join(missing)}: pip install 'lightning_gr[cli]'")
    # as with `python -m`: --model may name a class in a file of this folder
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from lightning_gr.cli.lightning_cli import run

    return run(argv)


def _completion(args: argparse.Namespace) -> int:
    if missing := _missing("jsonargparse", "docstring_parser", "shtab"):
        return _fail(f"completion needs {' and '.join(missing)}: pip install 'lightning_gr[cli]'")
    from lightning_gr.cli.lightning_cli import print_completion

    print_completion(args.shell)
    return 0


def _demo(args: argparse.Namespace) -> int:
    if missing := _missing("sklearn", "matplotlib"):
        return _fail(f"the demo needs {' and '.join(missing)}: pip install 'lightning_gr[demo]'")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(f"cannot write to the folder {args.output}: {error.strerror}")
    # what needs an extra is imported only where it is known to be there
    from lightning_gr.cli.demo.run import run_demo

    return run_demo(list(dict.fromkeys(args.methods)), args.seeds, args.epochs, args.output)


def _plot(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        return _fail("plots need matplotlib: pip install 'lightning_gr[plot]'")
    from lightning_gr.report.plotting import PlotError, run_plot

    try:
        run_plot(args.runs, args.output, args.keys, args.names, args.smooth)
    except PlotError as error:
        return _fail(str(error))
    print(f"Figure: {args.output}")
    return 0
