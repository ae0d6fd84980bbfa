"""The functional form: its passes over a closure, what it takes and what it refuses."""

import pytest
import torch
from modules import METHODS, assert_near, assert_same, cross_entropy, gradients, make_batches, mlp
from outside import Record
from torch import nn

from lightning_gr import GRRule, SAMRule, regularized_backward
from lightning_gr.core.rules import SCHEMES


def regularized(net, batch, rule, *, loss=cross_entropy, **options):
    """The regularized gradient at one batch."""
    net.zero_grad()
    regularized_backward(lambda: loss(net, batch), net, rule, **options)
    return gradients(net)


class Counts(nn.Module):
    """Depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.count += 1
        return self.net(x) * (1 + self.count)


@pytest.mark.parametrize("name", METHODS)
def test_all_passes_see_the_random_numbers_and_buffers_of_the_first(name):
    batch, method = make_batches()[0], METHODS[name]

    def noisy(net, batch, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return cross_entropy(lambda x: net(nn.functional.dropout(x, 0.5)), batch)

    def frozen(net, batch):
        return noisy(lambda x: net(x) * 2, batch, seed=5)

    net = Counts()
    torch.manual_seed(5)
    actual = regularized(net, batch, method.rule, loss=noisy)
    continued = torch.rand(3)
    expected = regularized(mlp(), batch, method.rule, loss=frozen)
    assert_near({n.removeprefix("net."): g for n, g in actual.items()}, expected, 1e-13)
    assert net.count == 1
    noisy(mlp(), batch, seed=5)
    assert torch.equal(continued, torch.rand(3))


def test_returns_the_clean_loss_and_counts_its_calls():
    net, batch = mlp(), make_batches()[0]
    clean = cross_entropy(net, batch).detach()
    for scheme, passes in zip(SCHEMES, (2, 2, 3, 2), strict=True):
        losses = Record()
        loss = regularized_backward(
            lambda losses=losses: losses.append(cross_entropy(net, batch)) or losses[-1],
            net,
            GRRule(0.1, 0.1, scheme),
            level=10.0,
            loss_scale=torch.tensor(2.0),
        )
        assert torch.equal(loss, clean)
        assert not loss.requires_grad
        assert len(losses) == passes


def test_takes_parameters_mappings_and_another_backward():
    batch, expected = make_batches()[0], mlp()
    regularized(expected, batch, SAMRule(0.1))
    net, called = mlp(), []
    regularized_backward(
        lambda: {"loss": cross_entropy(net, batch), "other": 1},
        iter(net.parameters()),
        SAMRule(0.1),
        backward=lambda loss: called.append(1) or loss.backward(),
    )
    assert_same(gradients(net), gradients(expected))
    assert len(called) == 2


@pytest.mark.parametrize(
    ("loss_fn", "params", "options", "message"),
    [
        (lambda: 1.0, [torch.ones(1, requires_grad=True)], {}, "to return a loss with a graph but got float"),
        (lambda: None, [torch.ones(1, requires_grad=True)], {}, "to return a loss with a graph but got NoneType"),
        (lambda: {"x": 1}, [torch.ones(1, requires_grad=True)], {}, "to return a loss with a graph but got NoneType"),
        (lambda: torch.ones(()), [torch.ones(1, requires_grad=True)], {}, "with a graph but got a tensor without one"),
        (lambda: 1.0, [], {}, "Expected `params` to hold a parameter"),
        (lambda: 1.0, nn.Tanh(), {}, "Expected `params` to hold a parameter"),
        (lambda: 1.0, [torch.ones(1)], {"exclude": ["x"]}, "to be a module where `exclude` is given"),
        (lambda: 1.0, nn.Linear(1, 1), {"exclude": ["x"]}, "'x' matches none of weight, bias"),
        (lambda: 1.0, nn.Linear(1, 1), {"exclude": "bias"}, "to be a list of patterns"),
    ],
)
def test_errors(loss_fn, params, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        regularized_backward(loss_fn, params, GRRule(), **options)
    assert "\n" not in str(caught.value)
