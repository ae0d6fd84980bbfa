"""Imports both namespaces of Lightning so that a program that uses one, or imports it later, sees no difference.

Our classes inherit from those of ``pytorch_lightning`` and of ``lightning.pytorch``, so both are needed. But an import
of either changes the whole program: the logger and the warning category of lightning_utilities, which they share,
filters and the format of warnings, an environment variable, and loggers of its own. So what nobody has imported before
is hidden from ``sys.modules`` again and its effects are undone. They take place when somebody imports it.
"""

import importlib
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_utilities.core import rank_zero

__all__ = ["import_namespaces"]

# in the order in which they are imported: the second one needs the first one
_ROOTS = ("lightning_fabric", "pytorch_lightning", "lightning")
_NEEDS = {"pytorch_lightning": "lightning_fabric"}
_SETTINGS: tuple[tuple[Any, str], ...] = (
    (rank_zero, "log"),
    (rank_zero, "rank_zero_deprecation_category"),
    (warnings, "formatwarning"),
)


def import_namespaces() -> list[ModuleType]:
    """``pytorch_lightning`` and, if installed, ``lightning.pytorch``."""
    if importlib.util.find_spec("lightning") is None:
        return [importlib.import_module("pytorch_lightning")]
    numbers = random.getstate()  # which something that Lightning imports draws from
    hidden = [_Hidden(root) for root in _ROOTS if root not in sys.modules]
    modules = [importlib.import_module(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    random.setstate(numbers)
    if hidden:
        sys.meta_path.insert(0, _Finder(hidden))
    return modules


class _Hidden:
    """A package that nobody else has imported so far, and what its import changes in a program."""

    def __init__(self, root: str) -> None:
        self.root = root
        settings = [getattr(owner, name) for owner, name in _SETTINGS]
        environment, loggers = dict(os.environ), _loggers(root)
        with warnings.catch_warnings():
            known = list(warnings.filters)
            self.module = importlib.import_module(root)
            new = _added(list(warnings.filters), known)
        # those of libraries that were imported on the way stay
        self._filters = [each for each in new if each[2].__module__.partition(".")[0] in ("builtins", *_ROOTS)]
        _add_filters([each for each in new if each not in self._filters])
        self._settings = [getattr(owner, name) for owner, name in _SETTINGS]
        self._environment = {name: value for name, value in os.environ.items() if environment.get(name) != value}
        self._loggers = {name: state for name, state in _loggers(root).items() if loggers.get(name) != state}
        self._undo(settings, environment)

    def _undo(self, settings: Sequence[Any], environment: dict[str, str]) -> None:
        self._changed = [now is not before for now, before in zip(self._settings, settings, strict=True)]
        for (owner, name), before in zip(_SETTINGS, settings, strict=True):
            setattr(owner, name, before)
        for name in self._environment:
            os.environ.pop(name)
            os.environ.update({key: value for key, value in environment.items() if key == name})
        for name, (_, handlers, _) in self._loggers.items():
            logger = logging.getLogger(name)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
            for handler in handlers:
                logger.removeHandler(handler)

    def hide(self) -> None:
        """Take it and what is in it out of ``sys.modules``."""
        inside = [name for name in sys.modules if f"{name}.".startswith(f"{self.root}.")]
        self._modules = {name: sys.modules.pop(name) for name in inside}

    def reveal(self) -> ModuleType:
        """Put it back there, and let its import have the effects that it has."""
        if self.root in _NEEDS:
            importlib.import_module(_NEEDS[self.root])
        sys.modules.update(self._modules)
        for (owner, name), value, changed in zip(_SETTINGS, self._settings, self._changed, strict=True):
            if changed:
                setattr(owner, name, value)
        os.environ.update(self._environment)
        _add_filters(self._filters)
        for name, (level, handlers, propagate) in self._loggers.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            # Lightning's own condition
            if propagate or not logging.getLogger().hasHandlers():
                logger.propagate = propagate
                for handler in handlers:
                    logger.addHandler(handler)
        return self.module


def _loggers(root: str) -> dict[str, tuple[int, list[logging.Handler], bool]]:
    known = logging.root.manager.loggerDict
    mine = [known[name] for name in list(known) if f"{name}.".startswith(f"{root}.")]
    return {
        each.name: (each.level, each.handlers[:], each.propagate) for each in mine if isinstance(each, logging.Logger)
    }


def _added(now: list[Any], before: list[Any]) -> list[Any]:
    """Those that were put in front, also if they were there already further behind."""
    return next(
        now[:count]
        for count in range(len(now) + 1)
        if now[count:] == [each for each in before if each not in now[:count]]
    )


def _add_filters(filters: Sequence[Any]) -> None:
    for action, message, category, module, lineno in reversed(filters):
        warnings.filterwarnings(action, _pattern(message), category, _pattern(module), lineno)


def _pattern(expression: Any) -> str:
    return "" if expression is None else str(getattr(expression, "pattern", expression))


class _Finder(MetaPathFinder, Loader):
    """Gives a hidden package back to whoever imports it, or something in it."""

    def __init__(self, hidden: Sequence[_Hidden]) -> None:
        self._hidden = {each.root: each for each in hidden}
        self._specs = {each.root: each.module.__spec__ for each in hidden}
        for each in hidden:
            each.hide()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The specification of a hidden package; None for all others."""
        original = self._specs.get(fullname)
        if original is None or fullname not in self._hidden:
            return None
        spec = ModuleSpec(fullname, self, origin=original.origin, is_package=True)
        spec.submodule_search_locations = original.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The package itself, which is not run again."""
        found = self._hidden.pop(spec.name).reveal()
        if not self._hidden and self in sys.meta_path:
            sys.meta_path.remove(self)
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is, with its own specification."""
        module.__spec__ = self._specs[module.__name__]
