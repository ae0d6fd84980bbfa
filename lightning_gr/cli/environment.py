"""Adds callbacks without code changes, through the environment variable ``LIGHTNING_GR``."""

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_gr._compat import CallbackBase, MisconfigurationException
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME, METHODS_BY_NAME
from lightning_gr.callbacks.flooding import Flooding
from lightning_gr.core.selection import match_params
from lightning_gr_startup import method_name

if TYPE_CHECKING:
    from lightning_gr._compat import AnyModule as LightningModule
    from lightning_gr._compat import AnyTrainer as Trainer

__all__ = ["FromEnvironment", "RefusedError", "callbacks_from"]

_USAGE = "for example LIGHTNING_GR='gamma=0.05,epsilon=0.05', 'sam,rho=0.1' or 'gr,gamma=0.1; flooding,level=0.1'"


class RefusedError(SystemExit, ValueError):
    """Raised if ``LIGHTNING_GR`` cannot be followed.

    Whoever set the variable may not know the program, so it ends with the message alone, without a traceback, unless it
    handles a ValueError.
    """


def callbacks_from(text: str) -> list["FromEnvironment"]:
    """Create the callbacks described by a value of ``LIGHTNING_GR``.

    Separate methods with semicolons. A method is a name in upper or lower case, ``gr`` (the default), ``b-gr``,
    ``penalty``, ``sam``, ``asam``, ``msam`` or ``flooding``, followed by settings ``argument=value``, separated by
    commas or spaces. The arguments are those of the callback. Separate multiple ``exclude`` patterns with ``|``. ``0``
    and ``off`` disable the variable.

    Raises:
        ValueError: If the text cannot be parsed, a value is out of range, or a method is given twice.

    Example::

        >>> [sam, flooding] = callbacks_from("sam,rho=0.1,exclude=*.bias|*norm*; flooding,level=0.2")
        >>> sam.callback.rule, sam.callback.exclude, flooding.callback.level
        (SAMRule(rho=0.1, adaptive=False, eta=0.0), ('*.bias', '*norm*'), 0.2)
    """
    if text.lower() in ("0", "off"):
        return []
    methods = [_method(part) for part in text.split(";") if part.strip()]
    for kind, what in ((TwoPass, "one method besides flooding"), (Flooding, "one flood level")):
        if sum(isinstance(method, kind) for method in methods) > 1:
            raise ValueError(f"Expected LIGHTNING_GR to request at most {what} but got {text!r}, {_USAGE}")
    return [FromEnvironment(method) for method in methods]


def _method(text: str) -> TwoPass | Flooding:
    words = text.replace(",", " ").split()
    name = words.pop(0) if "=" not in words[0] else "gr"
    key, fixed = METHODS_BY_NAME.get(method_name(name), (name, {}))
    if name.lower() in CALLBACKS_BY_NAME:
        key, fixed = name.lower(), {}
    if key not in CALLBACKS_BY_NAME:
        known_names = ", ".join(dict.fromkeys((*CALLBACKS_BY_NAME, *(n.lower() for n in METHODS_BY_NAME))))
        raise ValueError(f"Expected LIGHTNING_GR to name one of {known_names} but got {name!r}, {_USAGE}")
    kind, settings = CALLBACKS_BY_NAME[key], dict(fixed)
    known = {name: each for name, each in inspect.signature(kind).parameters.items() if name not in fixed}
    for word in words:
        argument, equals, value = word.partition("=")
        if not equals or argument not in known:
            raise ValueError(
                f"Expected LIGHTNING_GR to set only {', '.join(known)} for {name!r} but got {word!r}, {_USAGE}"
            )
        settings[argument] = _convert(known[argument].annotation, argument, value)
    try:
        callback: TwoPass | Flooding = kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"In LIGHTNING_GR: {error}, {_USAGE}") from None
    return callback


def _convert(annotation: Any, key: str, value: str) -> Any:
    """Convert a value to the type in the callback's signature."""
    if typing.get_origin(annotation) is Sequence:
        return value.split("|")
    if annotation is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    try:
        if annotation in (int, float):
            convert: Callable[[str], Any] = annotation
            return convert(value)
        if float in typing.get_args(annotation):  # a number, or several
            numbers = tuple(map(float, value.split("|")))
            return numbers if len(numbers) > 1 else numbers[0]
    except ValueError:
        pass  # the callback reports it
    return value


class FromEnvironment(CallbackBase):  # type: ignore[misc]
    """Adds a method to the Trainer when training begins, unless the script already has one of that kind.

    Args:
        callback: The method's callback.
    """

    def __init__(self, callback: TwoPass | Flooding) -> None:
        super().__init__()
        self.callback = callback

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Insert the method's callback right after this one, so that Lightning sets it up next."""
        callbacks: list[Any] = trainer.callbacks
        if stage != "fit" or self.callback in callbacks:
            return
        kind = Flooding if isinstance(self.callback, Flooding) else TwoPass
        names = [type(callback).__name__ for callback in callbacks if isinstance(callback, kind)]
        if names:
            rank_zero_warn(
                f"LIGHTNING_GR requests {_describe(self.callback)}, but the script's own {names[0]} takes precedence"
            )
            return
        with self._refusing():
            self.callback.setup(trainer, pl_module, stage)  # as Lightning does next
        callbacks.insert(callbacks.index(self) + 1, self.callback)
        rank_zero_info(f"LIGHTNING_GR is set: training with {_describe(self.callback)}")

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Look for the excluded parameters, as the callback does next."""
        if isinstance(self.callback, TwoPass) and self.callback in trainer.callbacks:
            with self._refusing():
                match_params(self.callback.exclude, pl_module)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Let errors name the variable."""
        try:
            yield
        except (MisconfigurationException, ValueError) as error:
            raise RefusedError(f"LIGHTNING_GR requests {self.callback!r}, but: {error}") from None


def _describe(callback: TwoPass | Flooding) -> str:
    """Describe a method and its constants for log messages."""
    return repr(callback) if isinstance(callback, Flooding) else f"{callback!r}, g = {callback.rule.equation}"
