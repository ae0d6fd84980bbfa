"""Moving parameters by swapping their storage: same results as copying, and only where nothing else reads them."""

import functools
from contextlib import nullcontext, suppress

import pytest
import torch
from interrupter import Interrupter, second_pass_of
from modules import METHODS, MOVING, TinyModule, assert_same, cross_entropy, fit, gradients, make_batches, mlp, weights
from outside import Record
from torch import nn

from lightning_gr import SAMRule, in_second_pass, regularized_backward
from lightning_gr.core import storage as swap
from lightning_gr.core.perturb import Perturbation
from lightning_gr.core.rules import Update
from lightning_gr.core.storage import WeightStorage

LARGE = (256, 256)


@pytest.fixture
def _all_swapped(monkeypatch):
    monkeypatch.setattr(swap, "SMALLEST", 0)


def make_param(shape=LARGE, dtype=torch.float32):
    param = nn.Parameter(torch.randn(shape, dtype=dtype))
    param.grad = torch.randn_like(param)
    return param


# --- the same as copying


@pytest.mark.parametrize("name", METHODS)
def test_same_gradient_as_by_copying_bit_for_bit(name, monkeypatch):
    results = []
    for smallest in (0, 2**40):
        monkeypatch.setattr(swap, "SMALLEST", smallest)
        net, batch = mlp(6, 6), make_batches()[0]
        places = [p.data_ptr() for p in net.parameters()]
        before = weights(net)
        for _ in range(2):
            net.zero_grad()
            loss_fn = functools.partial(cross_entropy, net, batch)
            regularized_backward(loss_fn, net, METHODS[name].rule, exclude=["0.bias"])
        assert_same(weights(net), before)
        assert [p.data_ptr() for p in net.parameters()] == places
        results.append(gradients(net))
    assert_same(*results)


@pytest.mark.parametrize("name", MOVING)
def test_trains_to_the_same_weights_and_does_swap(name, monkeypatch):
    results, places = [], Record()

    class Looks(TinyModule):
        def training_step(self, batch, batch_idx):
            places[-1].add(self.net[0].weight.data_ptr())
            return super().training_step(batch, batch_idx)

    for smallest in (0, 2**40):
        monkeypatch.setattr(swap, "SMALLEST", smallest)
        places.append(set())
        module = Looks()
        fit(module, METHODS[name].callback(), max_epochs=2)
        results.append(weights(module.net))
    assert_same(*results)
    assert [len(each) > 1 for each in places] == [True, False]


@pytest.mark.usefixtures("_all_swapped")
def test_float32_of_several_shapes_and_strides():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    assert all(map(swap.can_swap, net.parameters()))
    before, grads = weights(net), gradients(net)
    with Perturbation(list(net.parameters()), WeightStorage()) as perturbation:
        perturbation.displace(Update("gradient", 0.5), 0.1)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p, before[name] + 0.1 * grads[name])
            assert p.stride() == before[name].stride()
        perturbation.move_to(-0.2)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p, before[name] - 0.2 * grads[name])
    assert_same(weights(net), before)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_adaptive_direction_by_swapping_and_by_copying(eta, monkeypatch):
    results = []
    for smallest in (0, 2**40):
        monkeypatch.setattr(swap, "SMALLEST", smallest)
        torch.manual_seed(0)
        params = [make_param((3, 2)), make_param((4,))]
        theta, grads = ([x.detach().clone() for x in each] for each in (params, [p.grad for p in params]))
        storage = WeightStorage()
        storage.take(params)
        assert len(storage.swap.params) == (2 if smallest == 0 else 0)
        with torch.no_grad():
            storage.scale_direction_(eta)
            storage.displace(0.25)
        for param, old, grad in zip(params, theta, grads, strict=True):
            torch.testing.assert_close(param.detach(), old + 0.25 * (old.abs() + eta) ** 2 * grad)
        results.append([p.detach().clone() for p in params])
        with torch.no_grad():
            storage.put_back()
            storage.displace(0.25)  # no longer scaled
        for param, old in zip(params, theta, strict=True):
            torch.testing.assert_close(param.detach(), old + 0.25 * param.grad)
        storage.put_back()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- only where it is safe


def flat_view():
    flat = torch.randn(2 * 256 * 256)
    return nn.Parameter(flat[: 256 * 256].view(LARGE)), flat


def data_alias():
    param = make_param()
    return param, param.data


def view_of_it():
    param = make_param()
    return param, param.detach()[0]


def array():
    param = make_param()
    return param, param.detach().numpy()


def tied_data():
    param = make_param()
    return param, nn.Parameter(param.data)


def shared_memory():
    return make_param().share_memory_(), None


def small():
    return make_param((3,)), None


def half():
    return make_param(dtype=torch.bfloat16), None


def subclass():
    class Own(nn.Parameter):
        pass

    return Own(torch.randn(LARGE)), None


def expanded():
    return nn.Parameter(torch.randn(256, 1).expand(LARGE)), None


def elsewhere():
    return nn.Parameter(torch.empty(LARGE, device="meta")), None


def complex_numbers():
    return make_param(dtype=torch.complex64), None


UNSAFE = [
    flat_view, data_alias, view_of_it, array, tied_data, shared_memory, small, half, subclass, expanded, elsewhere,
    complex_numbers,
]  # fmt: skip


@pytest.mark.parametrize("make", UNSAFE, ids=lambda make: make.__name__)
def test_shared_storage_is_not_swapped(make):
    param, other = make()
    if param.grad is None:
        param.grad = torch.randn(param.shape, device=param.device)
    assert not swap.can_swap(param)
    del other


def test_what_counts_is_the_direction_where_one_is_given():
    """As a momentum, where there is no gradient yet."""
    param, storage = make_param(), WeightStorage()
    direction, param.grad = param.grad, None
    assert swap.can_swap(param, direction)
    assert not swap.can_swap(param, direction.double())
    assert not swap.can_swap(param, None)
    storage.take([param], [direction])
    assert storage.swap.params == [param]
    storage.release()


@pytest.mark.parametrize("shape", [(3,), LARGE])  # copied, and swapped
def test_a_weight_that_is_pointed_elsewhere_meanwhile_is_pointed_back(shape):
    param = make_param(shape)
    before, address = param.detach().clone(), param.data_ptr()
    with Perturbation([param], WeightStorage()) as perturbation:
        perturbation.displace(Update("gradient", 0.5), 0.1)
        param.data = torch.zeros(shape)
    assert torch.equal(param, before)
    assert param.data_ptr() == address


def test_a_gradient_in_a_bucket_is_not_written_to():
    param = make_param()
    assert swap.can_swap(param)
    bucket = torch.randn(2, *LARGE)
    param.grad = bucket[0]
    before = bucket.clone()
    with Perturbation([param], WeightStorage()) as perturbation:
        perturbation.displace(Update("normalized", 0.0), 0.1)
    assert torch.equal(bucket, before)
    param.grad = None
    assert not swap.can_swap(param)


@pytest.mark.usefixtures("_all_swapped")
def test_a_model_that_reads_its_weights_through_a_view_is_perturbed():
    """The flat vector shares memory with the parameters, so their storage must not be swapped."""

    seen = Record()

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            params = list(self.net.parameters())
            self.flat = torch.cat([p.detach().flatten() for p in params])
            for p, part in zip(params, self.flat.split([p.numel() for p in params]), strict=True):
                p.data = part.view(p.shape)

        def forward(self, x):
            seen.append(self.flat.clone())
            return self.net(x)

    net, plain, batch = Flat(), mlp(), make_batches()[0]
    regularized_backward(lambda: cross_entropy(net, batch), net, SAMRule(0.3))
    first, second = seen
    regularized_backward(lambda: cross_entropy(plain, batch), plain, SAMRule(0.3))
    assert_same(gradients(net.net), gradients(plain))
    assert (second - first).norm().item() == pytest.approx(0.3)
    assert torch.equal(net.flat, first)


# --- weights too coarse to move


@pytest.mark.parametrize(("moved", "share"), [(0, "0.0%"), (2, "40.0%"), (3, None)])
def test_warns_of_sixteen_bit_weights_that_do_not_move(moved, share):
    """Only entries with a nonzero direction count, over all tensors with 16-bit dtypes."""
    direction = [torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, -1.0]), torch.ones(9)]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    before = [torch.zeros_like(d, dtype=dtype) for d, dtype in zip(direction, dtypes, strict=True)]
    after = [torch.zeros_like(b) for b in before[:2]] + [torch.ones(9)]
    for tensor, index in [(0, 0), (0, 3), (1, 0)][:moved]:
        after[tensor][index] = 1.0
    told = pytest.warns(UserWarning, match=rf"^Only {share} of the 16-bit weights move: .*'bf16-mixed'")
    with nullcontext() if share is None else told:
        swap._warn_if_unmoved(after, before, direction)


def test_warns_once_and_only_on_request():
    param, asked = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), WeightStorage(check_resolution=True)
    param.grad = torch.ones_like(param)
    told = pytest.warns(UserWarning, match=r"^Only 0\.0%")
    for expected, storage in ((told, asked), (nullcontext(), asked), (nullcontext(), WeightStorage())):
        with expected, Perturbation([param], storage) as perturbation:
            perturbation.displace(Update("gradient", 0.5), 1e-6)


# --- restored in any case


@pytest.mark.slow
@pytest.mark.usefixtures("_all_swapped")
@pytest.mark.parametrize("name", MOVING)
def test_ctrl_c_before_any_bytecode(name):
    net = mlp()
    clean, places = weights(net), [p.data_ptr() for p in net.parameters()]
    count, interrupted = 0, True
    while interrupted:
        count += 61
        interrupter, second_pass = Interrupter(count, "lightning_gr.core"), second_pass_of(name, net)
        with suppress(KeyboardInterrupt), interrupter:
            second_pass()
        interrupted = interrupter.left <= 0
        torch.set_grad_enabled(True)  # torch.no_grad may be interrupted too
        assert_same(weights(net), clean)
        assert [p.data_ptr() for p in net.parameters()] == places
    assert count > 500


@pytest.mark.usefixtures("_all_swapped")
def test_the_spare_storage_is_reused():
    net, storage = mlp(), WeightStorage()
    kept = []
    for keep in (0.0, 0.5, 0.5):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with Perturbation(list(net.parameters()), storage) as perturbation:
            perturbation.displace(Update("normalized", keep), 0.1)
            assert storage.copy.copies == []
            assert len(storage.swap.originals) == len(list(net.parameters()))
        kept.append([t.data_ptr() for t in storage.swap._spare])
        assert storage.params == storage.swap.originals == []
    assert kept[0] == kept[1] == kept[2] != []
    assert not in_second_pass()
