"""The flooded loss and the sign of its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import assert_same, cross_entropy, gradients, make_batches, mlp

from lightning_gr import flood
from lightning_gr.core.flooding import flood_gradient_

numbers = st.floats(-10, 10)


@given(value=numbers, level=st.floats(0, 10))
def test_flood_is_the_explicit_formula(value, level):
    loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    result = flood(loss, level)
    result.backward()
    assert result.item() == abs(value - level) + level
    assert loss.grad.item() == (value > level) - (value < level)


@pytest.mark.parametrize("side", [0.5, 2.0])
def test_the_hook_gives_the_gradient_of_the_flooded_loss_bit_for_bit(side):
    batch, nets = make_batches()[0], (mlp(), mlp())
    level = side * cross_entropy(nets[0], batch).item()
    flood(cross_entropy(nets[0], batch), level).backward()
    loss = cross_entropy(nets[1], batch)
    before = loss.item()
    flood_gradient_(loss, level)
    loss.backward()
    assert loss.item() == before
    assert_same(gradients(nets[1]), gradients(nets[0]))


@pytest.mark.parametrize("level", [2.0, 8.0])
def test_the_hook_survives_double_backward(level):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = (x**2).sum()  # 5
    flood_gradient_(loss, level)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (hg,) = torch.autograd.grad(g @ g.detach(), x)
    sign = 1 if level < 5 else -1
    assert torch.equal(g, sign * 2 * x)
    assert torch.equal(hg, 4 * x)  # both factors change sign


@pytest.mark.parametrize("value", [1.0, 9.0])
def test_another_value_may_decide_the_sign(value):
    """Such as the mean of the loss over devices."""
    x = torch.tensor([1.0], requires_grad=True)
    loss = (5 * x).sum()
    flood_gradient_(loss, 4.0, torch.tensor(value))
    loss.backward()
    assert x.grad.item() == (-5 if value < 4 else 5)


def test_a_scaled_loss_is_compared_with_a_scaled_level():
    for scale, level in ((1.0, 4.0), (1024.0, torch.tensor(4096.0))):
        x = torch.tensor([1.0], requires_grad=True)
        loss = (3 * x).sum() * scale
        flood_gradient_(loss, level)
        loss.backward()
        assert x.grad.item() == -3 * scale


def test_a_loss_exactly_at_the_level_is_minimized():
    """|L − b| has no derivative there; with the explicit formula, the gradient would be zero."""
    x = torch.tensor([2.0], requires_grad=True)
    loss = (3 * x).sum()
    assert not flood_gradient_(loss, 6.0)
    loss.backward()
    assert x.grad.item() == 3
