"""The parameters of a module are kept up to date."""

import gc
import weakref

import pytest
from torch import nn

from lightning_gr.replay.parameters import Parameters


def build():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(nn.Linear(3, 2), nn.Sequential(shared, nn.ReLU()), shared)
    net[2].bias = net[0].bias
    return net


CHANGES = {
    "nothing": lambda net: None,
    "a layer": lambda net: net[1].append(nn.Linear(2, 2)),
    "another layer": lambda net: net.__setitem__(0, nn.Linear(3, 2)),
    "a layer less": lambda net: net.__delitem__(0),
    "a parameter": lambda net: net[0].register_parameter("scale", nn.Parameter(net[0].bias.detach().clone())),
    "another parameter": lambda net: setattr(net[1][0], "weight", nn.Parameter(net[1][0].weight.detach().clone())),
    "a parameter less": lambda net: setattr(net[0], "bias", None),
    "another table": lambda net: setattr(net[0], "_parameters", {"weight": net[2].weight}),
    "order": lambda net: net[0]._parameters.update(weight=net[0]._parameters.pop("weight")),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_equal_those_of_torch_after_any_change(change):
    net, parameters = build(), Parameters()
    assert {id(p) for p in parameters.of(net)} == {id(p) for p in net.parameters()}
    for _ in range(2):
        CHANGES[change](net)
        found = parameters.of(net)
        assert len(found) == len({id(p) for p in found})
        assert {id(p) for p in found} == {id(p) for p in net.parameters()}


def test_a_module_without_layers():
    assert Parameters().of(nn.ReLU()) == []
    linear = nn.Linear(2, 2)
    assert Parameters().of(linear) == [linear.weight, linear.bias]


def test_the_module_is_not_kept_alive():
    net, parameters = build(), Parameters()
    parameters.of(net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
