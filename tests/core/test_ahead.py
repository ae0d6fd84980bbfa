"""The point ahead along the momentum: which momentum is used, and that weights are restored bit for bit."""

import pytest
import torch
from accelerator import treated_as_accelerator
from modules import assert_near, assert_same, mlp, weights
from torch import nn

from lightning_gr.core.ahead import Ahead, keeps_momentum, momenta_of
from lightning_gr.core.storage import WeightStorage

WITH = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9),
    "fused": lambda params: torch.optim.AdamW(params, fused=True),
}
WITHOUT = {
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
}


class Lion(torch.optim.Optimizer):
    """A custom optimizer that has attributes and draws random numbers."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.made = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.made += 1
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                average.lerp_(param.grad, 0.1 + 0 * torch.rand(()))
                param.sub_(average.sign(), alpha=group["lr"])


def stepped(make, net, steps=2):
    optimizer = make(net.parameters())
    for _ in range(steps):
        for param in net.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", WITH)
def test_optimizers_with_a_momentum(name):
    net = mlp(dtype=torch.float32)
    optimizer = WITH[name](net.parameters())
    assert momenta_of(optimizer, net.parameters()) == []
    assert keeps_momentum(optimizer)
    assert len(momenta_of(stepped(WITH[name], net), net.parameters())) == 4


@pytest.mark.parametrize("name", WITHOUT)
def test_optimizers_without_a_momentum(name):
    assert keeps_momentum(WITHOUT[name](mlp().parameters())) is False


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_an_optimizer_for_matrices_only():
    optimizer = torch.optim.Muon(nn.Linear(3, 2, bias=False).parameters())
    assert keeps_momentum(optimizer)


class Early(torch.optim.Optimizer):
    """Creates its state in the constructor, as Adagrad does in torch 2.6."""

    def __init__(self, params, momentum=False):
        super().__init__(params, {"lr": 0.1})
        for param in self.param_groups[0]["params"]:
            name = "exp_avg" if momentum else "sum"
            self.state[param] = {"step": torch.tensor(0.0), name: torch.zeros_like(param), "sizes": [1]}

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["step"] += 1
            state["sizes"].append(2)
            state["exp_avg" if "exp_avg" in state else "sum"].add_(param.grad)


@pytest.mark.parametrize("momentum", [True, False])
def test_optimizers_that_create_their_state_early(momentum):
    optimizer = Early(mlp().parameters(), momentum)
    assert keeps_momentum(optimizer) is momentum
    for state in optimizer.state.values():  # the check must not change it
        assert (state["step"].item(), state["sizes"]) == (0, [1])
        assert not any(value.any() for value in state.values() if torch.is_tensor(value))


def test_one_of_several_groups_is_enough():
    net = mlp()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert keeps_momentum(optimizer)


def test_keeps_momentum_leaves_the_optimizer_unchanged():
    """Its state, attributes, hooks and scheduler stay as they are, and no random numbers are drawn."""
    net, calls = mlp(), []
    before = weights(net)
    optimizer = Lion(net.parameters())
    optimizer.register_step_pre_hook(lambda *args: calls.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    numbers = torch.get_rng_state()
    assert keeps_momentum(optimizer)
    assert (dict(optimizer.state), optimizer.made, calls, scheduler._step_count) == ({}, 0, [], 1)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert_same(weights(net), before)
    assert optimizer.param_groups[0]["params"] == list(net.parameters())


def test_unknown_for_optimizers_that_need_a_closure():
    assert keeps_momentum(torch.optim.LBFGS(mlp().parameters())) is None


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("size", [8, 300])  # small weights are copied, large ones swapped
def test_displaced_and_restored(host, size):
    net = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 3))
    optimizer = stepped(WITH["SGD"], net)
    before = weights(net)
    momenta = {name: optimizer.state[param]["momentum_buffer"].clone() for name, param in net.named_parameters()}
    norm = torch.cat([v.flatten() for v in momenta.values()]).norm()
    ahead = Ahead(optimizer, net.parameters(), 0.5, WeightStorage())
    for _ in range(2):
        if host:
            with ahead.displaced():
                inside = weights(net)
        else:
            with treated_as_accelerator(), ahead.displaced():
                inside = weights(net)
        assert_near(inside, {name: before[name] - 0.5 * momenta[name] / norm for name in before}, 1e-6)
        assert_same(weights(net), before)
    assert_same({n: optimizer.state[p]["momentum_buffer"] for n, p in net.named_parameters()}, momenta)


def test_weights_are_restored_after_an_error():
    net = mlp()
    optimizer = stepped(WITH["AdamW"], net)
    before = weights(net)
    ahead = Ahead(optimizer, net.parameters(), 1.0, WeightStorage())

    def fail():
        with ahead.displaced():
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert_same(weights(net), before)


def test_suspended():
    """Inside, the weights are back at their own values; afterwards they are displaced again, even after an error."""
    net = mlp()
    optimizer = stepped(WITH["SGD"], net)
    before = weights(net)
    ahead = Ahead(optimizer, net.parameters(), 1.0, WeightStorage())

    def fail():
        with ahead.suspended():
            raise RuntimeError("broken")

    with ahead.displaced():
        moved = weights(net)
        with ahead.suspended():
            assert_same(weights(net), before)
        assert_same(weights(net), moved)
        with pytest.raises(RuntimeError, match="broken"):
            fail()
        assert_same(weights(net), moved)
    assert_same(weights(net), before)
    with ahead.suspended():
        assert_same(weights(net), before)


def test_without_momentum_the_weights_stay():
    net = mlp()
    before = weights(net)
    ahead = Ahead(WITH["SGD"](net.parameters()), net.parameters(), 1.0, WeightStorage())
    assert not ahead
    with ahead.displaced():
        assert_same(weights(net), before)


def test_a_momentum_of_zero_moves_nothing():
    net = mlp()
    optimizer = WITH["SGD"](net.parameters())
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    before = weights(net)
    with Ahead(optimizer, net.parameters(), 1.0, WeightStorage()).displaced():
        assert_same(weights(net), before)


@pytest.mark.parametrize("size", [8, 300])  # small weights are copied, large ones swapped
@pytest.mark.parametrize("written", ["nothing", "weight", "momentum", "storage", "elsewhere"])
def test_the_backward_pass_takes_place_at_the_same_point(written, size):
    """Changes since the forward pass are taken into account, and nothing is recomputed without need."""
    net = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 3))
    optimizer, storage = stepped(WITH["SGD"], net), WeightStorage()
    ahead = Ahead(optimizer, net.parameters(), 0.5, storage)
    with ahead.displaced():
        forward = weights(net)
    spare = [(tensor.clone(), tensor._version) for tensor in storage.swap._spare]
    with torch.no_grad():
        if written == "weight":
            net[0].weight.mul_(2.0)
        elif written == "momentum":
            optimizer.state[net[0].weight]["momentum_buffer"].neg_()
        elif written == "storage":
            with Ahead(optimizer, net.parameters(), 2.0, storage).displaced():
                pass
        elif written == "elsewhere":
            net[0].weight.data = 2.0 * net[0].weight
    before = weights(net)
    fresh = Ahead(optimizer, net.parameters(), 0.5, WeightStorage())
    fresh._factor = ahead._factor  # ‖v‖ is computed once per window
    with fresh.displaced():
        expected = weights(net)
    with ahead.displaced(again=True):
        assert_same(weights(net), expected)
    assert_same(weights(net), before)
    if written == "nothing":
        assert_same(expected, forward)
        for (content, version), now in zip(spare, storage.swap._spare, strict=True):
            assert torch.equal(content, now)
            assert version == now._version
