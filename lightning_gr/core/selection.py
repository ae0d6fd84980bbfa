"""Selects the parameters that a method leaves alone, by name pattern or by the type of their layer."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["TYPE_PREFIX", "match_params"]

TYPE_PREFIX = "type:"


def match_params(patterns: Iterable[str], module: nn.Module) -> set[int]:
    """Return the ids of the parameters of ``module`` that one of ``patterns`` selects.

    Args:
        patterns: Shell-style patterns that must match the whole name of a parameter (one of its names, if it is tied),
            or ``"type:Embedding"`` for all parameters of layers with a class, or base class, of that name.
        module: The module.

    Raises:
        ValueError: If a pattern selects nothing.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 1), nn.LayerNorm(1))
        >>> match_params(["*.bias", "type:LayerNorm"], net) == {id(net[0].bias), id(net[1].weight), id(net[1].bias)}
        True
    """
    matched: set[int] = set()
    for pattern in patterns:
        of_type = pattern.startswith(TYPE_PREFIX)
        ids = _of_type(pattern.removeprefix(TYPE_PREFIX), module) if of_type else _named(pattern, module)
        if not ids:
            raise ValueError(_message(pattern, module))
        matched |= ids
    return matched


def _named(pattern: str, module: nn.Module) -> set[int]:
    named = module.named_parameters(remove_duplicate=False)
    return {id(param) for name, param in named if fnmatchcase(name, pattern)}


def _of_type(name: str, module: nn.Module) -> set[int]:
    layers = [layer for layer in module.modules() if any(cls.__name__ == name for cls in type(layer).__mro__)]
    return {id(param) for layer in layers for param in layer.parameters()}


def _message(pattern: str, module: nn.Module) -> str:
    if pattern.startswith(TYPE_PREFIX):
        types = sorted({type(each).__name__ for each in module.modules() if any(True for _ in each.parameters(False))})
        return (
            f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches no layer with parameters;"
            f" their types are {', '.join(types)}"
        )
    named = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    some = ", ".join(named[:4]) + (", …" if len(named) > 4 else "")
    return (
        f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches none of {some};"
        " patterns are shell-style and must match the whole name, as in '*.bias' or 'encoder.*', or name a type of"
        " layer, as in 'type:LayerNorm'"
    )
