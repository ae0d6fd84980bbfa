"""What runs before the package is imported, which takes seconds: Lightning's question for callbacks, and the command.

Lightning asks for callbacks at the start of every Trainer, whoever wrote the script, and the command's help, version
and wrong arguments need neither torch nor Lightning.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["callbacks", "main"]

TRAINING = {
    "fit": "train any LightningModule, regularized by --gr.gamma, --sam.rho, --flooding.level, ...",
    "validate": "evaluate it on the validation set",
    "test": "evaluate it on the test set",
    "predict": "compute its predictions",
}
DEMO_NAMES = ("plain", "F-GR", "B-GR", "SAM", "flooding")


def callbacks() -> list[Any]:
    """The callbacks that the environment variable ``LIGHTNING_GR`` asks for; none where it is not set."""
    text = os.environ.get("LIGHTNING_GR", "").strip()
    if not text:
        return []
    from lightning_gr.cli.environment import callbacks_from

    return callbacks_from(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning-gr``; returns the exit code."""
    command = next(iter(sys.argv[1:] if argv is None else argv), None)
    # LightningCLI parses the flags of these
    args = argparse.Namespace(command=command) if command in TRAINING else _parser().parse_args(argv)
    from lightning_gr.cli.main import run

    return run(args, argv)


def _parser() -> argparse.ArgumentParser:
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
    """The version as the package's own file gives it; metadata of an editable installation may be older."""
    found: str = runpy.run_path(str(Path(__file__).parent / "lightning_gr" / "_version.py"))["__version__"]
    return found


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script for the shell that completes the flags of fit, validate, test and predict",
        description="Print a script that completes flags: lightning-gr completion bash > FILE, then source it.",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _add_demo(commands: Any) -> None:
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
        choices=DEMO_NAMES,
        default=list(DEMO_NAMES),
        metavar="NAME",
        help=f"some of {', '.join(DEMO_NAMES)} (default: all)",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("outputs", "demo"),
        metavar="FOLDER",
        help="where the figure and the CSV file go; created if missing (default: outputs/demo)",
    )


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
        help="the picture, in the format of its suffix: png, svg, pdf, ... (default: plot.png)",
    )
    plot.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="draw these keys, one picture for each")
    plot.add_argument("--names", nargs="+", default=[], metavar="NAME", help="what the legend calls the runs")
    plot.add_argument(
        "--smooth", type=_positive, default=1, metavar="N", help="draw the mean over N logged values (default: 1)"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number but got {text!r}")
    return int(text)
