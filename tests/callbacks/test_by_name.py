"""The short names of the callbacks."""

import pytest
from pytorch_lightning import Callback

import lightning_gr
from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME


def test_each_has_a_name():
    names = {"gr": "GradientRegularization", "sam": "SAM", "msam": "MomentumSAM", "flooding": "Flooding"}
    assert {key: getattr(lightning_gr, name) for key, name in names.items()} == CALLBACKS_BY_NAME


@pytest.mark.parametrize("name", CALLBACKS_BY_NAME)
def test_a_name_is_fit_for_a_flag_and_the_environment(name):
    assert name.isidentifier()
    assert name == name.lower()
    assert issubclass(CALLBACKS_BY_NAME[name], Callback)
