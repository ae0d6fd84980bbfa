"""The methods that can be compared, the constants that are searched for each, and how their callbacks are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME, METHODS_BY_NAME
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr_startup import method_name

__all__ = ["DEFAULT_METHODS", "METHODS", "PLAIN", "Constants", "Method", "TuneError", "check_methods", "rounded"]

PLAIN = "plain"
Constants = dict[str, float]


class TuneError(Exception):
    """A request that cannot be carried out. Its message is one line that says what to do."""


@dataclass(frozen=True)
class Method:
    """A method with constants to choose.

    Args:
        name: Its name in tables and on the command line.
        key: Its key in :data:`~lightning_gr.callbacks.by_name.CALLBACKS_BY_NAME`, in flags and in YAML.
        constants: The names of the constants. The first one is swept by the range test.
        fixed: Further arguments of the callback that make it this method.
    """

    name: str
    key: str
    constants: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, constants: Constants, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The arguments of the callback: the user's settings, then what makes it this method, then its constants."""
        return {**(settings or {}), **self.fixed, **constants}

    def callback(self, constants: Constants, settings: Mapping[str, Any] | None = None) -> Any:
        """Make the callback for a trial, which prints and logs nothing unless the settings ask for metrics."""
        arguments = {"metrics": (), **self.arguments(constants, settings), "verbose": False}
        return CALLBACKS_BY_NAME[self.key](**arguments)

    def at_scale(self, scale: float) -> Constants:
        """All constants at one multiple of their natural scale: γ = ε is SAM without normalization."""
        return dict.fromkeys(self.constants, scale)

    @property
    def perturbs(self) -> bool:
        """Whether the method evaluates the loss at displaced weights."""
        return CALLBACKS_BY_NAME[self.key] is not Flooding


_CONSTANTS = {"gr": ("epsilon", "gamma"), "sam": ("rho",), "msam": ("rho",), "flooding": ("level",)}
METHODS = {
    name: Method(name, key, _CONSTANTS[key], fixed)
    for name, (key, fixed) in ((name.replace("MSAM", "MomentumSAM"), how) for name, how in METHODS_BY_NAME.items())
}
DEFAULT_METHODS = (PLAIN, "F-GR", "SAM", "MomentumSAM", "flooding")


def check_methods(names: Any) -> list[Method]:
    """Return the methods to search, without plain training, which has nothing to choose and is always compared.

    Names are those of the other commands, in any case: ``sam``, ``MSAM`` and ``Momentum-SAM`` are known as well.

    Raises:
        TuneError: If a name is unknown, or there is no method besides plain training.
    """
    known = [PLAIN, *METHODS]
    spelled = {method_name(name): name for name in known}
    given = names if isinstance(names, (list, tuple)) else [names]
    chosen = list(
        dict.fromkeys(spelled.get(method_name(name), name) if isinstance(name, str) else name for name in given)
    )
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise TuneError(f"unknown method {unknown[0]!r}: choose from {', '.join(known)}")
    methods = [METHODS[name] for name in chosen if name != PLAIN]
    if not methods:
        raise TuneError(f"expected at least one method besides {PLAIN}: choose from {', '.join(METHODS)}")
    return methods


def rounded(value: float) -> float:
    """Two significant digits, so that the constant that is printed is the one that was used."""
    return float(f"{value:.2g}")
