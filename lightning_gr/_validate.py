"""Validates arguments. Each error states, on one line, what was expected and what was given."""

import math
from collections.abc import Iterable, Sequence

__all__ = [
    "GradientClip",
    "check_bool",
    "check_choice",
    "check_exclude",
    "check_gradient_clip",
    "check_int",
    "check_level",
    "check_number",
]


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


GradientClip = float | tuple[float, float]


def check_gradient_clip(clip: object) -> tuple[float, float] | None:
    """Return ``clip`` as the norms of the first and of the further gradients; one number stands for both."""
    if clip is None:
        return None
    both = tuple(clip) if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(both) != 2:
        raise ValueError(f"Expected argument `gradient_clip` to be a positive float or two of them but got {clip!r}")
    for value in both:
        check_number("gradient_clip", value, positive=True)
    return float(both[0]), float(both[1])


def check_exclude(exclude: object) -> tuple[str, ...]:
    """Convert ``exclude`` to a tuple of patterns; reject a bare string, which would iterate over its characters."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise ValueError(f"Expected argument `exclude` to be a list of patterns such as ['*.bias'] but got {exclude!r}")
    patterns = tuple(exclude)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Expected argument `exclude` to be a list of strings but got {exclude!r}")
    return patterns
