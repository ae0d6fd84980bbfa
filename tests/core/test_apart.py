"""First and second gradients that are kept apart: clipping each by its norm, combining them, and errors."""

import pytest
import torch
from modules import assert_near, assert_same, cross_entropy, gradients, make_batches, mlp, weights

from lightning_gr.core.apart import clip_
from lightning_gr.core.rules import Probe, Update
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
