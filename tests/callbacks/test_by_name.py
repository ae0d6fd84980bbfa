"""The short names of the callbacks."""

import pytest
from pytorch_lightning import Callback

import lightning_gr
from lightning_gr.callbacks.by_name import CALLBACKS_BY_NAME


def test_each_has_a_name():
    expected = {"gr": lightning_gr.GradientRegularization, "sam": lightning_gr.SAM, "flooding": lightning_gr.Flooding}
    assert expected == CALLBACKS_BY_NAME


@pytest.mark.parametrize("name", CALLBACKS_BY_NAME)
def test_a_name_is_fit_for_a_flag_and_the_environment(name):
    assert name.isidentifier()
    assert name == name.lower()
    assert issubclass(CALLBACKS_BY_NAME[name], Callback)
