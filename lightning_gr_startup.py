"""Entry points that avoid importing the package, which takes seconds: the callback factory and the command line.

Lightning calls the callback factory for every Trainer in the environment. The command's help, version and argument
errors need neither torch nor Lightning.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["callbacks", "exit_on_interrupt", "main", "make_parser", "method_name"]

TRAINING = {
    "fit": "train any LightningModule, regularized by --gr.gamma, --sam.rho, --msam.rho, --flooding.level, ...",
    "validate": "evaluate it on the validation set",
    "test": "evaluate it on the test set",
    "predict": "compute its predictions",
    "tune": "find out which methods help on it, and with which constants",
}
INTERRUPTED = "lightning-gr: interrupted"
DEMO_NAMES = ("plain", "F-GR", "B-GR", "SAM", "MSAM", "flooding")
_NAMES = ("plain", "F-GR", "B-GR", "penalty", "SAM", "ASAM", "MSAM", "flooding")
_OTHER_NAMES = {"gr": "F-GR", "momentumsam": "MSAM", "momentum-sam": "MSAM"}


def method_name(text: str) -> str:
    """Return a method's name in its usual spelling, such as ``"SAM"`` for ``"sam"``; others are left as they are."""
    return ({name.lower(): name for name in _NAMES} | _OTHER_NAMES).get(text.lower(), text)


def callbacks() -> list[Any]:
    """Create the callbacks requested by the environment variable ``LIGHTNING_GR``; none if it is not set."""
    text = os.environ.get("LIGHTNING_GR", "").strip()
    if not text:
        return []
    from lightning_gr.cli.environment import RefusedError, callbacks_from

    try:
        return callbacks_from(text)
    except ValueError as error:
        raise RefusedError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning-gr`` and return the exit code."""
    command = next(iter(sys.argv[1:] if argv is None else argv), None)
    # LightningCLI parses the flags of the training commands
    args = argparse.Namespace(command=command) if command in TRAINING else make_parser().parse_args(argv)
    try:
        from lightning_gr.cli.main import run

        return run(args, argv)
    except KeyboardInterrupt:  # also while torch is imported, which takes seconds
        print(INTERRUPTED, file=sys.stderr)
        return 130


def exit_on_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A ``sys.excepthook`` for Ctrl-C before ``main`` runs, while ``python -m lightning_gr`` imports the package."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; LightningCLI has the flags of those that train."""
    parser = argparse.ArgumentParser(
        prog="lightning-gr", description="Flat minima for PyTorch Lightning: gradient regularization, SAM and flooding."
    )
    parser.add_argument("--version", action="version", version=f"lightning-gr {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, summary in TRAINING.items():
        commands.add_parser(name, help=summary, add_help=False)
    _add_completion(commands)
    _add_demo(commands)
    _add_plot(commands)
    return parser


def _version() -> str:
    """Read the version from the package's own file, since the metadata of an editable install may be outdated."""
    version: str = runpy.run_path(str(Path(__file__).parent / "lightning_gr" / "_version.py"))["__version__"]
    return version


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a shell script that completes commands and their flags",
        description="Print a shell completion script. Write it to a file (lightning-gr completion bash > FILE) and"
        " source that file.",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small classifier with each method and compare them",
        description="Train a small classifier on scikit-learn's digits (500 images, 20% of the labels random), without"
        " and with each method, and compare test accuracy, gradient norm and cost. Takes about two minutes on two"
        " cores.",
    )
    demo.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs per method (default: 3)")
    demo.add_argument("--epochs", type=_positive, default=60, metavar="N", help="epochs per run (default: 60)")
    demo.add_argument(
        "--methods",
        nargs="+",
        type=method_name,
        choices=DEMO_NAMES,
        default=list(DEMO_NAMES),
        metavar="NAME",
        help=f"methods to run: {', '.join(DEMO_NAMES)} (default: all)",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("outputs", "demo"),
        metavar="FOLDER",
        help="folder for the figure and the CSV file, created if missing (default: outputs/demo)",
    )


def _add_plot(commands: Any) -> None:
    plot = commands.add_parser(
        "plot",
        help="plot loss, gradient norm, sharpness and accuracy of runs",
        description="Plot whichever of loss, gradient norm, sharpness and accuracy one or more runs logged with"
        " CSVLogger or TensorBoardLogger.",
    )
    plot.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a folder such as lightning_logs/version_0, or a metrics.csv"
    )
    plot.add_argument(
        "--output",
        type=Path,
        default=Path("plot.png"),
        metavar="FILE",
        help="image file, in the format given by its suffix: png, svg, pdf, ... (default: plot.png)",
    )
    plot.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="plot these keys, one panel each")
    plot.add_argument("--names", nargs="+", default=[], metavar="NAME", help="names of the runs in the legend")
    plot.add_argument(
        "--smooth", type=_positive, default=1, metavar="N", help="moving average over N logged values (default: 1)"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number but got {text!r}")
    return int(text)
