"""``.grad`` before and after a pass: no gradient is lost, and none is counted twice."""

from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_gr.core.gradients import (
    BackwardCheck,
    StashedGradients,
    check_graphless,
    hidden_gradients,
    unchanged_gradients,
)


def make_params(*values):
    params = [nn.Parameter(torch.zeros(3)) for _ in values]
    for param, value in zip(params, values, strict=True):
        param.grad = None if value is None else torch.full((3,), float(value))
    return params


def grads(params):
    return [None if p.grad is None else p.grad[0].item() for p in params]


# --- checked


def test_present_gradients_pass_and_so_do_missing_ones_without_hooks():
    BackwardCheck([], thorough=True).done()
    for params in (make_params(1, None), make_params(None, None)):
        for thorough in (True, False):
            check = BackwardCheck(params, thorough)
            params[0].grad = torch.ones(3)
            check.done()
            params[0].grad = None
            check.done()


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_parameter_that_is_written_in_the_backward_pass_is_refused(thorough, value):
    params = make_params(1, 2)
    with torch.no_grad():
        params[0].fill_(value)
    check = BackwardCheck(params, thorough)
    check.done()
    params[1].data += 1  # does not increase the version counter
    with pytest.raises(RuntimeError, match="during the backward pass") if thorough else nullcontext():
        check.done()
    with torch.no_grad():
        params[1] += 1
    with pytest.raises(RuntimeError, match="during the backward pass"):
        check.done()


def test_hooks_that_drop_all_gradients_are_refused():
    params = make_params(1, 2)
    params[1].register_post_accumulate_grad_hook(int)
    check = BackwardCheck(params)
    params[1].grad = None
    check.done()
    params[0].grad = None
    with pytest.raises(RuntimeError, match="during the backward pass"):
        check.done()


@pytest.mark.parametrize("graph", [True, False])
def test_gradients_with_a_graph_are_refused(graph):
    param = nn.Parameter(torch.ones(2))
    (grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=graph)
    with pytest.raises(RuntimeError, match="create_graph=True") if graph else nullcontext():
        check_graphless([torch.ones(2), grad])


# --- stashed


def test_a_stashed_gradient_is_added_once():
    params, stashed = make_params(1, 2, None), StashedGradients()
    kept = [p.grad for p in params]
    assert not stashed
    stashed.stash(params)
    assert stashed
    assert grads(params) == [None] * 3
    params[1].grad, params[2].grad = torch.full((3,), 10.0), torch.full((3,), 20.0)
    stashed.restore()
    assert grads(params) == [1, 12, 20]
    assert params[0].grad is kept[0]  # not copied
    assert not stashed
    stashed.restore()
    assert grads(params) == [1, 12, 20]


def test_restores_some_parameters_and_scales_by_a_factor():
    params, stashed = make_params(1, 2, 3), StashedGradients()
    stashed.stash(params)
    params[1].grad = torch.ones(3)
    stashed.restore(params[:2], 0.5)
    assert grads(params) == [0.5, 2, None]
    assert stashed
    stashed.restore()
    assert grads(params) == [0.5, 2, 3]


def test_a_restore_can_be_undone_until_it_is_cleared():
    params, stashed = make_params(1, 2, 3), StashedGradients()
    stashed.stash(params)
    stashed.restore(params[:1], 0.25)
    stashed.restore(params[1:], 0.25)
    for param in params:  # as before a pass that recomputes them
        param.grad = None
    stashed.undo(params[:2])
    stashed.restore()
    assert grads(params) == [1, 2, None]
    stashed.clear()
    stashed.undo(params)
    assert not stashed


def test_a_view_of_a_bucket_is_copied():
    """The next backward pass would overwrite it."""
    (param,), bucket, stashed = make_params(None), torch.full((6,), 5.0), StashedGradients()
    param.grad = bucket[3:]
    stashed.stash([param])
    bucket.zero_()
    stashed.restore()
    assert grads([param]) == [5]


def test_a_sparse_gradient_is_stashed_as_it_is():
    embedding, stashed = nn.Embedding(4, 2, sparse=True), StashedGradients()
    embedding(torch.tensor([1, 3])).sum().backward()
    grad = embedding.weight.grad
    assert grad.is_sparse
    stashed.stash([embedding.weight])
    assert embedding.weight.grad is None
    stashed.restore()
    assert embedding.weight.grad is grad


# --- hidden


def test_a_step_finds_no_gradient_and_cannot_touch_it():
    params = make_params(1, 2, 3, None)
    kept = [p.grad for p in params]
    with suppress(KeyboardInterrupt), hidden_gradients(params, added=params[1:2]):
        assert grads(params) == [None] * 4
        for param in (params[0], params[1], params[3]):
            param.grad = torch.full((3,), 10.0)
        raise KeyboardInterrupt
    assert grads(params) == [1, 12, 3, None]
    assert all(p.grad is k for p, k in zip(params, kept, strict=True))


def test_a_backward_pass_of_the_step_itself_counts_without_an_earlier_gradient():
    params = make_params(None)
    with hidden_gradients(params, added=params):
        params[0].sum().backward()
    assert grads(params) == [1]


# --- unchanged


@pytest.mark.parametrize("value", [None, 7])
def test_accumulated_gradients_are_zero(value):
    """Accumulation still runs, since DDP waits for its hooks."""
    first, second = make_params(value, 1)
    arrived = []
    node = first.view_as(first).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: arrived.append(first))
    with suppress(KeyboardInterrupt), unchanged_gradients([first]):
        (first + second).sum().backward()
        raise KeyboardInterrupt
    assert arrived == [first]
    assert grads([first, second]) == [value or 0, 2]
    first.sum().backward()
    assert grads([first]) == [(value or 0) + 1]


def test_a_frozen_parameter_is_left_alone():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with unchanged_gradients([frozen]):
        pass
    assert frozen.grad is None


def test_the_gradient_of_a_distributed_parameter_is_restored(mesh):
    """FSDP2 writes gradients without calling the hooks of parameters."""
    spread, plain = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, (Shard(0), Replicate()))), make_params(1)[0]
    old = spread.grad = torch.ones_like(spread)
    with suppress(KeyboardInterrupt), unchanged_gradients([spread, plain]):
        assert spread.grad is None
        spread.grad = 5 * old
        raise KeyboardInterrupt
    assert spread.grad is old
    assert grads([plain]) == [1]
