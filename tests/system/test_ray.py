"""The Ray Train example on a local cluster; skipped without Ray, which is not in the extra `test`."""

import re
import tempfile
from pathlib import Path

import pytest
from launching import PYTHON, ROOT, finish

pytest.importorskip("ray")
LIMIT = 200
pytestmark = [pytest.mark.launch, pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture
def short_path():
    """A short path for Ray's sockets, whose paths are limited to 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_workers_end_with_the_same_weights_as_with_lightnings_ddp(short_path):
    """The weights are identical bit for bit on both workers."""
    ends = []
    for engine in ("ray", "lightning"):
        command = [*PYTHON, ROOT / "examples/ray_train.py", "--epochs", 3, "--engine", engine]
        codes, output = finish(short_path / f"{engine}.log", command, limit=LIMIT)
        assert codes == [0], output[-3000:]
        ends.append(set(re.findall(r"weights of the workers: (\w+) (\w+)", output)))
    ((first, second),) = ends[0]
    assert first == second
    assert ends[1] == ends[0]
