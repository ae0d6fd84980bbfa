"""The tests on the oldest, today's and the newest versions, each in an environment of its own: `nox -s oldest`.

Arguments after `--` go to pytest, as in `nox -s newest-3.13 -- -m "not integration"` for all tests. On Linux, PyPI's
torch is a CUDA build of several GB. For a CPU build, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

import nox

nox.options.sessions = ["today"]
nox.options.default_venv_backend = "venv"

PACKAGES = ("torch", "pytorch-lightning", "torchmetrics", "rich", "jsonargparse", "numpy")
VERSIONS = f"import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, {PACKAGES}))"


def tests(session, versions):
    session.install("-c", f".ci/{versions}.txt", "-e", ".[test]")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-c", VERSIONS)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python="3.10")
def oldest(session):
    tests(session, "oldest")


@nox.session(python="3.11")
def today(session):
    tests(session, "today")


@nox.session(python=["3.12", "3.13"])
def newest(session):
    tests(session, "newest")
