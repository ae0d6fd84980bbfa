"""The passes of a closure, each by itself."""

from contextlib import contextmanager

import pytest
import torch
from modules import Counts, assert_same, cross_entropy, gradients, make_batches, mlp, with_momentum
from outside import Record

from lightning_gr import in_second_pass
from lightning_gr.core.ahead import Ahead
from lightning_gr.core.storage import WeightStorage
from lightning_gr.replay.closure import ClosurePasses
from lightning_gr.replay.evaluation import Surroundings
from lightning_gr.replay.footprint import Footprint


def passes_of(net, loss_fn, **options):
    surroundings = Surroundings(Footprint(lambda: {"net": net}), trained=lambda: list(net.parameters()))
    backward = {"backward": torch.Tensor.backward, "backward_again": torch.Tensor.backward}
    return ClosurePasses(loss_fn, surroundings, WeightStorage(), **(backward | options))


@pytest.mark.parametrize("only", [True, False])
def test_the_first_pass_is_at_the_point_ahead_and_the_clean_loss_is_not(only):
    """The latter leaves no trace, and is not reduced over devices."""
    net, batch, unsynced, flags = Counts(), make_batches()[0], Record(), Record()
    ahead = Ahead(with_momentum(net), net.parameters(), 0.5, WeightStorage())
    net.count.zero_()

    @contextmanager
    def without_sync():
        unsynced.append(1)
        yield
        unsynced.clear()

    def loss_fn():
        flags.append((in_second_pass(), len(unsynced)))
        sum(param.sum() for param in net.parameters()).backward()  # as for a penalty
        return {"loss": cross_entropy(net, batch)}

    def backward(loss):
        with ahead.displaced(again=True):
            loss.backward()

    def loss_of(module):
        return cross_entropy(lambda x: module(x) * 2, batch).detach()  # the count is 1 in each pass

    expected = loss_of(net.net)
    with ahead.displaced():
        expected_ahead = loss_of(net.net)
    passes = passes_of(net, loss_fn, ahead=ahead, without_sync=without_sync, backward=backward)
    assert torch.equal(passes.first(only=only), expected_ahead)
    if only:  # nothing can be evaluated again
        assert flags == [(False, 0)]
        return
    before = gradients(net)
    clean = passes.clean_loss()
    assert torch.equal(clean, expected)
    assert not clean.requires_grad
    assert_same(gradients(net), before)
    assert net.count == 1
    assert flags == [(False, 0), (True, 1)]


def test_how_to_get_to_the_point_ahead_may_be_given():
    """For example with the buffers that belong there."""
    net, entered = mlp(), []

    @contextmanager
    def displaced():
        entered.append(1)
        yield

    ahead = Ahead(with_momentum(net), net.parameters(), 0.5, WeightStorage())
    loss_fn = lambda: cross_entropy(net, make_batches()[0])  # noqa: E731
    assert torch.equal(passes_of(net, loss_fn, ahead=ahead, displaced=displaced).first(), loss_fn())
    assert entered == [1]


def test_there_may_be_no_loss_at_the_weights():
    net = mlp()
    passes = passes_of(net, lambda: None if in_second_pass() else cross_entropy(net, make_batches()[0]))
    passes.first()
    assert passes.clean_loss() is None


WRITES = {
    "in place": (lambda net: net[0].bias.grad.mul_(2), True),
    "through data": (lambda net: net[0].bias.grad.data.mul_(2), True),
    "another one": (lambda net: setattr(net[0].bias, "grad", torch.zeros_like(net[0].bias)), True),
    "none": (lambda net: None, False),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_of_a_closure_to_earlier_gradients_are_noticed(write):
    net, batch = mlp(), make_batches()[0]
    change, writes = WRITES[write]
    cross_entropy(net, batch).backward()

    def loss_fn():
        change(net)
        return cross_entropy(net, batch)

    passes = passes_of(net, loss_fn)
    for options in ({}, {"only": True}, {"only": True, "later": True}):  # where it makes no difference
        passes.first(**options)
        assert not passes.writes_gradients
    passes.first(later=True)
    assert passes.writes_gradients == writes


@pytest.mark.parametrize("sees", [True, False])
def test_whether_a_closure_finds_earlier_gradients_in_a_second_pass(sees):
    net, batch, found = mlp(), make_batches()[0], Record()

    def loss_fn():
        found.append(net[0].bias.grad is not None)
        return cross_entropy(net, batch)

    passes = passes_of(net, loss_fn)
    passes.first()
    passes.replay(lambda loss: loss, sees=sees)
    assert found == [False, sees]


def test_a_flooded_loss_is_another_tensor_for_hooks():
    """So that a loss that the closure itself keeps has none."""
    net, batch, kept = mlp(), make_batches()[0], Record()

    def loss_fn():
        kept.append(cross_entropy(net, batch))
        return kept[-1]

    flooded = []
    passes = passes_of(net, loss_fn, flood=flooded.append)
    passes.first()
    passes.replay(lambda loss: loss)
    assert [loss.item() for loss in flooded] == [loss.item() for loss in kept]
    assert not any(a is b for a, b in zip(flooded, kept, strict=True))
