"""Which parameters a pattern selects."""

import pytest
import torch
from torch import nn

from lightning_gr.core.selection import match_params


def found(patterns, net):
    return match_params(patterns, net)


def test_patterns_match_whole_names_and_case():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert found(["*.bias"], net) == {id(net[0].bias), id(net[1].bias)}
    assert found(["[01].weight", "1.bias"], net) == {id(net[0].weight), id(net[1].weight), id(net[1].bias)}
    for pattern in ("bias", "0", "0.Weight", "*.BIAS", ""):
        with pytest.raises(ValueError, match=r"matches none of 0\.weight, 0\.bias, 1\.weight, 1\.bias;"):
            found(["*", pattern], net)


def test_any_name_of_a_tied_parameter_matches():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    for pattern in ("0.weight", "1.weight"):
        assert found([pattern], net) == {id(net[0].weight)}


def test_errors_list_only_some_of_many_names():
    many = nn.ParameterDict({f"layer_{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(ValueError, match=r"'x' matches none of layer_0, layer_1, layer_2, layer_3, …;") as caught:
        match_params(["layer_4", "x"], many)
    assert "\n" not in str(caught.value)


def test_no_patterns_and_no_parameters():
    assert match_params([], nn.Identity()) == set()


class Attention(nn.Module):
    """A layer that contains other layers."""

    def __init__(self):
        super().__init__()
        self.project, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)


class Own(nn.LayerNorm):
    pass


def test_types_of_layers():
    net = nn.Sequential(nn.Embedding(4, 3), Attention(), Own(3), nn.ReLU())
    norms = {id(p) for layer in (net[1].norm, net[2]) for p in layer.parameters()}
    assert found(["type:LayerNorm"], net) == norms
    assert found(["type:Own"], net) == {id(p) for p in net[2].parameters()}
    assert found(["type:Attention"], net) == {id(p) for p in net[1].parameters()}
    assert found(["type:Embedding", "1.*.bias"], net) == {
        id(net[0].weight),
        id(net[1].project.bias),
        id(net[1].norm.bias),
    }
    for unknown in ("type:ReLU", "type:layernorm", "type:", "type:Conv2d"):
        with pytest.raises(ValueError, match="types are Embedding, LayerNorm, Linear, Own") as caught:
            found([unknown], net)
        assert "\n" not in str(caught.value)


def flattened():
    """Create a layer as FSDP1 does with `use_orig_params=False`: a single parameter that stands for two."""
    net = nn.Module()
    net._flat_param = nn.Parameter(torch.zeros(3))
    net._flat_param._fqns = ["0.weight", "0.bias"]
    return net


def test_a_flattened_parameter_has_the_names_of_all_its_parts():
    net = flattened()
    assert found(["0.*"], net) == {id(net._flat_param)}
    with pytest.raises(ValueError, match=r"'\*\.bias' selects 1 of 2: leave `use_orig_params` True"):
        found(["*.bias"], net)
    with pytest.raises(ValueError, match=r"names and not types of layers, such as 'type:Module'"):
        found(["type:Module"], net)
    with pytest.raises(ValueError, match=r"matches none of 0\.weight, 0\.bias;"):
        found(["1.*"], net)
