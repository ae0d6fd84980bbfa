"""First and second gradients that are kept apart: clipping each by its norm, combining them, and errors."""

from contextlib import nullcontext

import pytest
import torch
from accelerator import treated_as_accelerator
from modules import assert_near, assert_same, cross_entropy, gradients, make_batches, mlp, weights

from lightning_gr.core.apart import clip_
from lightning_gr.core.rules import Probe, Update
from lightning_gr.core.state import State
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import NoLossError, add_second_pass_


def started():
    net, batch = mlp(), make_batches()[0]
    cross_entropy(net, batch).backward()
    return net, batch


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("limit", [0.5, 5.0, 50.0])
def test_clip(limit, scale):
    vector = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]  # of norm 5
    loss_scale = None if scale is None else torch.tensor(scale)
    scaled = [v * (scale or 1.0) for v in vector]
    after = clip_(scaled, limit, loss_scale)
    factor = min(1.0, limit / 5) * (scale or 1.0)
    assert_near({"0": scaled[0], "1": scaled[1]}, {"0": vector[0] * factor, "1": vector[1] * factor}, 1e-6)
    torch.testing.assert_close(after, torch.tensor(5.0 * factor))


def test_a_zero_gradient_stays_zero():
    vector = [torch.zeros(3)]
    clip_(vector, 1.0, None)
    assert (vector[0] == 0).all()


@pytest.mark.parametrize("error", [RuntimeError, NoLossError])
@pytest.mark.parametrize("probes", [(Probe(0.1, 1.0),), (Probe(0.1, 0.5), Probe(-0.1, 0.5))])
def test_the_first_gradient_remains_after_an_error(error, probes):
    net, batch = started()
    clean, before, calls = gradients(net), weights(net), []
    update = Update("normalized", 0.3, probes, clip=(1e6, 1e6))

    def replay(transform, last=True):
        calls.append(1)
        if len(calls) == len(probes):
            raise error
        transform(cross_entropy(net, batch)).backward()

    def run():
        return add_second_pass_(update, list(net.parameters()), replay, WeightStorage())

    if error is NoLossError:
        assert run() is False
    else:
        with pytest.raises(RuntimeError):
            run()
    assert_same(gradients(net), clean)
    assert_same(weights(net), before)


def test_a_rule_gets_both_gradients():
    net, batch = started()
    clean, seen = gradients(net), []

    def combine(first, second, state):
        seen.extend([[g.clone() for g in first], [g.clone() for g in second]])
        torch._foreach_mul_(list(second), 2.0)

    def replay(transform, last=True):
        transform(cross_entropy(net, batch)).backward()

    update = Update("gradient", 0.0, (Probe(0.5, 1.0),), combine=combine)
    assert add_second_pass_(update, list(net.parameters()), replay, WeightStorage())
    assert_same(dict(zip(clean, seen[0], strict=True)), clean)
    moved = mlp()
    with torch.no_grad():
        for name, param in moved.named_parameters():
            param.add_(clean[name], alpha=0.5)
    cross_entropy(moved, batch).backward()
    assert_near(dict(zip(clean, seen[1], strict=True)), gradients(moved))
    assert_near(gradients(net), {name: 2 * g for name, g in gradients(moved).items()})


def norm_of(vector):
    return torch.cat([each.flatten() for each in vector.values()]).norm().item()


def clipped(vector, limit):
    return {name: each * min(1.0, limit / norm_of(vector)) for name, each in vector.items()}


def gradient_at(direction, distance, batch):
    net = mlp()
    with torch.no_grad():
        for name, param in net.named_parameters():
            param.add_(direction[name], alpha=distance)
    cross_entropy(net, batch).backward()
    return gradients(net)


class InBuckets:
    """A replay whose gradients are views of memory that the next one uses again, as those of DDP."""

    def __init__(self, net, batch, scale):
        self.net, self.batch, self.scale = net, batch, scale
        self.bucket, self.calls = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64), []

    def __call__(self, transform, last=True):
        self.calls.append(last)
        assert all(param.grad is None for param in self.net.parameters())
        transform(cross_entropy(self.net, self.batch) * self.scale).backward()
        params = list(self.net.parameters())
        for param, part in zip(params, self.bucket.split([p.numel() for p in params]), strict=True):
            param.grad = part.view_as(param).copy_(param.grad)


@pytest.mark.parametrize("context", [nullcontext, treated_as_accelerator])
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("direction", ["gradient", "normalized"])
def test_gradients_that_are_clipped_are_combined_with_their_weights(direction, scale, context):
    net, batch = mlp(), make_batches()[0]
    (cross_entropy(net, batch) * scale).backward()
    clean = {name: grad / scale for name, grad in gradients(net).items()}
    limits = 0.5 * norm_of(clean), 0.4 * norm_of(clean)
    update = Update(direction, 0.3, (Probe(0.1, 0.5), Probe(-0.2, 0.7)), clip=limits)
    replay = InBuckets(net, batch, scale)
    loss_scale = None if scale == 1.0 else torch.tensor(scale, dtype=torch.float64)
    with context():
        assert add_second_pass_(update, list(net.parameters()), replay, WeightStorage(), loss_scale=loss_scale)
    first = clipped(clean, limits[0])
    along = {name: grad / norm_of(first) for name, grad in first.items()} if direction == "normalized" else first
    one, other = (clipped(gradient_at(along, probe.distance, batch), limits[1]) for probe in update.probes)
    expected = {name: scale * (0.3 * first[name] + 0.5 * one[name] + 0.7 * other[name]) for name in first}
    assert_near(gradients(net), expected)
    assert_same(weights(net), weights(mlp()))
    assert replay.calls == [True, True]  # each gradient is reduced by itself


@pytest.mark.parametrize("context", [nullcontext, treated_as_accelerator])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_rule_combines_gradients_without_the_scale_and_the_result_has_it(scale, context):
    net, batch = mlp(), make_batches()[0]
    (cross_entropy(net, batch) * scale).backward()
    clean, seen = {name: grad / scale for name, grad in gradients(net).items()}, []

    def combine(first, second, state):
        seen.extend([[g.clone() for g in first], [g.clone() for g in second]])
        torch._foreach_add_(list(second), list(first), alpha=2.0)

    update = Update("gradient", 0.0, (Probe(0.5, 1.0),), combine=combine)
    loss_scale = None if scale == 1.0 else torch.tensor(scale, dtype=torch.float64)
    with context():
        replay = InBuckets(net, batch, scale)
        assert add_second_pass_(update, list(net.parameters()), replay, WeightStorage(), loss_scale=loss_scale)
    second = gradient_at(clean, 0.5, batch)
    assert_near(dict(zip(clean, seen[0], strict=True)), clean)
    assert_near(dict(zip(clean, seen[1], strict=True)), second)
    assert_near(gradients(net), {name: scale * (2 * clean[name] + second[name]) for name in clean})


def test_a_rule_turns_the_direction_also_where_this_process_may_not_decide():
    param = torch.nn.Parameter(torch.tensor([2.0]))
    param.grad = torch.tensor([4.0])

    def replay(transform, last=True):
        transform((param**2).sum()).backward()

    def turn(gradient, state):
        torch._foreach_neg_(list(gradient))

    update = Update("normalized", 0.0, (Probe(0.5, 1.0),), turn=turn)
    assert add_second_pass_(update, [param], replay, WeightStorage(), check_finite=False)
    assert param.grad.item() == pytest.approx(2 * (2.0 - 0.5))


def test_what_a_rule_keeps_of_a_direction_that_overflowed_is_taken_back():
    """The gradient scaler skips that step, whoever decides on it."""
    param, state = torch.nn.Parameter(torch.tensor([2.0])), State()
    with state.of([param]):
        state.set("average", [torch.ones(1)])
    param.grad = torch.tensor([torch.inf])

    def turn(gradient, state):
        state.set("average", [grad.clone() for grad in gradient])

    def replay(transform, last=True):
        transform((param**2).sum()).backward()

    update = Update("normalized", 0.0, (Probe(0.5, 1.0),), turn=turn)
    options = {"loss_scale": torch.tensor(2.0), "check_finite": False, "state": state}
    add_second_pass_(update, [param], replay, WeightStorage(), **options)
    with state.of([param]):
        assert state.get("average")[0].item() == 1.0


def test_a_replay_that_writes_to_gradients_finds_its_own_only():
    """As a training step that scales what is in ``.grad`` after its backward pass."""
    params = [torch.nn.Parameter(torch.tensor([2.0])) for _ in range(3)]
    param, excluded, unused = params
    param.grad, excluded.grad, unused.grad = torch.tensor([4.0]), torch.tensor([5.0]), None

    def replay(transform, last=True):
        assert all(each.grad is None for each in params)
        transform(sum((each**2).sum() for each in params)).backward()
        for each in params:
            each.grad *= 3

    update = Update("gradient", 0.5, (Probe(0.1, 0.25),))
    options = {"excluded": [excluded], "apart": True}
    assert add_second_pass_(update, [param, unused], replay, WeightStorage(), **options)
    assert param.grad.item() == pytest.approx(0.5 * 4 + 0.25 * 3 * 2 * (2 + 0.1 * 4))
    assert excluded.grad.item() == 5
    assert unused.grad is None


def test_a_parameter_that_a_second_pass_does_not_use_has_a_gradient_of_zero_there():
    net, _ = started()
    clean = gradients(net)

    def replay(transform, last=True):
        transform(net[2].bias.sum()).backward()

    update = Update("normalized", 0.5, (Probe(0.1, 1.0),), clip=(1e6, 1e6))
    assert add_second_pass_(update, list(net.parameters()), replay, WeightStorage())
    expected = {name: 0.5 * grad + (1.0 if name == "2.bias" else 0.0) for name, grad in clean.items()}
    assert_near(gradients(net), expected)


def test_without_probes_the_first_gradient_is_combined():
    net, _ = started()
    clean = gradients(net)

    def combine(first, second, state):
        assert len(second) == 0
        torch._foreach_mul_(list(first), 3.0)

    update = Update("gradient", 1.0, combine=combine)
    assert not update.is_plain
    assert add_second_pass_(update, list(net.parameters()), pytest.fail, WeightStorage())
    assert_near(gradients(net), {name: 3 * g for name, g in clean.items()})
