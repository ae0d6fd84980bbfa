"""House rules: every module has a test file, imports only go down the layers, and the prose avoids some phrases."""

import re
from pathlib import Path

import pytest

import lightning_gr

ROOT, PACKAGE = Path(__file__).parents[2], Path(lightning_gr.__file__).parent
# public modules are tested in test_public_names, and the start of the command in test_namespaces
WITHOUT_TEST = {"__init__.py", "__main__.py", "_version.py", "rules.py", "slices.py"}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_each_module_has_a_test_file(module):
    path = module.relative_to(PACKAGE)
    if path.as_posix() not in WITHOUT_TEST:
        assert (ROOT / "tests" / path.parent / f"test_{path.name.lstrip('_')}").exists()


@pytest.mark.parametrize("layer", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_each_test_file_of_a_layer_has_a_module(layer):
    """A module may have several: test_closure.py and test_closure_passes.py."""
    modules = {path.relative_to(PACKAGE).with_suffix("") for path in (PACKAGE / layer).rglob("*.py")}
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests" / layer).rglob("test_*.py")]
    names = {test: test.stem.removeprefix("test_").split("_") for test in tests}
    prefixes = {
        test: {test.parent / "_".join(parts[:count]) for count in range(1, len(parts) + 1)}
        for test, parts in names.items()
    }
    assert [test for test in tests if not prefixes[test] & modules] == []


def test_imports_only_go_down_the_layers(monkeypatch, capsys):
    """Checked by `lint-imports` (extra `dev`) with the contracts in pyproject.toml."""
    lint_imports = pytest.importorskip("importlinter.cli").lint_imports
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


# --- plain American English: these read as a translation, or as British

PHRASES = (
    r"\banew\b",
    r"\blet go of\b",
    r"\bturn(s|ed)? (it )?round\b",
    r"\bso many\b",
    r"\bbut for\b",
    r", too\b(?! \w)",
    r"\bto be had\b",
    r"\bas good as\b",
    r"\bin the place of\b",
    r"\bcolour",
    r"\d %(?![-(\w])",
    r'^\s*"""\w+\."""$',  # a docstring of one word
)
PROSE = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(path for folder in (PACKAGE, ROOT / "examples", ROOT / "benchmarks") for path in folder.rglob("*.py")),
]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: "/".join(path.parts[-2:]))
def test_prose_avoids_some_phrases(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines for phrase in PHRASES if re.search(phrase, line)] == []
