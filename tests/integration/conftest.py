"""Real modules from other libraries.

Run them with `pip install -e '.[integration]' && pytest -m integration tests/integration`; plain `pytest` skips them.
"""

import pytest


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
