"""Which parameters a method leaves alone, by patterns over their names."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor

__all__ = ["match_names"]


def match_names(patterns: Iterable[str], named: Iterable[tuple[str, Tensor]]) -> set[int]:
    """The ids of the parameters whose name (any of its names, if tied) matches one of ``patterns``.

    Args:
        patterns: Shell-style, over whole names.
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
    found: set[int] = set()
    for pattern in patterns:
        ids = {id(param) for name, param in named if fnmatchcase(name, pattern)}
        if not ids:
            some = ", ".join(name for name, _ in named[:4]) + (", …" if len(named) > 4 else "")
            raise ValueError(
                f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches none of {some};"
                " patterns are shell-style over whole names, as in '*.bias' or 'encoder.*'"
            )
        found |= ids
    return found
