"""Norms, directions, and a perturbation that is taken back bit for bit."""

import math
from contextlib import suppress

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import assert_near

from lightning_gr.core.perturb import Perturbation, WeightCopy, direction_factor, global_norm, inverse, tensor_norms
from lightning_gr.core.rules import Probe, Update

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
def test_the_norm_tells_what_is_not_finite(bad):
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
    with Perturbation(update, params, WeightCopy()) as perturbation:
        for step in (sign * step for step in steps for sign in (1, -1)):
            perturbation.move_to(step)
            assert_near(named(params), reference.combine(1.0, theta, step, direction), 1e-13)
            if update.keep:
                assert_near(named(p.grad for p in params), {n: 0.5 * g for n, g in grads.items()}, 1e-14)
            else:
                assert all(p.grad is None for p in params)
    assert all(torch.equal(p, theta[n]) for n, p in zip(theta, params, strict=True))


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_restores_bit_for_bit_after_an_exception(kind, dtype):
    params = make_params([(100,), (7, 3)], dtype, scale=30.0)
    before = [p.detach().clone() for p in params]
    copy = WeightCopy()
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        with suppress(KeyboardInterrupt), Perturbation(Update(kind, 0.0), params, copy) as perturbation:
            perturbation.move_to(0.7)
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            raise KeyboardInterrupt
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zero_gradients_move_nothing(kind, dtype):
    params = make_params([(3,), (2, 2)], dtype, scale=0.0)
    before = named(params)
    with Perturbation(Update(kind, 0.0), params, WeightCopy()) as perturbation:
        perturbation.move_to(10.0)
        assert all(torch.equal(p, before[n]) for n, p in zip(before, params, strict=True))


@pytest.mark.parametrize("kind", ["gradient", "normalized"])
def test_a_loss_scale_is_taken_out_of_the_step_and_left_in_the_gradient(kind):
    for scale in (1.0, 2.0**16):
        params = make_params([(3,), (2, 2)], scale=scale)
        theta, grads = named(params), named(p.grad / scale for p in params)
        direction = expected_direction(kind, theta, grads, 0.0)
        with Perturbation(Update(kind, 0.25), params, WeightCopy(), torch.tensor(scale)) as perturbation:
            perturbation.move_to(0.1)
            assert_near(named(params), reference.combine(1.0, theta, 0.1, direction), 1e-13)
        assert_near(named(p.grad for p in params), {n: 0.25 * scale * g for n, g in grads.items()}, 1e-13)


def test_the_copy_is_kept_between_steps_and_renewed_for_other_parameters():
    params, others = make_params([(3,), (2,)]), make_params([(4,)])
    copy, update = WeightCopy(), Update("normalized", 0.0, (Probe(0.1, 1.0),))
    copy.take(params)
    first = list(copy.tensors)
    with torch.no_grad():
        params[0].add_(1.0)
    with Perturbation(update, params, copy):
        assert all(a is b for a, b in zip(first, copy.tensors, strict=True))
        assert torch.equal(copy.tensors[0], params[0])
    copy.take(others)
    assert [t.shape for t in copy.tensors] == [(4,)]


def test_leaving_without_a_move_writes_nothing():
    params = make_params([(3,)])
    version = params[0]._version
    with Perturbation(Update("gradient", 0.5), params, WeightCopy()) as perturbation:
        pass
    perturbation.restore()
    assert params[0]._version == version
