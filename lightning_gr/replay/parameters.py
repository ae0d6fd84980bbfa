"""The parameters of a module, as of now."""

import operator
from itertools import chain

from torch import Tensor, nn

__all__ = ["Parameters"]

_CHILDREN, _PARAMETERS = operator.attrgetter("_modules"), operator.attrgetter("_parameters")
_VALUES = operator.methodcaller("values")


class Parameters:
    """Finds the parameters of a module and of all in it, once each.

    ``nn.Module.parameters`` makes a name for each of them. This goes through the modules only if one of them has other
    children or parameters than the last time.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._found: list[Tensor] = []
        self._known: list[int] = []

    def of(self, module: nn.Module) -> list[Tensor]:
        """The parameters now. ``module`` is to be the same one each time."""
        if not self._modules or self._look(module) != self._known:
            # not the module itself, which whoever remembers its parameters wants to be freed
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
