"""Writes a callback as the call that creates it."""

import inspect
from typing import Any

__all__ = ["as_typed"]

# the attributes in which a callback keeps arguments together
_PARTS = ("rule", "schedule", "counter")
_UNKNOWN = object()


def as_typed(callback: object) -> str:
    """Write ``callback`` as one would type it: its constants, and all other arguments that are not at their defaults.

    Constants are the arguments that may be positional, except for switches. An argument that cannot be found, such as
    one that a subclass does not keep, is left out.

    Example::

        >>> from lightning_gr import SAM
        >>> SAM(0.1, exclude=["*.bias"])
        SAM(rho=0.1, exclude=('*.bias',))
    """
    written = []
    for parameter in _parameters(type(callback)).values():
        value = _value_of(parameter.name, callback)
        constant = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not isinstance(value, bool)
        if value is not _UNKNOWN and (constant or value != parameter.default):
            written.append(f"{parameter.name}={value!r}")
    return f"{type(callback).__name__}({', '.join(written)})"


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor; where it passes on ``**kwargs``, also those of the next one."""
    found: dict[str, inspect.Parameter] = {}
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            found |= {each.name: each for each in parameters if each.kind not in variable and each.name not in found}
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    return found


def _value_of(name: str, callback: object) -> Any:
    own = vars(callback)
    for key in (name, f"_{name}"):
        if key in own:
            return own[key]
    parts = (own[part] for part in _PARTS if part in own)
    return next((getattr(part, name) for part in parts if hasattr(part, name)), _UNKNOWN)
