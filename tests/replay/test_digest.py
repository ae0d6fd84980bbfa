"""A digest changes if any bit of a tensor changes, and only then."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.replay import digest
from lightning_gr.replay.digest import digests

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def make(dtype, count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (count,), generator=generator).to(dtype)


@pytest.fixture(params=["host", "accelerator"], autouse=True, scope="module")
def way(request):
    """Compute digests in both ways, as on the host and as on an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "accelerator":
            patch.setattr(digest, "_is_on_host", lambda tensor: False)
        yield request.param


def digest_of(tensor):
    return digests([tensor])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_changed_bit_changes_the_digest(dtype, data):
    tensor = make(dtype)
    before = digest_of(tensor)
    assert digest_of(tensor.clone()) == before
    raw = tensor.view(torch.uint8)
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 0 if dtype is torch.bool else 7))
    raw[at] ^= 1 << bit
    assert digest_of(tensor) != before
    raw[at] ^= 1 << bit
    assert digest_of(tensor) == before


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.bool])
@given(first=st.integers(0, 49), second=st.integers(0, 49))
def test_swapped_entries_change_the_digest(dtype, first, second):
    tensor = torch.arange(50).to(dtype)
    other = tensor.clone()
    other[first], other[second] = tensor[second], tensor[first]
    assert (digest_of(other) == digest_of(tensor)) is (first == second)


def test_equal_numbers_with_different_bits_differ():
    zeros, nans = torch.zeros(3), torch.full((3,), float("nan"))
    assert digest_of(-zeros) != digest_of(zeros)
    assert digest_of(nans) == digest_of(nans.clone())  # although NaN does not equal itself
    changed = nans.clone()
    changed.view(torch.int32)[1] += 1  # a NaN with other bits
    assert changed.isnan().all()
    assert digest_of(changed) != digest_of(nans)
    one = zeros.clone()
    one[2] = float("nan")
    assert digest_of(one) != digest_of(zeros)


def test_entries_that_change_together_do_not_cancel():
    tensor = torch.zeros(1000, dtype=torch.int64)
    seen = {digest_of(tensor)}
    for value in (1, -1, 2**62, -(2**62)):
        for at in range(0, 1000, 100):
            other = tensor.clone()
            other[at], other[999 - at] = value, -value
            seen.add(digest_of(other))
            seen.add(digest_of(torch.full_like(tensor, value)))
    assert len(seen) == 1 + 4 * 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_signs_that_change_together_do_not_cancel(dtype):
    tensor = make(dtype) + 1
    seen = {digest_of(tensor), digest_of(-tensor)}
    for at in range(0, 50, 2):
        other = tensor.clone()
        other[at : at + 2].neg_()
        seen.add(digest_of(other))
    assert len(seen) == 2 + 25


def test_tensors_of_several_slabs(monkeypatch):
    """Each slab has weights of its own, and its position matters."""
    monkeypatch.setattr(digest, "_SLAB", 8)
    digest._weights.cache_clear()
    tensor = make(torch.float32, 50)
    seen = {digest_of(tensor)}
    for at in range(50):
        other = tensor.clone()
        other[at] += 1
        seen.add(digest_of(other))
    seen |= {digest_of(tensor.roll(8)), digest_of(torch.cat([tensor[8:16], tensor[:8], tensor[16:]]))}
    assert len(seen) == 53
    digest._weights.cache_clear()


def test_the_first_of_many_slabs_counts(monkeypatch):
    """Its bits are not shifted out of the 64 bits of the digest."""
    monkeypatch.setattr(digest, "_SLAB", 8)
    digest._weights.cache_clear()
    tensor = torch.zeros(8 * 70)
    before = digest_of(tensor)
    tensor[0] = 1.0
    assert digest_of(tensor) != before
    digest._weights.cache_clear()


def test_the_length_counts():
    assert len({digest_of(torch.zeros(n)) for n in range(10)}) == 10


@pytest.mark.parametrize(
    "make_view", [lambda t: t.T, lambda t: t[::2], lambda t: t[:, 1:], lambda t: t.expand(2, 4, 6)]
)
def test_views_count_by_their_entries(make_view):
    base = make(torch.float32, 24).view(4, 6)
    view = make_view(base)
    assert digest_of(view) == digest_of(view.contiguous())
    before = digest_of(view)
    view.flatten()  # only reads
    assert digest_of(view) == before
    base += 1
    assert digest_of(view) != before


def test_conjugate_views_count_by_their_values():
    tensor = torch.randn(4, dtype=torch.complex64)
    assert digest_of(tensor.conj()) == digest_of(tensor.conj().resolve_conj()) != digest_of(tensor)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta", "ignore:.*nested tensors.*")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_tensors(layout):
    dense = torch.zeros(4, 6)
    dense[1, 2], dense[3, 0] = 1.0, 2.0
    tensors = [getattr(value, layout)() for value in (dense, 2 * dense, dense.roll(1, 1))]
    assert len(set(digests(tensors))) == 3
    assert digest_of(getattr(dense, layout)()) == digest_of(tensors[0])


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", ["to_sparse_bsr", "to_sparse_bsc"])
def test_sparse_blocks(layout):
    dense = torch.zeros(4, 6)
    dense[1, 2], dense[3, 0] = 1.0, 2.0
    tensors = [getattr(value, layout)((2, 2)) for value in (dense, 2 * dense, dense.roll(2, 0), dense.roll(2, 1))]
    assert len(set(digests(tensors))) == 4


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
def test_quantized_tensors():
    codes = [torch.tensor(values, dtype=torch.float32) for values in ((1, 2, 3), (1, 2, 4))]
    first, second, again = (torch.quantize_per_tensor(x, 0.5, 0, torch.qint8) for x in (*codes, codes[0]))
    assert digest_of(first) == digest_of(again) != digest_of(second)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    parts = [torch.arange(3.0), torch.arange(2.0)]
    whole = digest_of(torch.nested.nested_tensor(parts))
    assert digest_of(torch.nested.nested_tensor(parts)) == whole
    assert digest_of(torch.nested.nested_tensor([parts[0], parts[1] + 1])) != whole


def test_several_digests_at_once():
    tensors = [make(dtype, 5, seed) for seed, dtype in enumerate(DTYPES)] + [torch.zeros(0)]
    assert digests(tensors) == [digest_of(tensor) for tensor in tensors]
    assert digests([]) == []


def test_a_digest_creates_no_graph():
    tensor = torch.ones(3, requires_grad=True)
    digest_of(tensor)
    assert tensor.grad_fn is None


def test_a_storage_can_still_be_resized():
    tensor = torch.ones(3)
    digest_of(tensor)
    tensor.resize_(10**6)
