"""The contract takes minutes, so it is not among the quick tests; what is not kept yet is listed in not_kept.txt."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOT_KEPT = {line for line in (HERE / "not_kept.txt").read_text().splitlines() if not line.startswith("#")}
# in thousands of bytecodes, one after the other
TOO_LONG = ("test_interrupted_handlers.py::",)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            name = f"{item.path.name}::{item.name}"
            if name in NOT_KEPT:
                runs = not name.startswith(TOO_LONG)
                item.add_marker(pytest.mark.xfail(reason="not kept yet, see not_kept.txt", strict=False, run=runs))
