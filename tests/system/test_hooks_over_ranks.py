"""Hooks on parameters with DDP: each rank clips its own gradients before they are reduced."""

import pytest
import torch
from hooked_ranks import CASES, RANKS
from launching import torchrun

LIMIT = 400
pytestmark = [pytest.mark.launch, pytest.mark.timeout(LIMIT + 60)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hooked")
    torchrun("hooked_ranks.py", folder, ranks=RANKS, limit=LIMIT)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_clipped_separately(results, name):
    assert max(rank[name] for rank in results) < 1e-9
