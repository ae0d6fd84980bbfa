"""Every public name can be imported, and there are no others."""

import importlib
import importlib.metadata
import pkgutil
from pathlib import Path

import pytest

import lightning_gr

FOUND = [
    module for module in pkgutil.walk_packages(lightning_gr.__path__, "lightning_gr.") if "__main__" not in module.name
]
MODULES = ["lightning_gr", *(module.name for module in FOUND)]
# subpackages are layers, whose modules are imported by name
WITHOUT_NAMES = {"lightning_gr._version", *(module.name for module in FOUND if module.ispkg)}
PROMISED = {
    "GradientRegularization", "SAM", "Flooding", "GRRule", "SAMRule", "regularized_backward", "flood",
    "in_second_pass", "__version__", "GradientNorm", "GradientNormMonitor", "SharpnessMonitor", "hessian_eigenvalue",
    "hessian_trace",
}  # fmt: skip


def names_of(module_name):
    return getattr(importlib.import_module(module_name), "__all__", [])


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in names_of(module)])
def test_can_be_imported(module, name):
    found = {}
    exec(f"from {module} import {name}", found)
    assert found[name] is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", MODULES)
def test_all_is_complete_and_has_no_duplicates(module):
    names = names_of(module)
    assert len(names) == len(set(names))
    assert names or module in WITHOUT_NAMES
    assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_the_promised_names_are_public():
    assert set(lightning_gr.__all__) >= PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED - {"__version__"}))
def test_is_documented_by_an_example(name):
    documentation = getattr(lightning_gr, name).__doc__
    assert ">>>" in documentation


def test_is_marked_as_typed():
    assert (Path(lightning_gr.__file__).parent / "py.typed").exists()


def test_version():
    try:
        installed = importlib.metadata.version("lightning_gr")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lightning_gr is not installed")
    assert lightning_gr.__version__ == installed
