"""Selects the parameters that a method leaves alone, by name pattern."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor

__all__ = ["match_names"]


def match_names(patterns: Iterable[str], named: Iterable[tuple[str, Tensor]]) -> set[int]:
    """Return the ids of the parameters with a name that matches one of ``patterns``; tied parameters have several.

    Args:
        patterns: Shell-style patterns that must match the whole name.
        named: ``module.named_parameters(remove_duplicate=False)``.

    Raises:
        ValueError: If a pattern matches no name.

    Example::

        >>> from torch import nn
        >>> net = nn.Linear(2, 1)
        >>> match_names(["*bias"], net.named_parameters()) == {id(net.bias)}
        True
    """
    named = list(named)
    matched: set[int] = set()
    for pattern in patterns:
        ids = {id(param) for name, param in named if fnmatchcase(name, pattern)}
        if not ids:
            some = ", ".join(name for name, _ in named[:4]) + (", …" if len(named) > 4 else "")
            raise ValueError(
                f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches none of {some};"
                " patterns are shell-style and must match the whole name, as in '*.bias' or 'encoder.*'"
            )
        matched |= ids
    return matched
