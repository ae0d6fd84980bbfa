"""Runs the code paths for accelerators, which never read values on the host, on CPU tensors."""

from contextlib import contextmanager
from unittest.mock import patch

from lightning_gr.core import perturb


@contextmanager
def treated_as_accelerator():
    """Take the branches for accelerators; yield the mock that records the calls."""
    with patch.object(perturb, "is_on_host", return_value=False) as asked:
        yield asked
