"""What all tests start from."""

import pytest
import torch
from hypothesis import settings

# tiny tensors: threads only get into each other's way
torch.set_num_threads(1)

settings.register_profile("small", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("small")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
