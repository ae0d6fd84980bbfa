"""Assumptions about FSDP1; system/test_fsdp1.py trains with it."""

import pytest
import torch
from torch import nn

from lightning_gr import _fsdp1


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("net._fsdp_wrapped_module.0.weight", "net.0.weight"),
        ("net.0._checkpoint_wrapped_module.bias", "net.0.bias"),
        ("_orig_mod.net.0.bias", "net.0.bias"),
        ("net.0._fsdp_wrapped_module", "net.0"),
        ("net.0", "net.0"),
    ],
)
def test_names_equal_those_of_the_users_module(name, own):
    assert _fsdp1.own_name(name) == own


def test_a_flattened_parameter_has_the_names_of_all_its_parts():
    param = nn.Parameter(torch.ones(3))
    assert _fsdp1.own_names("net.0.weight", param) == ["net.0.weight"]
    param._fqns = ("weight", "bias")
    assert _fsdp1.own_names("net.0._fsdp_wrapped_module._flat_param", param) == ["net.0.weight", "net.0.bias"]


def test_modules_without_fsdp1():
    net = nn.Linear(1, 1)
    assert _fsdp1.fsdp1_handles(net) == []
    assert _fsdp1.fsdp1_managed(net) == {}
    _fsdp1.forget_gathered(net)
    _fsdp1.forget_gathered(None)
