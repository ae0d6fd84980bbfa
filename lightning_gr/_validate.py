"""Validates arguments. Each error states, on one line, what was expected and what was given."""

import math
from collections.abc import Iterable, Sequence

__all__ = ["check_bool", "check_choice", "check_exclude", "check_int", "check_level", "check_number"]


def check_number(name: str, value: object, *, positive: bool) -> None:
    """Require a finite, non-negative (or ``positive``) number; a bool, such as YAML's ``yes``, is rejected."""
    allowed = "a positive float" if positive else "a non-negative float"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (positive and value == 0):  # type: ignore[operator,arg-type]
        raise ValueError(f"Expected argument `{name}` to be {allowed} but got {value!r}")


def check_int(name: str, value: object, *, minimum: int) -> None:
    """Require an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"Expected argument `{name}` to be an integer of at least {minimum} but got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Require True or False, since a string such as ``"false"`` would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"Expected argument `{name}` to be True or False but got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected argument `{name}` to be one of {allowed} but got {value!r}")


def check_level(level: object) -> None:
    """Require a non-negative number as the flood level."""
    check_number("level", level, positive=False)


def check_exclude(exclude: object) -> tuple[str, ...]:
    """Convert ``exclude`` to a tuple of patterns; reject a bare string, which would iterate over its characters."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise ValueError(f"Expected argument `exclude` to be a list of patterns such as ['*.bias'] but got {exclude!r}")
    patterns = tuple(exclude)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Expected argument `exclude` to be a list of strings but got {exclude!r}")
    return patterns
