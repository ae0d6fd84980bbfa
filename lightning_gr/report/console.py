"""The one console of the package. What it prints never stops a training, whatever the standard output is.

Where the encoding has no Greek letters or math symbols, their names are printed. If the output is closed, missing or
full, a warning is issued instead.
"""

import codecs
import io
import sys
import warnings
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console

__all__ = ["complain", "make_console", "make_outputs_printable", "printable", "show", "write"]

_SPELLED = {
    "γ": "gamma", "ε": "epsilon", "ρ": "rho", "η": "eta", "θ": "theta", "λ": "lambda", "Σ": "sum", "∇": "grad ",
    "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "⊙": "*", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~",
    "‖": "||", "²": "^2", "₀": "_0", "ₖ": "_k", "…": ".", "’": "'", "•": "*",
}  # fmt: skip
_ERRORS = "lightning_gr.spelled"


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell out what an encoding lacks: an error handler for codecs. What has no name is escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (_SPELLED.get(each) or each.encode("ascii", "backslashreplace").decode("ascii") for each in lacking)
    return "".join(spelled), error.end


codecs.register_error(_ERRORS, _spell)


def printable(text: str) -> str:
    """Replace characters that standard output cannot encode, such as γ by ``gamma``. Call before aligning columns."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with suppress(LookupError):  # an encoding that Python does not know
        return text.encode(encoding, _ERRORS).decode(encoding)
    return text.encode("ascii", _ERRORS).decode("ascii")


def show(content: Any, **options: Any) -> None:
    """Print to the current standard output, which may have been redirected since the last call.

    Args:
        content: Text, or anything else that rich can print.
        options: Passed to rich's ``Console.print``.
    """
    try:
        make_console().print(content, **options)
    except Exception as error:
        _warn(error)


def make_console() -> Console:
    """Create a rich console for standard output; rich draws ASCII boxes if the encoding requires it."""
    # bypass rich's proxy, which would print into a live progress bar
    return Console(file=cast(IO[str], _Output(getattr(sys.stdout, "rich_proxied_file", sys.stdout))), highlight=False)


def write(text: str) -> None:
    """Write ``text`` to standard output as it is, without wrapping lines."""
    _Output(sys.stdout).write(text)


def complain(message: str) -> None:
    """Print a line to standard error, if there is one."""
    with suppress(Exception):
        if sys.stderr is not None:
            print(message, file=sys.stderr)


def make_outputs_printable() -> None:
    """Let everything that this process prints be spelled as by :func:`printable`, also what others print.

    For help texts and configurations, which argparse prints, and for Lightning's Rich progress bar.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors=_ERRORS)


class _Output:
    """A wrapper around a stream, or around None if the program has none, whose writes never raise."""

    def __init__(self, stream: Any) -> None:
        self.stream: Any = io.StringIO() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(printable(text))
        except Exception as error:  # of whatever kind: the stream may be a program's own
            _warn(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except Exception as error:
            _warn(error)


def _warn(error: Exception) -> None:
    # a warning is also printed, and may have been made an error
    with suppress(Exception):
        warnings.warn(f"lightning_gr could not print to standard output: {error}", stacklevel=2)
