"""Slices of a loss along its gradient and a random direction, and their plots."""

import pytest
import torch
from modules import TinyModule, assert_same, cross_entropy, fit, make_data, mlp, weights

from lightning_gr import SAM
from lightning_gr.report.plotting import PlotError
from lightning_gr.slices import draw_slices, filter_normalized, loss_slice, plot_slices


def test_slices_equal_the_loss_along_lines():
    net, data = mlp(), make_data()
    before = weights(net)
    found = loss_slice(lambda: cross_entropy(net, data), net, radius=0.5, points=5)
    assert_same(weights(net), before)
    assert all(param.grad is None for param in net.parameters())
    gradient = torch.autograd.grad(cross_entropy(net, data), list(net.parameters()))
    norm = torch.stack([g.norm() for g in gradient]).norm()
    drawn = filter_normalized(net.parameters(), torch.Generator().manual_seed(0))
    size = torch.stack([d.norm() for d in drawn]).norm()
    assert found.distances == pytest.approx([-0.5, -0.25, 0.0, 0.25, 0.5])
    for name, direction, length in (("gradient", gradient, norm), ("random", drawn, size)):
        for distance, loss in zip(found.distances, found.losses[name], strict=True):
            moved = mlp()
            with torch.no_grad():
                for param, d in zip(moved.parameters(), direction, strict=True):
                    param.add_(d, alpha=distance / length.item())
            assert loss == pytest.approx(cross_entropy(moved, data).item(), rel=1e-12)


def test_filters_have_the_norms_of_the_weights():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    kernel, *others = filter_normalized(net.parameters(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernel.flatten(1).norm(dim=1), net[0].weight.flatten(1).norm(dim=1))
    assert all(not other.any() for other in others)


@pytest.mark.slow
def test_slices_of_checkpoints_side_by_side(tmp_path):
    """Slices of a module that is loaded from a checkpoint, next to another one."""
    checkpoint = tmp_path / "last.ckpt"
    module = TinyModule()
    fit(module, SAM(0.2)).save_checkpoint(checkpoint)
    loaded = TinyModule.load_from_checkpoint(checkpoint, weights_only=False)
    data = make_data()
    slices = {"start": mlp(), "SAM": loaded.net}
    slices = {n: loss_slice(lambda net=net: cross_entropy(net, data), net, points=5) for n, net in slices.items()}
    figure = draw_slices(slices)
    assert [axes.get_title() for axes in figure.axes] == ["Along the gradient", "Along a random direction"]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["start", "SAM"]
        assert "loss" in axes.get_ylabel()
        assert "Δθ" in axes.get_xlabel()
    plot_slices(slices, tmp_path / "slices.svg", logarithmic=True)
    assert (tmp_path / "slices.svg").stat().st_size > 5000
    with pytest.raises(PlotError, match="use one of the suffixes"):
        plot_slices(slices, tmp_path / "slices")


def test_wrong_arguments():
    net = mlp()
    with pytest.raises(ValueError, match="`radius` to be a positive float but got 0"):
        loss_slice(lambda: cross_entropy(net, make_data()), net, radius=0)
