"""Norms, directions, and perturbations that are undone bit for bit."""

import math
from contextlib import suppress

import pytest
import reference
import torch
from accelerator import treated_as_accelerator
from hypothesis import given
from hypothesis import strategies as st
from modules import assert_near, assert_same

from lightning_gr.core.perturb import Perturbation, direction_factor, is_on_host
from lightning_gr.core.rules import Update
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.tensors import global_norm, inverse, tensor_norms

shapes = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (0,)]), min_size=1, max_size=4)
DIRECTIONS = ["gradient", "normalized", "adaptive"]


def make_params(shapes, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    for p in params:
        p.requires_grad_()
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
    return params


def named(tensors):
    return {str(i): t.detach().clone() for i, t in enumerate(tensors)}


@given(shapes=shapes, seed=st.integers(0, 1000))
def test_global_norm(shapes, seed):
    params = make_params(shapes, seed=seed)
    assert global_norm(params).item() == pytest.approx(reference.norm(named(params)), rel=1e-14)


def test_norms_are_in_the_order_of_tensors_on_several_devices():
    tensors = [torch.full((2,), value, device=device) for value, device in ((3.0, "cpu"), (0.0, "meta"), (4.0, "cpu"))]
    norms = tensor_norms(tensors, torch.float32)
    assert [norm.device.type for norm in norms] == ["cpu", "meta", "cpu"]
    assert norms[2].item() == pytest.approx(4.0 * math.sqrt(2))


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.complex64], torch.float32),
        ([torch.complex128, torch.float16], torch.float64),
    ],
)
def test_global_norm_of_several_dtypes(dtypes, result):
    tensors = [torch.full((10_000,), 300.0).to(dtype) for dtype in dtypes]  # the squares overflow float16
    norm = global_norm(tensors)
    assert norm.dtype is result
    assert norm.item() == pytest.approx(300 * 100 * math.sqrt(len(dtypes)), rel=2e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_shows_values_that_are_not_finite(bad):
    tensors = [torch.ones(3), torch.ones(2)]
    assert global_norm(tensors).isfinite()
    tensors[1][1] = bad
    assert not global_norm(tensors).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_is_finite_at_zero(dtype):
    assert inverse(torch.tensor(4.0, dtype=dtype)) == 0.25
    at_zero = inverse(torch.tensor(0.0, dtype=dtype))
    assert at_zero.isfinite()
    assert at_zero * 0.0 == 0.0


def test_direction_factor():
    grads, scale = [torch.tensor([3.0, 4.0])], torch.tensor(8.0)
    assert direction_factor(Update("gradient", 1.0), grads, None) is None
    assert direction_factor(Update("gradient", 1.0), grads, scale) == 1 / 8
    assert direction_factor(Update("normalized", 1.0), grads, scale) == 1 / 5
    third = direction_factor(Update("gradient", 1.0), [grads[0].double()], torch.tensor(3.0))
    assert third.dtype is torch.float64
    assert third == 1 / 3


def test_a_known_norm_is_not_recomputed():
    """Except for the adaptive direction, which uses a different norm."""
    grads, norm = [torch.tensor([3.0, 4.0])], torch.tensor(10.0)
    assert direction_factor(Update("normalized", 1.0), grads, None, norm) == 1 / 10
    assert direction_factor(Update("adaptive", 0.0), grads, None, norm) == 1 / 5


def test_only_wide_dtypes_on_the_cpu_count_as_on_host():
    wide = [torch.ones(1), torch.ones(1, dtype=torch.float64)]
    assert is_on_host(wide)
    for other in (torch.ones(1, device="meta"), torch.ones(1).half(), torch.ones(1).bfloat16()):
        assert not is_on_host([*wide, other])


def expected_direction(kind, theta, grads, eta):
    if kind == "gradient":
        return grads
    if kind == "normalized":
        return reference.unit(grads)
    t = {name: theta[name].abs() + eta for name in theta}
    scaled = reference.unit({name: t[name] * grads[name] for name in theta})
    return {name: t[name] * scaled[name] for name in theta}


@pytest.mark.parametrize("kind", DIRECTIONS)
@given(seed=st.integers(0, 1000), steps=st.lists(st.floats(0.01, 1), min_size=1, max_size=3), eta=st.floats(0, 1))
def test_moves_along_the_direction_and_comes_back(kind, seed, steps, eta):
    params = make_params([(3,), (2, 3), ()], seed=seed)
    theta, grads = named(params), named(p.grad for p in params)
    update = Update(kind, 0.0 if kind == "adaptive" else 0.5, eta=eta if kind == "adaptive" else 0.0)
    direction = expected_direction(kind, theta, grads, eta)
    first, *others = [sign * step for step in steps for sign in (1, -1)]
    with Perturbation(params, WeightStorage()) as perturbation:
        assert perturbation.displace(update, first) is None
        assert_near(named(params), reference.combine(1.0, theta, first, direction), 1e-13)
        for step in others:
            perturbation.move_to(step)
            assert_near(named(params), reference.combine(1.0, theta, step, direction), 1e-13)
            if kind != "adaptive":  # which overwrites the gradient
                assert_same(named(p.grad for p in params), grads)
    assert all(torch.equal(p, theta[n]) for n, p in zip(theta, params, strict=True))


@pytest.mark.parametrize("kind", DIRECTIONS)
@given(seed=st.integers(0, 1000), eta=st.floats(0, 1))
def test_on_an_accelerator_the_gradient_becomes_the_direction(kind, seed, eta):
    """And the factor between them is returned, to recover the gradient."""
    params = make_params([(3,), (2, 3), ()], seed=seed)
    theta, grads = named(params), named(p.grad for p in params)
    eta = eta if kind == "adaptive" else 0.0
    direction = expected_direction(kind, theta, grads, eta)
    with treated_as_accelerator(), Perturbation(params, WeightStorage()) as perturbation:
        factor = perturbation.displace(Update(kind, 0.0, eta=eta), 0.1)
        assert (factor is None) is (kind == "gradient")
        assert_near(named(params), reference.combine(1.0, theta, 0.1, direction), 1e-13)
        if kind != "adaptive":
            assert_near(named(p.grad / (1.0 if factor is None else factor) for p in params), grads, 1e-13)
    assert all(torch.equal(p, theta[n]) for n, p in zip(theta, params, strict=True))


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_restores_bit_for_bit_after_an_exception(kind, dtype):
    params = make_params([(100,), (7, 3)], dtype, scale=30.0)
    before = [p.detach().clone() for p in params]
    storage = WeightStorage()
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        with suppress(KeyboardInterrupt), Perturbation(params, storage) as perturbation:
            perturbation.displace(Update(kind, 0.0), 0.7)
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            raise KeyboardInterrupt
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zero_gradients_move_nothing(kind, dtype):
    params = make_params([(3,), (2, 2)], dtype, scale=0.0)
    before = named(params)
    for distance in (10.0, -10.0):
        with Perturbation(params, WeightStorage()) as perturbation:
            perturbation.displace(Update(kind, 0.0), distance)
            assert all(torch.equal(p, before[n]) for n, p in zip(before, params, strict=True))


@pytest.mark.parametrize("kind", ["gradient", "normalized"])
def test_a_loss_scale_is_removed_from_the_step_but_not_from_the_gradient(kind):
    for scale in (1.0, 2.0**16):
        params = make_params([(3,), (2, 2)], scale=scale)
        theta, grads = named(params), named(p.grad / scale for p in params)
        direction = expected_direction(kind, theta, grads, 0.0)
        with Perturbation(params, WeightStorage()) as perturbation:
            perturbation.displace(Update(kind, 0.25), 0.1, torch.tensor(scale))
            assert_near(named(params), reference.combine(1.0, theta, 0.1, direction), 1e-13)
        assert_near(named(p.grad for p in params), {n: scale * g for n, g in grads.items()}, 1e-13)


def test_the_copy_is_kept_between_steps_and_renewed_for_other_parameters():
    params, others = make_params([(3,), (2,)]), make_params([(4,)])
    storage = WeightStorage()
    storage.take(params)
    first = list(storage.copy.copies)
    with torch.no_grad():
        params[0].add_(1.0)
    with Perturbation(params, storage):
        assert all(a is b for a, b in zip(first, storage.copy.copies, strict=True))
        assert torch.equal(storage.copy.copies[0], params[0])
    storage.take(others)
    assert [t.shape for t in storage.copy.copies] == [(4,)]


def test_leaving_without_a_displacement_writes_nothing():
    params = make_params([(3,)])
    storage = WeightStorage()
    with Perturbation(params, storage) as perturbation:
        storage.copy.copies[0].fill_(7.0)
    perturbation.restore()
    assert not (params[0] == 7.0).any()


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_an_earlier_graph_stays_valid(kind):
    """The weights are restored bit for bit, and so are their version counters."""
    params = make_params([(3,)])
    loss = (params[0] ** 2).sum()
    version = params[0]._version
    with Perturbation(params, WeightStorage()) as perturbation:
        perturbation.displace(Update(kind, 0.0), 0.1)
        perturbation.move_to(-0.1)
    assert params[0]._version == version
    params[0].grad = None
    loss.backward()
    torch.testing.assert_close(params[0].grad, 2 * params[0].detach())


def test_moving_requires_an_earlier_displacement():
    with (
        Perturbation(make_params([(3,)]), WeightStorage()) as perturbation,
        pytest.raises(RuntimeError, match="displace"),
    ):
        perturbation.move_to(0.1)
