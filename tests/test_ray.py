"""The Ray Train example on a local cluster; skipped where Ray is not installed, as it is not in the extra `test`."""

import re

import pytest
from launching import HERE, PYTHON, finish

pytest.importorskip("ray")
LIMIT = 200
pytestmark = pytest.mark.timeout(2 * LIMIT)


def test_workers_end_with_the_weights_of_lightning_s_own_ddp(tmp_path):
    """Bit for bit, on both."""
    ends = []
    for engine in ("ray", "lightning"):
        command = [*PYTHON, HERE.parent / "examples/ray_train.py", "--epochs", 3, "--engine", engine]
        codes, output = finish(tmp_path / engine, command, limit=LIMIT)
        assert codes == [0], output[-3000:]
        ends.append(set(re.findall(r"weights of the workers: (\w+) (\w+)", output)))
    ((first, second),) = ends[0]
    assert first == second
    assert ends[1] == ends[0]
