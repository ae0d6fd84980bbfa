"""A LightningCLI with a flag group for each method."""

import argparse
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_gr._compat import MisconfigurationException, has_base_named, namespace_of
from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME
from lightning_gr.report.console import complain, make_outputs_printable, printable

if TYPE_CHECKING:
    from lightning_gr._compat import AnyTrainer as Trainer

    LightningArgumentParser = Any
    _Base: Any  # which type checkers accept in programs of either namespace
else:
    _Base = object

__all__ = ["GradientRegularizationCLI", "lower_methods", "run"]


class GradientRegularizationCLI(_Base):  # type: ignore[misc]
    """A LightningCLI with flags (and YAML keys) ``gr``, ``sam``, ``msam`` and ``flooding`` that configure a method.

    ``--gr.gamma=0.1`` trains with :class:`~lightning_gr.GradientRegularization`, ``--sam.rho=0.05`` with
    :class:`~lightning_gr.SAM`, and ``--msam.rho=2`` with :class:`~lightning_gr.MomentumSAM`. ``--flooding.level=0.1``
    adds flooding, alone or combined with one of them. Omitted arguments keep their defaults; ``--gr={}`` uses only
    defaults. Without any of these flags, training is plain.

    Use or subclass it like LightningCLI. It supports both namespaces: an instance becomes a LightningCLI of
    ``lightning.pytorch`` if any class passed to it, or named on the command line or in its configuration file, comes
    from there, and of ``pytorch_lightning`` otherwise. To choose explicitly, inherit from both:
    ``class CLI(GradientRegularizationCLI, LightningCLI)``.

    An invalid value for a method exits with a one-line error and status 2.

    Args: See LightningCLI.

    Example::

        >>> from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel
        >>> flags = ["--gr.gamma=0.1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
        >>> cli = GradientRegularizationCLI(
        ...     BoringModel, BoringDataModule, args=flags, run=False, seed_everything_default=False
        ... )
        >>> cli.trainer.callbacks[0].rule
        GRRule(gamma=0.1, epsilon=0.05, scheme='forward', normalize=False)
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "GradientRegularizationCLI":
        """Append the LightningCLI of the right namespace to the bases, unless the class already inherits from one."""
        if any(base.__name__ == "LightningCLI" for base in cls.__mro__):
            made: GradientRegularizationCLI = super().__new__(cls)
            return made
        passed = [value for value in (*args, *kwargs.values()) if isinstance(value, type)]
        namespace = namespace_of(*passed, *_named_classes(kwargs.get("args")))
        lightning_cli = importlib.import_module(f"{namespace}.cli").LightningCLI
        bases, attributes = (cls, lightning_cli), {"__module__": cls.__module__, "__doc__": cls.__doc__}
        return object.__new__(type(cls.__name__, bases, attributes))

    def init_parser(self, **kwargs: Any) -> "LightningArgumentParser":
        """Make the parser report errors on one line."""
        parser = super().init_parser(**kwargs)
        # Lightning before 2.6 has no `parser_class` argument for this
        kind = type(parser)
        parser.__class__ = type(kind.__name__, (_OneLineErrors, kind), {"__module__": kind.__module__})
        return parser

    def add_default_arguments_to_parser(self, parser: "LightningArgumentParser") -> None:
        """Add the flags of each method, leaving `add_arguments_to_parser` for subclasses to override."""
        super().add_default_arguments_to_parser(parser)
        for key, kind in CALLBACKS_BY_NAME.items():
            summary = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
            flags = ", ".join(f"--{key}.{name}" for name in inspect.signature(kind).parameters)
            group = parser.add_argument_group(summary, f"To use it, set at least one of {flags}.")
            group.add_argument(f"--{key}", type=kind | None, default=None, help=f"See --{key}.help for each flag.")

    def instantiate_classes(self) -> None:
        """Validate the methods' arguments before creating anything else, which may take long."""
        self._check_methods()
        super().instantiate_classes()

    def _settings(self, config: Any) -> Any:
        return config[self.subcommand] if self.subcommand else config

    def _check_methods(self) -> None:
        settings = self._settings(self.config)
        self._check_exclusive(settings)
        callbacks = settings.get("trainer.callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        for key, config in [
            *((key, settings.get(key)) for key in CALLBACKS_BY_NAME),
            *(("trainer.callbacks", callback) for callback in callbacks),
        ]:
            kind = _BY_PATH.get(config.class_path) if config else None
            if kind is not None:
                try:
                    kind(**config.init_args)
                except ValueError as error:
                    self.parser.error(f"--{key}: {error}")

    def _check_exclusive(self, settings: Any) -> None:
        methods = [f"--{key}" for key in CALLBACKS_BY_NAME if key != "flooding" and settings.get(key)]
        if len(methods) > 1:
            self.parser.error(f"Expected at most one method besides flooding but got {' and '.join(methods)}: keep one")

    def instantiate_trainer(self, **kwargs: Any) -> "Trainer":
        """Prepend the requested methods to the Trainer's callbacks."""
        settings = self._settings(self.config_init)
        methods = [settings[key] for key in CALLBACKS_BY_NAME if settings.get(key) is not None]
        callbacks = kwargs.get("callbacks", settings.get("trainer.callbacks")) or []
        kwargs["callbacks"] = [*methods, *(callbacks if isinstance(callbacks, list) else [callbacks])]
        return super().instantiate_trainer(**kwargs)


def run(argv: Sequence[str] | None) -> int:
    """Run ``lightning-gr fit``, ``validate``, ``test`` or ``predict`` and return the exit code.

    What this package or Lightning itself refuses at the start of training, such as missing data, is reported on one
    line, like errors in the flags.
    """
    make_outputs_printable()
    if argv is None:
        sys.argv[1:] = lower_methods(sys.argv[1:])
    try:
        GradientRegularizationCLI(
            args=argv if argv is None else lower_methods(argv),
            parser_kwargs={"prog": "lightning-gr"},
            # without a logger all runs share a folder, and running `test` after `fit` must not fail
            save_config_kwargs={"overwrite": True},
        )
    except Exception as error:
        if not _is_one_line(error) or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        hint = ": give --data, or define it in the module" if "_dataloader` must be implemented" in str(error) else ""
        complain(f"lightning-gr: error: {' '.join(str(error).split())}{hint}")
        return 2
    return 0


def lower_methods(flags: Sequence[str]) -> list[str]:
    """Return ``flags`` with the names of methods in lower case: ``--SAM.rho=0.1`` is ``--sam.rho=0.1``."""
    names = "|".join(CALLBACKS_BY_NAME)
    return [re.sub(rf"^--({names})(?=[.=]|$)", lambda m: m[0].lower(), flag, flags=re.I) for flag in flags]


def _is_one_line(error: Exception) -> bool:
    """Whether an error is this package's, or Lightning's about how it is used, rather than the program's own."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    module = innermost.f_globals["__name__"]
    if module.startswith("lightning_gr."):
        return isinstance(error, (ValueError, MisconfigurationException))
    theirs = module.startswith(("pytorch_lightning.", "lightning.pytorch."))
    return theirs and has_base_named(error, "MisconfigurationException")


_BY_PATH = {
    f"{module}.{kind.__name__}": kind
    for kind in CALLBACKS_BY_NAME.values()
    for module in ("lightning_gr", kind.__module__)
}


class _OneLineErrors:
    """A parser mixin for short errors: without eighty lines of usage, and with one reason instead of one per type.

    Its help, which has Greek letters, is spelled as the output can encode it.
    """

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, printable on the current standard output."""
        return printable(super().format_help(*args, **kwargs))  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message, unless the parser is set not to exit."""
        parser: Any = self
        if not parser.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)  # type: ignore[misc]
        program = parser.prog.replace(" [options]", "")
        parser.exit(2, f"{program}: error: {_readable(message)}\n")
        raise AssertionError("exit returned")


# lines that the parser prints besides the actual reason; before version 4.52, None and paths came first
_ASIDES = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Problem with given class_path",
    "Expected a path but",
    "Expected a config path but",
    "Expected a <class 'NoneType'>",
)


def _readable(message: str) -> str:
    """Shorten an error about a flag to one line that begins with the flag.

    The parser gives a reason for each type that a value could have. The first one concerns the intended type.
    """
    keys: list[str] = []
    for line in map(str.strip, message.splitlines()):
        if line.startswith('Parser key "'):
            key, _, line = line.removeprefix('Parser key "').partition('":')
            keys.append(key)
        reason = line.strip().removeprefix("- ")
        if keys and reason and not reason.startswith(_ASIDES):
            _, found, given = message.rpartition("Given value: ")
            omit = not found or given.startswith("NestedArg(") or given.strip() in reason
            value = "" if omit else f", but got {given.strip()}"
            return f"--{'.'.join(keys)}: {reason}{value}"
    return " ".join(message.split())


def _named_classes(args: Any) -> Iterator[type]:
    """Find the classes set by ``--model`` and ``--data`` on the command line or in its configuration files."""
    if args is None or isinstance(args, Sequence):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-c", "--config", action="append", default=[])
        for key in ("model", "data"):
            parser.add_argument(f"--{key}", f"--{key}.class_path", dest=key)
        try:
            known, _ = parser.parse_known_args(args)
        except argparse.ArgumentError:  # a flag without its value, for example; the real parser reports it
            return
        settings = [vars(known), *(config for path in known.config for config in _read(path))]
    else:
        config = args if isinstance(args, dict) else args.as_dict()
        settings = [config, *(value for value in config.values() if isinstance(value, dict))]
    for setting in settings:
        for key in ("model", "data"):
            yield from _find_class(setting.get(key))


def _read(path: str) -> Iterator[dict[str, Any]]:
    """Yield the contents of a configuration file, followed by its section for each subcommand."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # the real parser reports it
        return
    if isinstance(config, dict):
        yield config
        yield from (value for value in config.values() if isinstance(value, dict))


def _find_class(setting: Any) -> Iterator[type]:
    path = setting.get("class_path") if hasattr(setting, "get") else setting
    if not isinstance(path, str) or "." not in path:
        return
    module, _, name = path.rpartition(".")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # the real parser reports it
        return
    if isinstance(value, type):
        yield value
