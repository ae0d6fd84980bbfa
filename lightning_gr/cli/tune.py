"""``lightning-gr tune``: the flags of ``lightning-gr fit``, and what is to be compared."""

import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME
from lightning_gr.cli.lightning_cli import GradientRegularizationCLI
from lightning_gr.report.console import complain, make_console, make_outputs_printable, printable
from lightning_gr.tune.answer import TuneResult, make_tables
from lightning_gr.tune.plan import Plan
from lightning_gr.tune.program import Built, own_flags
from lightning_gr.tune.ranks import is_rank_zero
from lightning_gr.tune.search import run
from lightning_gr.tune.space import DEFAULT_METHODS, METHODS, PLAIN, TuneError
from lightning_gr.tune.trial import Interrupted, quiet

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser

__all__ = ["TuneCLI", "run_tune"]

# flags that may differ between two calls that go on with one study
_FREE = ("methods", "trials", "seeds", "max_time", "storage", "study", "output", "test")
_OWN = ("monitor", "mode", "range_steps", *_FREE)


class TuneCLI(GradientRegularizationCLI):
    """A LightningCLI that makes the module, its data and its Trainer again for each training of a study.

    Args: See LightningCLI.
    """

    def add_default_arguments_to_parser(self, parser: "LightningArgumentParser") -> None:
        """Add the flags of the study, and those of ``Trainer.fit``."""
        super().add_default_arguments_to_parser(parser)
        add: Any = parser.add_argument_group("What to compare, and how", "").add_argument
        add("--monitor", type=str, default=None, help="Key of the validation metric, such as val_loss. Required.")
        add("--mode", type=str | None, default=None, help="max or min; may be left out for common names.")
        names = ", ".join([PLAIN, *METHODS])
        add("--methods", type=str, nargs="+", default=list(DEFAULT_METHODS), help=f"Methods to compare: {names}.")
        add("--trials", type=int, default=10, help="Trials for each method; plain training has nothing to choose.")
        add("--seeds", type=int, default=3, help="Final trainings of each method and of plain training.")
        add("--max_time", type=str | None, default=None, help="When to end: HH:MM:SS, DD:HH:MM:SS or seconds.")
        add("--storage", type=str | None, default=None, help="Optuna storage: database URL or journal file.")
        add("--study", type=str, default="tune", help="Name of the study in the storage.")
        add("--output", type=str, default=str(Path("outputs", "tune")), help="Folder for all files.")
        add("--test", action="store_true", help="Whether to evaluate the test set at the end.")
        add("--range_steps", type=int, default=100, help="Optimizer steps of each training of the range test.")
        skip: Any = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        self._fit_arguments: list[str] = parser.add_method_arguments(_class_of(self.trainer_class), "fit", skip=skip)

    def instantiate_classes(self) -> None:
        """Only check the methods' arguments: everything is made again for each training."""
        self._check_methods()

    def _check_exclusive(self, settings: Any) -> None:
        """Several methods may have settings here."""

    def _dump(self) -> dict[str, Any]:
        import yaml

        text = self.parser.dump(self.config, skip_none=False)
        content: dict[str, Any] = yaml.safe_load(text)
        return content

    def plan(self) -> Plan:
        """What is to be searched.

        Raises:
            TuneError: If a flag is wrong.
        """
        self._config = self._dump()
        own = {name: self._config.pop(name, None) for name in _OWN}
        settings = {}
        for key in CALLBACKS_BY_NAME:
            given = self._config.pop(key, None)
            if given is not None:
                settings[key] = _changed(key, given.get("init_args", given))
        seed = self._config.get("seed_everything")
        if own["monitor"] is None:
            raise TuneError("--monitor is required: the key of a validation metric, such as --monitor val_loss")
        seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else 0
        return Plan.checked(**own, settings=settings, seed=seed, config=self._config)

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes this study from others: all flags of ``fit``."""
        return {f"--{name}": value for name, value in _flat(self._config) if name != "seed_everything"}

    def build(self, callbacks: Sequence[Any], folder: Path, **flags: Any) -> Built:
        """See :class:`~lightning_gr.tune.program.Program`."""
        config = self.config.clone()
        for key in CALLBACKS_BY_NAME:
            config[key] = None
        without_logger = config.trainer.logger is False
        config.trainer.logger = None  # it may connect to a server as soon as it is made
        self.config_init = self.parser.instantiate_classes(config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self._add_configure_optimizers_method_to_model(None)
        users = dict(self.config_init["trainer"])
        if without_logger:
            users["logger"] = False
        mine = own_flags(users, type(self.model), callbacks, folder, **flags)
        trainer = self.instantiate_trainer(**mine)
        fit = {name: self.config_init[name] for name in self._fit_arguments}
        data = {} if self.datamodule is None else {"datamodule": self.datamodule}
        return Built(trainer, self.model, {**fit, **data}, data)


def _class_of(trainer: Any) -> type:
    if isinstance(trainer, type):
        return trainer
    from jsonargparse.typing import class_from_function

    made: type = class_from_function(trainer)
    return made


def _changed(key: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that differ from their defaults; the others are those of each method."""
    defaults = {name: p.default for name, p in inspect.signature(CALLBACKS_BY_NAME[key]).parameters.items()}
    given = {n: v for n, v in arguments.items() if not _same(v, defaults.get(n, inspect.Parameter.empty))}
    return {name: value for name, value in given.items() if name != "verbose"}


def _same(value: Any, default: Any) -> bool:
    return bool(value == default) or (isinstance(value, list) and tuple(value) == default)


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(config, dict) and config:
        return [pair for name, value in config.items() for pair in _flat(value, f"{prefix}{name}.")]
    return [(prefix.rstrip("."), config)]


def run_tune(argv: Sequence[str] | None) -> int:
    """Run ``lightning-gr tune`` and return the exit code, 130 after Ctrl-C.

    Args:
        argv: The command line, beginning with ``tune``. None means ``sys.argv``.
    """
    make_outputs_printable()
    try:
        cli = _parsed(list(sys.argv[1:] if argv is None else argv)[1:])
        plan = cli.plan()
        result = run(cli, plan)
    except TuneError as error:
        complain(f"lightning-gr: error: {' '.join(str(error).split())}")
        return 2
    except (Interrupted, KeyboardInterrupt):
        complain("lightning-gr: interrupted: the same command goes on where this one stopped")
        return 130
    if is_rank_zero():
        _show(result, plan)
    return 0


def _parsed(flags: list[str]) -> TuneCLI:
    with warnings.catch_warnings(), quiet():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return TuneCLI(
            args=flags,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-gr tune",
                "description": "Find out which methods help on a module, and with which constants. All other flags are"
                " those of `lightning-gr fit`.",
            },
        )


def _show(result: TuneResult, plan: Plan) -> None:
    console = make_console()
    for table in make_tables(result):
        console.print(table)
    console.print(printable(result.sentence), markup=False)
    for name in ("best.yaml", "trials.csv", "range.png", "search.png", "final.png"):
        console.print(printable(str(plan.output / name)), markup=False, soft_wrap=True)
