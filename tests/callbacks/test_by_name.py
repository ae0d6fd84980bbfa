"""Short names of callbacks, for the command line and the environment."""

import pytest
from pytorch_lightning import Callback

import lightning_gr
from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME


def test_short_names_of_the_callbacks():
    names = {"gr": "GradientRegularization", "sam": "SAM", "msam": "MomentumSAM", "flooding": "Flooding"}
    assert {key: getattr(lightning_gr, name) for key, name in names.items()} == CALLBACKS_BY_NAME


@pytest.mark.parametrize("name", CALLBACKS_BY_NAME)
def test_names_can_be_used_in_flags_and_the_environment(name):
    assert name.isidentifier()
    assert name == name.lower()
    assert issubclass(CALLBACKS_BY_NAME[name], Callback)
