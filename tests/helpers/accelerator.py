"""Tensors on the CPU, treated as those of an accelerator, whose numbers are not looked at."""

from contextlib import contextmanager
from unittest.mock import patch

from lightning_gr.core import perturb


@contextmanager
def treated_as_accelerator():
    """Take the branches that accelerators take; gives the calls that asked."""
    with patch.object(perturb, "is_on_host", return_value=False) as asked:
        yield asked
