"""Selects the parameters that a method leaves alone, by name pattern or by the type of their layer."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_gr._fsdp1 import own_names

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
    found = set()
    for name, param in module.named_parameters(remove_duplicate=False):
        matches = [fnmatchcase(each, pattern) for each in own_names(name, param)]
        if any(matches):
            _check_whole(pattern, matches)
            found.add(id(param))
    return found


def _check_whole(pattern: str, matches: Sequence[bool]) -> None:
    if not all(matches):
        raise ValueError(
            "Expected each pattern in `exclude` to select all parameters of a unit of FSDP, which flattens them into"
            f" one with `use_orig_params=False`, but {pattern!r} selects {sum(matches)} of {len(matches)}: leave"
            " `use_orig_params` True, its default"
        )


def _of_type(name: str, module: nn.Module) -> set[int]:
    layers = [layer for layer in module.modules() if any(cls.__name__ == name for cls in type(layer).__mro__)]
    found = {id(param) for layer in layers for param in layer.parameters()}
    if any(hasattr(param, "_fqns") for param in module.parameters()):
        raise ValueError(
            f"Expected patterns in `exclude` to be names and not types of layers, such as 'type:{name}', with"
            " `use_orig_params=False`, where FSDP flattens several layers into one: leave it True, its default"
        )
    return found


def _message(pattern: str, module: nn.Module) -> str:
    if pattern.startswith(TYPE_PREFIX):
        types = sorted({type(each).__name__ for each in module.modules() if any(True for _ in each.parameters(False))})
        return (
            f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches no layer with parameters;"
            f" their types are {', '.join(types)}"
        )
    named = [each for name, p in module.named_parameters(remove_duplicate=False) for each in own_names(name, p)]
    some = ", ".join(named[:4]) + (", …" if len(named) > 4 else "")
    return (
        f"Expected each pattern in `exclude` to match a parameter but {pattern!r} matches none of {some};"
        " patterns are shell-style and must match the whole name, as in '*.bias' or 'encoder.*', or name a type of"
        " layer, as in 'type:LayerNorm'"
    )
