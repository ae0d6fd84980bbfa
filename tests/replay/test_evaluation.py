"""Repeated evaluations start from the same state and leave no trace."""

import random
from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from modules import assert_same, cross_entropy, make_batches, mlp, weights
from outside import Record
from torch import nn

from lightning_gr import in_second_pass
from lightning_gr.replay.evaluation import Evaluation, Surroundings
from lightning_gr.replay.footprint import Footprint


class Busy(nn.Module):
    """Writes wherever it can, and uses what it finds there."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("running", torch.zeros(3, dtype=torch.float64))
        self.count, self.items, self.last, self.table = 0, [], deque(maxlen=2), {"a": {"b": 0}}
        self.array, self.tensor, self.generator = np.zeros(3), torch.zeros(2), random.Random(0)

    def forward(self, x):
        self.count += 1
        self.items.append(self.count)
        self.last.append(self.count)
        self.table["a"]["b"] += 1
        self.array += 1
        self.tensor += 1
        self.new = self.generator.random()
        self.running = self.running * 0.5 + self.count
        noise = torch.rand(()).double() + np.random.rand() + random.random()
        return self.net(x) * (self.count + self.running.sum() + self.new + noise + self.array[0] + len(self.items))

    def state(self):
        return (
            self.count, list(self.items), list(self.last), self.table["a"]["b"], self.array.tolist(),
            self.tensor.tolist(), self.generator.getstate(), self.new, self.running.tolist(),
            torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate(),
        )  # fmt: skip


def make(net, **options):
    seen, batch = Record(), make_batches()[0]

    def compute():
        seen.append((in_second_pass(), net.count))
        return cross_entropy(net, batch)

    surroundings = Surroundings(
        Footprint(lambda: {"self": net}), trained=lambda: list(net.parameters()), **options
    )  # fmt: skip
    return compute, surroundings, seen


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_each_evaluation_has_the_same_start_and_leaves_no_trace(steps):
    net = Busy()
    compute, surroundings, seen = make(net)
    for step in range(steps):
        evaluation = Evaluation(compute, surroundings)
        first = evaluation.first()
        first.backward()
        state, clean, grads = net.state(), weights(net), [p.grad.clone() for p in net.parameters()]
        for _ in range(2):
            with evaluation.again() as loss:
                assert torch.equal(loss, first)
                loss.backward()
                assert not all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.grad = g.clone()
            assert net.state() == state
        assert_same(weights(net), clean)
        assert list(seen)[-3:] == [(False, step), (True, step), (True, step)]
    assert not in_second_pass()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["computation", "body"])
def test_an_exception_leaves_no_trace_either(error, where):
    net = Busy()
    compute, surroundings, _ = make(net)

    def fails():
        loss = compute()
        if in_second_pass() and where == "computation":
            raise error
        return loss

    evaluation = Evaluation(fails, surroundings)
    evaluation.first()
    state = net.state()
    with pytest.raises(error) as caught, evaluation.again():
        raise error
    assert net.state() == state
    assert not in_second_pass()
    notes = getattr(caught.value, "__notes__", [])
    # exceptions have notes since Python 3.11, and Ctrl-C needs none
    assert bool(notes) == (error is ValueError and hasattr(error, "add_note"))


def test_moved_weights_are_not_restored():
    """Displaced weights are restored by the code that displaced them, not by an evaluation."""
    net = Busy()
    compute, surroundings, _ = make(net)
    evaluation, moved = Evaluation(compute, surroundings), list(net.net.parameters())
    evaluation.first()
    with torch.no_grad():
        for param in moved:
            param += 1
    displaced = weights(net)
    with evaluation.again(moved):
        assert_same(weights(net), displaced)
    assert_same(weights(net), displaced)


def test_a_write_is_undone_in_the_evaluation_that_detects_it():
    """A large tensor is not saved until it is known to be written to; its copy comes from the first full search."""
    net = Busy()
    net.large = torch.zeros(2**11, dtype=torch.float64)
    compute, surroundings, _ = make(net)

    def writes():
        net.large += 1
        return compute() * net.large[0]

    for step in range(1, 4):
        evaluation = Evaluation(writes, surroundings)
        first = evaluation.first()
        with evaluation.again() as loss:
            assert torch.equal(loss, first)
        assert (net.large == step).all()


def test_state_that_only_one_evaluation_can_reach_is_restored():
    net, items = Busy(), []
    compute, surroundings, _ = make(net)

    def writes():
        items.append(1)
        return compute() * len(items)

    for step in range(1, 4):
        evaluation = Evaluation(writes, surroundings, Footprint(lambda: {"items": items}))
        first = evaluation.first()
        with evaluation.again() as loss:
            assert torch.equal(loss, first)
        assert len(items) == step


def test_the_memory_for_copies_is_limited_by_the_size_of_the_weights():
    net, lazy = nn.Linear(10, 10), nn.LazyLinear(3)
    surroundings = Surroundings(Footprint(dict), trained=lambda: [*net.parameters(), *lazy.parameters()])
    assert Evaluation(int, surroundings)._budget() == 2**26 + 2 * 4 * 110


def test_a_view_of_moved_weights_is_not_restored():
    net = Busy()
    net.view = net.net[0].weight.data[0]
    compute, surroundings, _ = make(net)
    evaluation, moved = Evaluation(compute, surroundings), [net.net[0].weight]
    evaluation.first()
    with torch.no_grad():
        net.net[0].weight += 1
    displaced = weights(net)
    with evaluation.again(moved):
        assert_same(weights(net), displaced)
    assert_same(weights(net), displaced)


@pytest.mark.parametrize(("options", "runs"), [({}, True), ({"hooks": True}, True), ({"hooks": False}, False)])
def test_hooks_on_parameters_run_unless_disabled(options, runs):
    net, ran = Busy(), Record()
    compute, surroundings, _ = make(net)
    handle = net.net[0].weight.register_hook(lambda grad: ran.append(1) or 2 * grad)
    evaluation = Evaluation(compute, surroundings)
    evaluation.first().backward()
    ran.clear()
    with evaluation.again(**options) as loss:
        loss.backward()
    assert len(ran) == runs
    handle.remove()


def test_muted_methods_do_nothing_in_the_second_pass():
    said, net = Record(), Busy()
    net.say = said.append
    compute, surroundings, _ = make(net, muted=lambda: [(net, ("say",))])

    def talks():
        net.say(in_second_pass())
        return compute()

    evaluation = Evaluation(talks, surroundings)
    evaluation.first()
    with evaluation.again():
        net.say("body")
    assert list(said) == [False]


def test_gradients_left_behind_by_a_computation():
    """Those of moved parameters are added unless they are to be dropped; those of other tensors are always restored."""
    net, extra = mlp(), torch.ones(2, requires_grad=True)
    holder = nn.Module()
    holder.net, holder.extra = net, [extra]
    surroundings = Surroundings(Footprint(lambda: {"self": holder}), trained=lambda: list(net.parameters()))

    def compute():
        (sum(p.sum() for p in net.parameters()) + extra.sum()).backward()
        return extra.sum()

    first, *others = net.parameters()
    evaluation = Evaluation(compute, surroundings)
    evaluation.first()
    for options, expected in (({}, 2.0), ({"gradients": "dropped"}, 2.0), ({"gradients": "added"}, 3.0)):
        with evaluation.again([first], **options):
            assert extra.grad is None or extra.grad.eq(1).all()
        assert first.grad.eq(expected).all()
        assert all(p.grad.eq(1).all() for p in others)
        assert extra.grad.eq(1).all()


def test_learning_leaves_no_trace_and_sets_the_start():
    net = Busy()
    net.new = 0.0
    compute, surroundings, _ = make(net)
    state, clean = net.state(), weights(net)
    evaluation = Evaluation(compute, surroundings)
    evaluation.learn()
    assert net.state() == state
    assert_same(weights(net), clean)
    assert all(p.grad is None for p in net.parameters())
    with evaluation.again() as first, evaluation.again() as second:
        assert torch.equal(first, second)
    assert net.state() == state


@pytest.mark.parametrize("learned", [True, False])
def test_a_write_only_in_the_second_pass_is_undone_or_warned_about(learned):
    net = Busy()
    net.register_buffer("odd", torch.zeros(2**11))
    compute, surroundings, _ = make(net)

    def odd():
        if in_second_pass():
            net.odd += 1
        return compute()

    if not learned:  # the third evaluation is not one of those that detect writes
        for _ in range(2):
            Evaluation(compute, surroundings).first()
    before = net.odd.clone()
    evaluation = Evaluation(odd, surroundings)
    evaluation.first()
    named = nullcontext() if learned else pytest.warns(UserWarning, match="`self.odd` was changed by a second pass")
    with named, evaluation.again():
        pass
    assert torch.equal(net.odd, before) == learned
    before = net.odd.clone()
    evaluation = Evaluation(odd, surroundings)
    evaluation.first()
    with evaluation.again():
        pass
    assert torch.equal(net.odd, before)  # from now on it is protected


def test_a_module_that_is_lazy_is_initialized_once():
    """By the first pass; what has come into being then is protected in the second one."""
    net, batch = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 3)), make_batches()[0]
    batch = batch[0].float(), batch[1]
    surroundings = Surroundings(Footprint(lambda: {"self": net}), trained=lambda: list(net.parameters()))
    for step in range(1, 5):
        evaluation = Evaluation(lambda: cross_entropy(net, batch), surroundings)
        first = evaluation.first()
        found = weights(net), net[1].running_mean.clone()
        with evaluation.again() as loss:
            assert torch.equal(loss, first)
        assert_same(weights(net), found[0])
        assert torch.equal(net[1].running_mean, found[1])
        assert net[1].num_batches_tracked == step


def test_an_error_in_a_second_pass_leaves_gradients_that_are_not_trained_as_they_are():
    holder, extra = nn.Module(), torch.ones(2, requires_grad=True)
    holder.extra, gradient = extra, torch.zeros(2)
    extra.grad = gradient

    def fails():
        if in_second_pass():
            extra.sum().backward()
            raise ValueError
        return extra.sum()

    evaluation = Evaluation(fails, Surroundings(Footprint(lambda: {"self": holder})))
    evaluation.first()
    with pytest.raises(ValueError), evaluation.again():  # noqa: PT011
        pass
    assert extra.grad is gradient
    assert not gradient.any()


def test_learning_leaves_no_trace_of_random_numbers_gradients_hooks_and_muted_methods():
    net, said, ran = Busy(), Record(), Record()
    net.new, net.say, net.extra = 0.0, said.append, torch.ones(2, requires_grad=True)
    compute, surroundings, _ = make(net, muted=lambda: [(net, ("say",))])
    net.net[0].weight.register_hook(lambda grad: ran.append(1))

    def talks():
        net.say(in_second_pass())
        loss = compute() + net.extra.sum()
        loss.backward()
        return loss

    state = net.state()
    evaluation = Evaluation(talks, surroundings)
    evaluation.learn()
    assert net.state() == state
    assert list(said) == list(ran) == []
    assert net.extra.grad is None
    assert all(param.grad is None for param in net.parameters())
    assert not in_second_pass()


def test_learning_finds_what_is_written_to():
    """And undoes it even for what is too large to be saved in each step."""
    net = Busy()
    net.large, net.new = torch.zeros(2**11), 0.0
    compute, surroundings, _ = make(net)

    def writes():
        net.large += 1
        return compute() * net.large[0]

    evaluation = Evaluation(writes, surroundings)
    evaluation.learn()
    assert not net.large.any()
    with evaluation.again() as first, evaluation.again() as second:
        assert torch.equal(first, second)
    assert not net.large.any()
    assert any(place.owner is net.large for place in surroundings.footprint.protected)
