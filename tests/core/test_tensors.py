"""Lists of tensors treated as one vector: inner products in every dtype, and random vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.core.tensors import inner_product, random_signs, random_unit, scale_, wide

SHAPES = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (0,)]), min_size=1, max_size=4)


def draw(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(shapes=SHAPES, seed=st.integers(0, 1000))
def test_inner_product_is_the_sum_over_all_entries(shapes, seed):
    xs, ys = draw(shapes, seed), draw(shapes, seed + 1)
    pairs = [(a, b) for x, y in zip(xs, ys, strict=True) for a, b in zip(x.flatten(), y.flatten(), strict=True)]
    assert inner_product(xs, ys).item() == pytest.approx(sum(float(a) * float(b) for a, b in pairs), abs=1e-12)


def test_complex_tensors_count_as_pairs_of_real_ones():
    x, y = (torch.randn(4, dtype=torch.complex128) for _ in range(2))
    real = [torch.view_as_real(z) for z in (x, y)]
    torch.testing.assert_close(inner_product([x], [y]), inner_product(real[:1], real[1:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_tensors_are_summed_in_float32(dtype):
    """The square of 300 overflows float16, and bfloat16 cannot count by ones beyond 256."""
    x = [torch.full((1000,), 300.0, dtype=dtype)]
    assert inner_product(x, x).dtype is torch.float32
    assert inner_product(x, x).item() == pytest.approx(9e7, rel=1e-2)
    assert wide(x[0]).dtype is torch.float32
    double = torch.ones(2, dtype=torch.float64)
    assert wide(double) is double


def test_the_result_is_on_the_first_device():
    xs = [torch.ones(2, device=device) for device in ("meta", "cpu")]
    assert inner_product(xs, xs).device.type == "meta"


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shorter"):
        inner_product([torch.ones(2), torch.ones(2)], [torch.ones(2)])


def test_signs_are_independent_and_fair():
    like = [torch.empty(100, 100, dtype=torch.float16), torch.empty(5000)]
    signs = random_signs(like, torch.Generator().manual_seed(0))
    assert [(s.shape, s.dtype) for s in signs] == [(x.shape, torch.float32) for x in like]
    every = torch.cat([s.flatten() for s in signs])
    assert set(every.tolist()) == {-1.0, 1.0}
    assert abs(every.mean()) < 0.03
    assert abs((every[1:] * every[:-1]).mean()) < 0.03
    again = random_signs(like, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again, signs, strict=True))


@pytest.mark.parametrize("draw", [random_signs, random_unit])
def test_random_numbers_do_not_depend_on_the_default_dtype(draw):
    (single,) = draw([torch.empty(3)], torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.float64)
    try:
        (again,) = draw([torch.empty(3, dtype=torch.float32)], torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, single)


def test_signs_are_on_the_device_of_their_template():
    (signs,) = random_signs([torch.empty(3, device="meta")], torch.Generator())
    assert signs.device.type == "meta"


def test_unit_vectors_have_length_one_and_no_preferred_direction():
    like = [torch.empty(3, 2, dtype=torch.float64), torch.empty(4)]
    generator = torch.Generator().manual_seed(0)
    drawn = [random_unit(like, generator) for _ in range(2000)]
    assert [x.dtype for x in drawn[0]] == [torch.float64, torch.float32]
    every = torch.stack([torch.cat([x.flatten().double() for x in vector]) for vector in drawn])
    torch.testing.assert_close(every.norm(dim=1), torch.ones(2000, dtype=torch.float64), rtol=1e-6, atol=0)
    assert every.mean(dim=0).abs().max() < 0.03
    torch.testing.assert_close(every.T @ every / 2000, torch.eye(10, dtype=torch.float64) / 10, rtol=0, atol=0.02)
    again = random_unit(like, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again, drawn[0], strict=True))


@pytest.mark.parametrize("factor", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_scaling_is_in_place_in_full_precision_and_on_each_device(factor):
    tensors = [torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta"), torch.ones(3), torch.empty(0)]
    tensor = tensors[0]
    scale_(tensors, factor)
    assert torch.equal(tensor, torch.full((2,), 0.1, dtype=torch.float64))
    assert torch.equal(tensors[2], torch.full((3,), 0.1))
