"""Project files: the same owner in all URLs, the same version everywhere, and valid workflows."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import lightning_gr

ROOT = Path(__file__).parents[2]
FILES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CITATION.cff",
    "pyproject.toml",
    "docs",
    ".github",
]
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not a checkout")


def texts():
    for path in (ROOT / name for name in FILES):
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.suffix in {".md", ".cff", ".toml", ".yml"}:
                yield file.read_text(encoding="utf-8")


def test_all_urls_have_the_same_owner():
    owners = [owner for text in texts() for owner in re.findall(r"github\.com/([\w-]+)/lightning_gr", text)]
    assert len(owners) > 8
    assert len(set(owners)) == 1


def test_version_and_date_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    section = rf"^## \[{re.escape(lightning_gr.__version__)}\] - (\d{{4}}-\d\d-\d\d)$"
    (date,) = re.findall(section, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert (citation["version"], citation["date-released"]) == (lightning_gr.__version__, date)
    assert (ROOT / "docs" / "releases" / f"{lightning_gr.__version__}.md").exists()


def test_workflows_and_forms_are_valid_and_refer_to_existing_files():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = ci["jobs"]["linux"]["strategy"]["matrix"]
    for versions in [*matrix["versions"], *(more["versions"] for more in matrix["include"])]:
        assert (ROOT / ".ci" / f"{versions}.txt").exists()
    assert matrix["python"] == ["3.10", "3.13"]


@pytest.mark.parametrize("command", ["ruff check", "ruff format", "mypy", "lint-imports --no-cache"])
def test_hooks_mirror_ci(command):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert any(hook["entry"].startswith(command) for hook in hooks)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.launch
def test_ci_refuses_unknown_versions():
    ended = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run"), "latest"], capture_output=True, text=True, check=False, timeout=30
    )
    assert ended.returncode == 2
    assert "use oldest, today or newest" in ended.stderr
