"""Real modules from other libraries.

Run by `pip install -e '.[integration]' && pytest -m integration tests/integration`; left out of a plain `pytest`.
"""

import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
