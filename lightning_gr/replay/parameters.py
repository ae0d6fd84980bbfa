"""Finds the current parameters of a module, and searches it again only after a change."""

import operator
from itertools import chain

from torch import Tensor, nn

__all__ = ["Parameters"]

_CHILDREN, _PARAMETERS = operator.attrgetter("_modules"), operator.attrgetter("_parameters")
_VALUES = operator.methodcaller("values")


class Parameters:
    """Finds the parameters of a module and of all in it, once each.

    Unlike ``nn.Module.parameters``, it creates no names, and it searches the modules only if one of them has other
    children or parameters than the last time.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._found: list[Tensor] = []
        self._known: list[int] = []

    def of(self, module: nn.Module) -> list[Tensor]:
        """The current parameters of ``module``, which must be the same one in each call."""
        if not self._modules or self._look(module) != self._known:
            # without the module itself, so that a cache keyed by it does not keep it alive
            self._modules = _modules_in(module)
            found = chain.from_iterable(map(_VALUES, map(_PARAMETERS, [module, *self._modules])))
            self._found = list({id(param): param for param in found if param is not None}.values())
            self._known = self._look(module)
        return list(self._found)

    def _look(self, module: nn.Module) -> list[int]:
        modules = [module, *self._modules]
        tables = chain(map(_CHILDREN, modules), map(_PARAMETERS, modules))
        return list(map(id, chain.from_iterable(map(_VALUES, tables))))


def _modules_in(module: nn.Module) -> list[nn.Module]:
    seen, found = {id(module)}, [module]
    for each in found:
        for child in each._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found[1:]
