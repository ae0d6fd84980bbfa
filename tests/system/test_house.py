"""The house is in order: each module has a test of its name, and imports go down the storeys."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import lightning_gr

ROOT, PACKAGE = Path(__file__).parents[2], Path(lightning_gr.__file__).parent
# the face is tested in test_public_names, and the command as it starts in test_namespaces
WITHOUT_TEST = {"__init__.py", "__main__.py", "_version.py", "rules.py", "slices.py"}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_each_module_has_a_test_of_its_name(module):
    place = module.relative_to(PACKAGE)
    if place.as_posix() not in WITHOUT_TEST:
        assert (ROOT / "tests" / place.parent / f"test_{place.name.lstrip('_')}").exists()


@pytest.mark.parametrize("storey", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_each_test_of_a_storey_has_a_module_of_its_name(storey):
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests" / storey).rglob("test_*.py")}
    assert [path for path in tests if not (PACKAGE / path.parent / path.name.removeprefix("test_")).exists()] == []


def test_imports_go_down_the_storeys(monkeypatch, capsys):
    """As `lint-imports` says, by the contracts in pyproject.toml."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out
