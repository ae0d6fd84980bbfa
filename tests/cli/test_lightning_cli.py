"""LightningCLI of both namespaces: the stock one with our callbacks, and ours with its flag groups.

Nearly all runs are in this process, since starting another one that imports torch takes seconds.
"""

import importlib
import io
import re
import sys

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lightning_gr import SAM, Flooding, GradientRegularization, GradientRegularizationCLI, GRRule, SAMRule
from lightning_gr.callbacks.base import TwoPass
from lightning_gr.cli import lightning_cli
from lightning_gr.cli import main as cli
from lightning_gr.cli.lightning_cli import lower_methods

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]
QUIET = [
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
STOPPING = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=loss"]
GR_AND_FLOODING = [
    "--trainer.callbacks+=GradientRegularization",
    "--trainer.callbacks.gamma=0.1",
    "--trainer.callbacks.scheme=central",
    "--trainer.callbacks.exclude=['*.bias']",
    "--trainer.callbacks+=Flooding",
    "--trainer.callbacks.level=0.3",
]


@pytest.fixture(autouse=True)
def _own_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.chdir(tmp_path)


def demos(namespace):
    return importlib.import_module(f"{namespace}.demos.boring_classes")


def stock(namespace, flags, kind=None):
    kind = kind or importlib.import_module(f"{namespace}.cli").LightningCLI
    boring = demos(namespace)
    options = {"run": False, "save_config_callback": None}
    return kind(boring.BoringModel, boring.BoringDataModule, args=[*QUIET, *flags], **options)


def ours(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, (TwoPass, Flooding))]


LOGGING = ("lightning_gr.report.step_report", "lightning_gr.report.step_log", "lightning_gr.callbacks.flooding")


def settings(owner):
    """Return public attributes, including those of objects that log."""
    found = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    return {n: settings(value) if type(value).__module__ in LOGGING else value for n, value in found.items()}


def ends(run, capsys):
    """Check that ``run`` prints a single line and exits with status 2; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "Seed set" not in line]
    return line


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_stock_cli_accepts_several_by_flags_and_round_trips_its_config(namespace, capsys):
    by_flags = ours(stock(namespace, GR_AND_FLOODING).trainer)
    assert by_flags[0].rule == GRRule(gamma=0.1, scheme="central")
    assert by_flags[0].exclude == ("*.bias",)
    assert by_flags[1].level == 0.3
    capsys.readouterr()
    with pytest.raises(SystemExit):
        stock(namespace, [*GR_AND_FLOODING, "--print_config"])
    printed = capsys.readouterr().out
    with open("printed.yaml", "w") as file:
        file.write(printed)
    again = ours(stock(namespace, ["--config=printed.yaml"]).trainer)
    assert [settings(callback) for callback in again] == [settings(callback) for callback in by_flags]
    with pytest.raises(SystemExit):
        stock(namespace, ["--config=printed.yaml", "--print_config"])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_stock_cli_reads_yaml_with_short_names(namespace):
    callbacks = [{"class_path": "SAM", "init_args": {"rho": 0.2, "adaptive": True}}]
    with open("config.yaml", "w") as file:
        yaml.safe_dump({"trainer": {"callbacks": callbacks}}, file)
    made = stock(namespace, ["--config=config.yaml"])
    assert ours(made.trainer)[0].rule == SAMRule(0.2, adaptive=True)
    made.trainer.fit_loop.max_epochs = 1
    made.trainer.limit_train_batches = 2
    made.trainer.limit_val_batches = 0
    made.trainer.fit(made.model, datamodule=made.datamodule)
    assert made.trainer.global_step == 2


@pytest.mark.parametrize("kind", [GradientRegularization, SAM, Flooding])
def test_help_explains_every_argument(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        stock("pytorch_lightning", [f"--trainer.callbacks.help={kind.__name__}"])
    said = capsys.readouterr().out
    for name in importlib.import_module("inspect").signature(kind).parameters:
        # in Python 3.13, a comma and another form of the flag follow
        explanation = re.split(rf"\n  --trainer\.callbacks\.{name}[ ,]", said)[1].split("\n  --trainer")[0]
        assert len(explanation.split("(type:")[0].split()) > 3, (name, explanation)
    assert max(map(len, said.splitlines()[2:])) <= 100


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("gamma=strong", "Expected a <class 'float'>"),
        ("scheme=sideways", "gamma|scheme"),
        ("gama=0.1", "'gama' is not"),
    ],
)
def test_stock_cli_refuses_wrong_types(flag, said, capsys):
    with pytest.raises(SystemExit) as ended:
        stock("pytorch_lightning", ["--trainer.callbacks+=GradientRegularization", f"--trainer.callbacks.{flag}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert any(part in error for part in said.split("|"))


def test_stock_cli_names_values_out_of_range():
    with pytest.raises(ValueError, match=r"Expected argument `gamma` to be a non-negative float but got -0\.1"):
        stock("pytorch_lightning", ["--trainer.callbacks+=GradientRegularization", "--trainer.callbacks.gamma=-0.1"])


# --- our subclass


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_flag_groups_choose_the_method(namespace):
    flags = ["--gr.gamma=0.1", "--gr.exclude=['*.bias']", "--flooding.level=0.2", *STOPPING]
    made = stock(namespace, flags, GradientRegularizationCLI)
    assert isinstance(made, importlib.import_module(f"{namespace}.cli").LightningCLI)
    assert isinstance(made.trainer, importlib.import_module(namespace).Trainer)
    gr, flooding = ours(made.trainer)
    assert (gr.rule, gr.exclude, flooding.level) == (GRRule(gamma=0.1), ("*.bias",), 0.2)
    assert "EarlyStopping" in [type(callback).__name__ for callback in made.trainer.callbacks]
    assert ours(stock(namespace, ["--sam.rho=0.3"], GradientRegularizationCLI).trainer)[0].rule == SAMRule(0.3)
    assert ours(stock(namespace, ["--gr={}"], GradientRegularizationCLI).trainer)[0].rule == GRRule()
    assert ours(stock(namespace, [], GradientRegularizationCLI).trainer) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gr.gamma=-0.1"], "--gr: Expected argument `gamma` to be a non-negative float but got -0.1"),
        (["--sam.rho=wide"], "--sam.rho: Expected a <class 'float'>. Got value: wide"),
        (["--gr.gama=0.1"], "'gama' is not"),
        (["--gr.gamma=0.1", "--sam.rho=0.1"], "at most one method besides flooding but got --gr and --sam: keep"),
        (["--trainer.callbacks+=SAM", "--trainer.callbacks.rho=-1"], "Expected argument `rho` to be a non-negative"),
        (["--trainer.callbacks+=SAM", "--trainer.callbacks.rho=x"], "--trainer.callbacks.rho: Expected a <class 'floa"),
        (["--trainer.callbacks+=Samm"], "--trainer.callbacks: Expected a dot import path string: Samm"),
        (["--trainer.max_epochs=many"], "--trainer.max_epochs: Expected a <class 'int'>"),
        (["--flooding={}"], "--flooding: "),
        (["--gr=5"], "--gr: "),
        (["--nothing=1"], "nothing"),
        (["--config=nothing.yaml"], "nothing.yaml"),
    ],
)
def test_wrong_values_end_with_one_line(flags, said, capsys):
    assert said in ends(lambda: stock("pytorch_lightning", flags, GradientRegularizationCLI), capsys)


def test_errors_of_the_model_are_not_hidden():
    class Broken(demos("pytorch_lightning").BoringModel):
        def __init__(self):
            raise ValueError("the model's own")

    with pytest.raises(ValueError, match="the model's own"):
        GradientRegularizationCLI(Broken, args=QUIET, run=False)


def test_a_subclass_can_fix_the_namespace_and_set_defaults():
    from lightning.pytorch.cli import LightningCLI

    class Own(GradientRegularizationCLI, LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.set_defaults({"sam": {"class_path": "lightning_gr.SAM", "init_args": {"rho": 0.4}}})

    class Inherited(GradientRegularizationCLI):
        def before_instantiate_classes(self):
            self.config.trainer.max_epochs = 7

    assert ours(stock("lightning.pytorch", [], Own).trainer)[0].rule == SAMRule(0.4)
    assert stock("lightning.pytorch", [], Inherited).trainer.max_epochs == 7


@pytest.mark.parametrize("kind", [dict, Namespace])
def test_settings_as_objects(kind):
    settings = {"model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}, "sam": {"rho": 0.2}}
    settings["trainer"] = {"accelerator": "cpu", "logger": False}
    args = settings if kind is dict else Namespace(**{k: Namespace(**v) for k, v in settings.items()})
    made = GradientRegularizationCLI(args=args, run=False, seed_everything_default=False)
    assert type(made.trainer).__module__.startswith("lightning.pytorch")
    assert ours(made.trainer)[0].rule == SAMRule(0.2)


# --- lightning-gr fit, validate, test and predict

MODULE = """
from {namespace}.demos.boring_classes import BoringModel
import torch

class Model(BoringModel):
    def __init__(self, rate: float = 0.1):
        super().__init__()
        self.rate = rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def on_fit_end(self):
        torch.save([self.trainer.global_step, self.layer.weight.detach()], "fitted.pt")
"""
TRAINING = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]


@pytest.fixture(params=NAMESPACES)
def model(request, tmp_path, monkeypatch):
    """The import path of a module class in the current folder, for each namespace."""
    name = f"own_{request.param.replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(namespace=request.param))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    yield f"{name}.Model"
    sys.modules.pop(name, None)


def fitted(flags):
    assert cli.main(["fit", *flags]) == 0
    steps, weight = torch.load("fitted.pt")
    assert steps == 3
    return weight


@pytest.mark.slow
def test_any_model_trains_and_its_saved_configuration_reproduces_the_run(model, tmp_path):
    flags = [f"--model={model}", "--model.rate=0.2", *TRAINING, "--gr.gamma=0.5", "--gr.epsilon=0.2"]
    plain = fitted([*flags[:-2], "--trainer.default_root_dir=plain"])
    regularized = fitted([*flags, "--trainer.default_root_dir=first"])
    assert not torch.equal(plain, regularized)
    assert torch.equal(fitted(["--config=first/config.yaml", "--trainer.default_root_dir=second"]), regularized)
    saved = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert saved["gr"]["init_args"]["gamma"] == 0.5
    assert saved["sam"] is None


@pytest.mark.slow
def test_every_subcommand_runs(model, capsys):
    namespace = "lightning.pytorch" if "lightning_pytorch" in model else "pytorch_lightning"
    data = f"--data={namespace}.demos.boring_classes.BoringDataModule"
    for command in ("validate", "test", "predict"):
        assert cli.main([command, f"--model={model}", data, *QUIET]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--gr.help"])
    assert ended.value.code == 0
    assert "--gr.gamma GAMMA      The penalty strength γ ≥ 0." in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("flags", [["fit", "--gr.help"], ["fit", "--help"], ["fit", "--trainer.callbacks.help=SAM"]])
@pytest.mark.parametrize("own_program", [True, False])
def test_help_in_an_encoding_without_greek(flags, encoding, own_program, monkeypatch):
    """Both for our command and for programs that use our class."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with pytest.raises(SystemExit) as ended:
        GradientRegularizationCLI(args=flags) if own_program else cli.main(flags)
    sys.stdout.flush()
    assert ended.value.code == 0
    said = raw.getvalue().decode(encoding)
    assert ("The radius rho >= 0" if "SAM" in flags[1] else "(gamma/2)||grad L(theta)||") in said
    assert "\\u" not in said


OLDER_ERROR = """Parser key "model":

  - Expected a config path but torch.nn.Linear either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'NoneType'>, <class 'pytorch_lightning.core.module.LightningModule'>]
  Errors:
    - Expected a <class 'NoneType'>
    - Import path does not correspond to a subclass of LightningModule
  Given value type: <class 'str'>
  Given value: torch.nn.Linear"""
OLDER_READABLE = "--model: Import path does not correspond to a subclass of LightningModule, but got torch.nn.Linear"


def test_a_missing_configuration_file_is_named_once(capsys, tmp_path):
    said = ends(lambda: cli.main(["fit", "--config=missing.yaml"]), capsys)
    assert said == f"lightning-gr fit: error: --config: File does not exist: '{tmp_path / 'missing.yaml'}'"


def test_errors_of_older_parsers():
    """jsonargparse 4.40 to 4.51 list None and configuration files before the intended type."""
    assert lightning_cli._readable(OLDER_ERROR) == OLDER_READABLE


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model={}l", "--model: module '{}' has no attribute 'Modell', but got {}.Modell"),
        ("--model=no_module.Model", "--model: No module named 'no_module', but got no_module.Model"),
        ("--model=Modell", "--model: Expected a dot import path string: Modell"),
        ("--model=torch.nn.Linear", "--model: Import path does not correspond to a subclass of LightningModule"),
        ("--model={} --data={}Data", "--data: module '{}' has no attribute 'ModelData'"),
        ("--model={} --model.rate=fast", "--model.rate: Expected a <class 'float'>. Got value: fast"),
    ],
)
def test_a_misspelled_class_or_wrong_value_is_one_line(flags, said, model, capsys):
    command = ["fit", *flags.replace("{}", model).split(), *TRAINING]
    assert said.replace("{}", model.partition(".")[0]) in ends(lambda: cli.main(command), capsys)


def test_a_misspelled_argument_of_the_module_is_one_line(model, capsys):
    said = ends(lambda: cli.main(["fit", f"--model={model}", "--model.rat=1", *TRAINING]), capsys)
    assert re.search("--model: (Option 'rat' is not accepted|Validation failed: Key 'rat' is not expected)", said)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_missing_data_is_one_line(command, model, capsys, tmp_path):
    """The error for a module without loaders, which Lightning raises in either namespace."""
    name = model.partition(".")[0]
    with (tmp_path / f"{name}.py").open("a") as file:
        file.write("\nclass Bare(Model):\n    train_dataloader = BoringModel.__mro__[1].train_dataloader\n")
        file.write("    test_dataloader = BoringModel.__mro__[1].test_dataloader\n")
    capsys.readouterr()
    assert cli.main([command, f"--model={name}.Bare", *QUIET, "--trainer.fast_dev_run=true"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("lightning-gr: error: ")
    assert line.endswith(": give --data, or define it in the module")


def test_names_of_methods_in_any_case(model, capsys):
    said = ends(lambda: cli.main(["fit", f"--model={model}", *TRAINING, "--SAM.rho=-1"]), capsys)
    assert said.endswith("--sam: Expected argument `rho` to be a non-negative float but got -1.0")
    assert lower_methods(["--Gr={}", "--MSAM.rho", "2", "--trainer.SAM=1", "--Samples=1"]) == [
        "--gr={}",
        "--msam.rho",
        "2",
        "--trainer.SAM=1",
        "--Samples=1",
    ]


def test_errors_of_training_are_one_line(model, capsys):
    flags = ["fit", f"--model={model}", *TRAINING, "--trainer.default_root_dir=out"]
    assert cli.main([*flags, "--gr.exclude=['nothing']"]) == 2
    assert "Expected each pattern in `exclude` to match a parameter" in capsys.readouterr().err.splitlines()[-1]
    said = ends(lambda: cli.main(["fit", *TRAINING]), capsys)
    assert said.startswith("lightning-gr")
    assert "model" in said


@pytest.mark.parametrize("name", ["jsonargparse", "docstring_parser", "shtab"])
def test_a_missing_extra_is_named(name, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    command = ["completion", "bash"] if name == "shtab" else ["fit", "--model=any"]
    assert cli.main(command) == 2
    assert f"needs {name}: pip install 'lightning_gr[cli]'" in capsys.readouterr().err
