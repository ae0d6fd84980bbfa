"""What is trained: makes a module, its data and a Trainer for each training, apart from the user's own runs."""

import copy
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from lightning_gr._compat import has_base_named, namespace_of
from lightning_gr.tune.ranks import is_rank_zero
from lightning_gr.tune.space import TuneError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Built", "Functions", "Program", "own_flags"]


@dataclass(frozen=True)
class Built:
    """A Trainer, a module, and the data and further arguments of ``Trainer.fit`` and ``Trainer.test``."""

    trainer: "Trainer"
    module: "LightningModule"
    fit: dict[str, Any]
    test: dict[str, Any]


class Program(Protocol):
    """Makes everything for one training, from the start each time."""

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes this study from others, by name."""

    def build(self, callbacks: Sequence[Any], folder: Path, **flags: Any) -> Built:
        """Make a Trainer with these callbacks first, whose files go into ``folder``, and a module with its data."""


def own_flags(
    flags: Mapping[str, Any], kind: type, callbacks: Sequence[Any], folder: Path, **more: Any
) -> dict[str, Any]:
    """The user's Trainer flags for a trial: its own logger and folder, no checkpoints, no bars.

    A CSVLogger takes the place of the user's loggers, so that callbacks that need one work. Without a logger, there is
    none.

    Args:
        flags: The user's flags, with the callbacks as instances.
        kind: The class of the module, which decides on the namespace.
        callbacks: Callbacks to put first.
        folder: The folder of this training, which is emptied.
        more: Further flags, which take precedence.
    """
    if is_rank_zero():
        shutil.rmtree(folder, ignore_errors=True)
    users = flags.get("callbacks") or []
    users = users if isinstance(users, list) else [users]
    kept = [c for c in users if not has_base_named(c, "Checkpoint", "ProgressBar", "ModelSummary")]
    logger: Any = False
    if flags.get("logger") is not False:
        loggers = importlib.import_module(f"{namespace_of(kind)}.loggers")
        logger = loggers.CSVLogger(str(folder), name="", version="")
    off = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    own = {"callbacks": [*callbacks, *kept], "logger": logger, "default_root_dir": str(folder)}
    return {**flags, **off, **own, **more}


@dataclass
class Functions:
    """A program from functions in Python.

    Args:
        make_module: Makes a new module.
        make_data: Makes its data: a LightningDataModule, or the loaders for training, validation and, optionally, test.
            None uses the module's own loaders.
        flags: The Trainer's arguments. Callbacks are copied for each training.
    """

    make_module: Callable[[], Any]
    make_data: Callable[[], Any] | None
    flags: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("make_module", self.make_module), ("make_data", self.make_data)):
            missing = name == "make_data" and value is None
            # a module is callable as well, but would be trained again and again
            if (not callable(value) or isinstance(value, nn.Module)) and not missing:
                raise TuneError(f"expected `{name}` to be a function that makes one for each training, got {value!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """The names of the functions, and the Trainer's arguments."""
        flags = {f"trainer.{name}": repr(value) for name, value in self.flags.items() if name != "callbacks"}
        return {"make_module": _name(self.make_module), "make_data": _name(self.make_data), **flags}

    def build(self, callbacks: Sequence[Any], folder: Path, **flags: Any) -> Built:
        """See :class:`Program`."""
        module = self.make_module()
        data = None if self.make_data is None else self.make_data()
        trainer = importlib.import_module(namespace_of(type(module))).Trainer
        mine = {**self.flags, "callbacks": copy.deepcopy(self.flags.get("callbacks"))}
        built = trainer(**own_flags(mine, type(module), callbacks, folder, **flags))
        return Built(built, module, *_data(data))


def _name(function: Any) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return "" if function is None else f"{kind.__module__}.{kind.__qualname__}"


def _data(data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if data is None:
        return {}, {}
    if isinstance(data, (tuple, list)):
        names = ("train_dataloaders", "val_dataloaders")
        return dict(zip(names, data, strict=False)), {"dataloaders": data[2]} if len(data) > 2 else {}
    if has_base_named(data, "LightningDataModule"):
        return {"datamodule": data}, {"datamodule": data}
    return {"train_dataloaders": data}, {}
