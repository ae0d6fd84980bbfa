"""Products with the Hessian, against the dense one, with and without a second derivative."""

import pytest
import torch
from hessians import DATA, NETS, Noisy, dense_hessian, loss_of
from modules import assert_same, cross_entropy, mlp, weights
from torch import nn

from lightning_gr import hessian_eigenvalue, hessian_trace, in_second_pass
from lightning_gr.core.tensors import random_unit
from lightning_gr.sharpness.hessian import HessianProducts


class FirstOrder(torch.autograd.Function):
    """A tanh without a second derivative, like fused operators."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class OnceTanh(nn.Module):
    def forward(self, x):
        return FirstOrder.apply(x)


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("name", NETS)
def test_products_equal_those_of_the_dense_hessian(name, method):
    net = NETS[name]()
    vector = random_unit(list(net.parameters()), torch.Generator().manual_seed(4))
    expected = dense_hessian(net) @ torch.cat([v.flatten() for v in vector])
    with HessianProducts(loss_of(net), net, method=method) as products:
        product = torch.cat([x.flatten() for x in products([3 * v for v in vector])]) / 3
    rtol = 1e-12 if method == "double_backward" else 1e-8
    assert (product - expected).norm() <= rtol * expected.norm()


def test_an_operator_without_second_derivative_falls_back():
    net, twin = mlp(6, activation=OnceTanh), mlp(6)
    found, expected = hessian_eigenvalue(loss_of(net), net), hessian_eigenvalue(loss_of(twin), twin)
    assert (found.method, expected.method) == ("finite_difference", "double_backward")
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    trace = hessian_trace(loss_of(net), net)
    assert trace.value == pytest.approx(hessian_trace(loss_of(twin), twin).value, rel=1e-6)
    with pytest.raises(RuntimeError, match=r"once_differentiable`, so .* use `method='finite_difference'`"):
        hessian_eigenvalue(loss_of(net), net, method="double_backward")


def test_fused_attention():
    """Fused attention on the CPU has no second derivative."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 4, 8)
    fused = hessian_eigenvalue(lambda: attention(x, x, x, need_weights=False)[0].square().mean(), attention)
    plain = hessian_eigenvalue(lambda: attention(x, x, x)[0].square().mean(), attention)
    assert plain.method == "double_backward"
    assert fused.value == pytest.approx(plain.value, rel=2e-3)


def test_both_methods_see_the_same_noise():
    torch.manual_seed(0)
    net = Noisy().double()
    values = [
        hessian_eigenvalue(loss_of(net), net, tolerance=1e-6, method=m).value
        for m in ("double_backward", "finite_difference")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_an_outer_autocast_context_caches_no_moved_weights():
    net, x = mlp(dtype=torch.float32), DATA[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        hessian_trace(lambda: net(x).square().mean(), net, method="finite_difference", max_samples=2)
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_are_restored_when_a_loss_fails(error):
    net = mlp()
    before, calls = weights(net), []

    def loss():
        calls.append(in_second_pass())
        if len(calls) == 4:
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise error
        return cross_entropy(net, DATA)

    with pytest.raises(error):
        hessian_trace(loss, net, method="finite_difference")
    assert calls == [True] * 4
    assert_same(weights(net), before)
    assert not in_second_pass()


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match="trainable parameters, all of them real"):
        hessian_trace(lambda: torch.ones(()), [])
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="a loss with a graph"):
        hessian_trace(lambda: w.detach().sum(), [w])
