"""The training methods that ``step_cost.py`` compares: ours, and other implementations in manual optimization."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import pytorch_optimizer
import torch
from torch import Tensor, nn

from lightning_gr import SAM, Flooding, GradientRegularization, GradientRegularizationMixin, MomentumSAM

__all__ = ["WAYS", "Way"]

GAMMA, EPSILON, RHO = 0.01, 0.05, 0.05


def sgd(params: Any) -> torch.optim.Optimizer:
    """SGD with momentum, with a learning rate so small that long measurements do not make training diverge."""
    return torch.optim.SGD(params, lr=1e-6, momentum=0.9)


class Plain(pl.LightningModule):
    """A module without any regularization code."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class Manual(Plain):
    """A module with manual optimization."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False


class Mixed(GradientRegularizationMixin, Manual):
    """Our mixin in manual optimization."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.regularized_step(self.optimizers(), lambda: self.loss(batch))


class TwoSteps(torch.optim.Optimizer):
    """The usual hand-written SAM: an optimizer that wraps another one, with a loop over the parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base = sgd(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def ascend(self) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["before"] = p.data.clone()
            p.add_(p.grad * (RHO / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["before"]
        self.base.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # required by Lightning
        raise NotImplementedError


class ByHand(Manual):
    """The usual recipe for SAM in manual optimization."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer = self.optimizers().optimizer
        self.manual_backward(self.loss(batch))
        optimizer.ascend()
        self.manual_backward(self.loss(batch))
        optimizer.descend()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return TwoSteps(self.parameters())


class Package(Manual):
    """SAM from the package pytorch_optimizer, used as in its documentation."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer = self.optimizers().optimizer
        self.manual_backward(self.loss(batch))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch))
        optimizer.second_step(zero_grad=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return pytorch_optimizer.SAM(self.parameters(), torch.optim.SGD, rho=RHO, lr=1e-6, momentum=0.9)


class DoubleBackward(Manual):
    """Adds the penalty (γ/2)‖∇L‖² to the loss and differentiates it, in one graph."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        loss = self.loss(batch)
        gradients = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        self.manual_backward(loss + GAMMA / 2 * sum(g.square().sum() for g in gradients))
        optimizer.step()


class Way(NamedTuple):
    """A training method: the module around the network, and the callbacks."""

    module: Callable[[nn.Module], pl.LightningModule] = Plain
    callbacks: Callable[[], list[pl.Callback]] = list


def _gr(**options: Any) -> Callable[[], list[pl.Callback]]:
    return lambda: [GradientRegularization(GAMMA, EPSILON, **options)]


WAYS = {
    "plain": Way(),
    "flooding": Way(callbacks=lambda: [Flooding(0.1)]),
    "F-GR": Way(callbacks=_gr()),
    "B-GR": Way(callbacks=_gr(scheme="backward")),
    "GNP": Way(callbacks=_gr(normalize=True)),
    "SAM": Way(callbacks=lambda: [SAM(RHO)]),
    "ASAM": Way(callbacks=lambda: [SAM(RHO, adaptive=True)]),
    "Momentum-SAM": Way(callbacks=lambda: [MomentumSAM(RHO)]),
    "F-GR, mixin": Way(Mixed, _gr()),
    "SAM, mixin": Way(Mixed, lambda: [SAM(RHO)]),
    "central": Way(callbacks=_gr(scheme="central")),
    "exact": Way(callbacks=_gr(scheme="exact")),
    "SAM, pytorch_optimizer": Way(Package),
    "SAM, by hand": Way(ByHand),
    "double backward": Way(DoubleBackward),
}
