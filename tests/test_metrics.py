"""The torchmetrics in one process; see tests/system/test_measured.py for several ranks."""

import pytest
import torch
from modules import cross_entropy, make_batches, mlp

from lightning_gr.metrics import GradientAlignment, GradientNorm, Sharpness


def gradients_of(batch):
    net = mlp()
    return net, torch.autograd.grad(cross_entropy(net, batch), list(net.parameters()))


def test_norm_is_the_mean_over_updates_of_a_module_or_of_parameters():
    metric, expected = GradientNorm(), []
    for batch, scale in zip(make_batches(), (1.0, 4.0, torch.tensor(8.0)), strict=True):
        net, grads = gradients_of(batch)
        for param, grad in zip(net.parameters(), grads, strict=True):
            param.grad = scale * grad
        expected.append(sum(float((g**2).sum()) for g in grads) ** 0.5)
        metric.update(net if scale == 1.0 else net.parameters(), scale)
    assert metric.compute().item() == pytest.approx(sum(expected) / 3)


def test_parameters_without_a_gradient_are_left_out():
    with_it, without = (torch.ones(2, requires_grad=True) for _ in range(2))
    with_it.grad = torch.tensor([3.0, 4.0])
    metric = GradientNorm()
    metric.update([with_it, without])
    assert metric.compute() == 5.0
    metric.reset()
    metric.update([without])
    assert metric.compute() == 0.0


def test_alignment_is_the_cosine():
    (_, first), (_, second) = (gradients_of(batch) for batch in make_batches()[:2])
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (first, second))
    metric = GradientAlignment()
    metric.update(first, second)
    metric.update(first, [-g for g in first])
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    assert metric.compute().item() == pytest.approx((cosine - 1) / 2)


def test_sharpness_keeps_no_graph():
    clean, perturbed = (torch.tensor(value, requires_grad=True) for value in (1.0, 3.5))
    metric = Sharpness()
    metric.update(clean, perturbed)
    assert metric.compute() == 2.5
    assert not metric.compute().requires_grad


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("kind", [GradientNorm, GradientAlignment, Sharpness])
def test_before_the_first_update_there_is_no_value(kind):
    assert kind().compute().isnan()


def test_metrics_plot():
    metric = GradientNorm()
    _, axes = metric.plot([torch.tensor(3.0), torch.tensor(1.0)])
    assert list(axes.lines[0].get_ydata()) == [3.0, 1.0]
