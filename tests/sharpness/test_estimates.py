"""Hessian eigenvalue and trace, against a dense Hessian in float64, and without side effects."""

import random

import numpy as np
import pytest
import torch
from hessians import DATA, NETS, Noisy, dense_hessian, loss_of
from modules import assert_same, mlp, weights

from lightning_gr import hessian_eigenvalue, hessian_trace


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("name", NETS)
def test_largest_eigenvalue(name, method):
    net = NETS[name]()
    expected = torch.linalg.eigvalsh(dense_hessian(net))[-1].item()
    result = hessian_eigenvalue(loss_of(net), net, tolerance=1e-6, method=method)
    assert result.value == pytest.approx(expected, rel=1e-7)
    assert result.converged
    assert result.residual <= 1e-6 * result.value
    assert result.method == method
    rough = hessian_eigenvalue(loss_of(net), net, max_iterations=2)
    assert rough.iterations == 2
    assert not rough.converged
    assert abs(rough.value - expected) > 1e-3 * expected


def test_the_residual_is_a_bound_and_the_largest_eigenvalue_the_most_positive():
    w = torch.linspace(-9.0, 5.0, 40, dtype=torch.float64)
    theta = torch.ones(40, dtype=torch.float64, requires_grad=True)
    result = hessian_eigenvalue(lambda: (w * theta**2).sum() / 2, [theta], tolerance=1e-2)
    assert result.converged
    assert abs(result.value - 5) <= result.residual
    # Lanczos is exact after as many steps as there are different eigenvalues
    pair = torch.ones(2, dtype=torch.float64, requires_grad=True)
    exact = hessian_eigenvalue(lambda: pair[0] ** 2 - 4 * pair[1] ** 2, [pair])
    assert (exact.iterations, exact.value) == (2, pytest.approx(2))


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
def test_trace_within_its_standard_error(method):
    net = mlp(6)
    expected = torch.trace(dense_hessian(net)).item()
    result = hessian_trace(loss_of(net), net, tolerance=0.1, max_samples=400, method=method)
    assert result.converged
    assert result.standard_error <= 0.1 * result.value
    assert abs(result.value - expected) <= 3 * result.standard_error


def test_standard_error_equals_the_spread_of_the_estimator():
    """The reported error is the spread over many seeds."""
    net = mlp(6)
    runs = [
        hessian_trace(loss_of(net), net, max_samples=12, tolerance=1e-9, generator=torch.Generator().manual_seed(seed))
        for seed in range(50)
    ]
    spread = float(np.std([run.value for run in runs], ddof=1))
    assert spread == pytest.approx(np.mean([run.standard_error for run in runs]), rel=0.3)
    assert not any(run.converged for run in runs)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    theta = torch.ones(7, dtype=torch.float64, requires_grad=True)
    result = hessian_trace(lambda: (torch.arange(7.0) * theta**2).sum(), [theta], min_samples=2)
    assert (result.value, result.standard_error, result.samples) == (42.0, 0.0, 2)


def test_accuracy_in_float32():
    net = mlp(16, 16)
    exact = hessian_eigenvalue(loss_of(net), net, tolerance=1e-8).value
    single = net.float()
    data = DATA[0].float(), DATA[1]
    assert hessian_eigenvalue(loss_of(single, data), single).value == pytest.approx(exact, rel=1e-5)
    by_difference = hessian_eigenvalue(loss_of(single, data), single, method="finite_difference")
    assert by_difference.value == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("measure", [hessian_eigenvalue, hessian_trace])
def test_leaves_no_trace(measure, method):
    torch.manual_seed(0)
    net = Noisy().double()
    loss_of(net)().backward()
    before = weights(net), {n: b.clone() for n, b in net.named_buffers()}, [p.grad for p in net.parameters()]
    gradients = [g.clone() for g in before[2]]
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    calls = net.calls
    results = {measure(loss_of(net), net, method=method) for _ in range(2)}
    # all passes have the same dropout mask, so that there is a well-defined Hessian
    assert len(results) == 1
    assert_same(weights(net), before[0])
    assert_same(dict(net.named_buffers()), before[1])
    assert all(
        p.grad is g and torch.equal(g, old) for p, g, old in zip(net.parameters(), before[2], gradients, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]
    assert net.calls == calls == len(net.seen)


def test_works_with_gradients_disabled():
    net = mlp()
    expected = hessian_eigenvalue(loss_of(net), net)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert hessian_eigenvalue(loss_of(net), net) == expected


def test_frozen_unused_and_linear_parameters():
    net = mlp()
    net[0].requires_grad_(False)
    head = dict(net[2].named_parameters())
    alone = hessian_eigenvalue(loss_of(net), head.values())
    assert hessian_eigenvalue(loss_of(net), net) == alone
    unused = torch.ones(3, requires_grad=True)
    assert hessian_eigenvalue(loss_of(net), [*head.values(), unused], tolerance=1e-6).value == pytest.approx(
        alone.value, rel=1e-3
    )
    for method in ("auto", "finite_difference"):
        assert hessian_trace(lambda: (2 * unused).sum(), [unused], method=method).value == pytest.approx(0, abs=1e-2)
    assert hessian_eigenvalue(lambda: (2 * unused).sum(), [unused]).value == 0


def test_results_that_are_not_finite_are_nan():
    w = torch.zeros(2, requires_grad=True)
    for result in (hessian_eigenvalue(lambda: w.sqrt().sum(), [w]), hessian_trace(lambda: w.sqrt().sum(), [w])):
        assert result.value != result.value
        assert not result.converged


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "exact"}, "`method` to be one of 'auto', 'double_backward', 'finite_difference' but got 'exact'"),
        ({"tolerance": 0.0}, "`tolerance` to be a positive float but got 0.0"),
        ({"max_iterations": 0}, "`max_iterations` to be an integer of at least 1 but got 0"),
    ],
)
def test_wrong_arguments(options, said):
    net = mlp()
    with pytest.raises(ValueError, match=said):
        hessian_eigenvalue(loss_of(net), net, **options)
