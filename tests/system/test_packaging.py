"""The contents of a wheel, a source distribution and an editable install, built by the backend that pip calls."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from launching import ROOT

pytest.importorskip("setuptools.build_meta")
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(not (ROOT / "lightning_gr_startup.py").exists(), reason="there are no sources to build from"),
]
FOLDERS = ("lightning_gr", "tests", "docs", "examples", "benchmarks")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the sources, since a build leaves files next to them."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    for file in ROOT.iterdir():
        if file.is_file() and file.suffix in (".py", ".md", ".toml", ".cfg", ".in", ".yml", ""):
            shutil.copy(file, copy)
    return copy


def build(sources, kind):
    """Call a hook of the build backend in ``sources``, and return the path of the file that it creates."""
    out = sources / "dist"
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return out / ended.stdout.splitlines()[-1]


def files_below(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_contains_the_package_and_nothing_else(sources):
    with zipfile.ZipFile(build(sources, "wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_below(sources / "lightning_gr") | {"lightning_gr_startup.py"}
    assert "lightning_gr/py.typed" in names


def test_the_source_distribution_contains_the_tests_with_their_helpers(sources):
    with tarfile.open(build(sources, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in FOLDERS:
        assert files_below(sources / folder) - names == set()
    assert {"pyproject.toml", "setup.cfg", "CHANGELOG.md", "LICENSE", "mkdocs.yml", "MANIFEST.in"} - names == set()
    assert not [name for name in names if "__pycache__" in name]


def test_an_editable_install_is_a_plain_path(sources):
    """Type checkers and editors follow paths, but do not run the import hook that setuptools installs by default."""
    with zipfile.ZipFile(build(sources, "editable")) as wheel:
        (path_file,) = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert Path(path_file).suffix == ".pth"
        assert os.path.samefile(wheel.read(path_file).decode().strip(), sources)
