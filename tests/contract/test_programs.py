"""The contract for realistic programs: no trace of second passes, and the oracle's gradient."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch
from contract import AUTOMATIC, FORMS, Situation, check_no_trace, contract, train, witness
from oracle import CENTRAL, FGR, by_hand
from torch import nn
from torch.func import functional_call


class FGSM(Situation):
    """Adversarial training with an inner backward pass and running statistics of clean and adversarial inputs."""

    def prepare(self):
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
        self.history = {"clean": [], "adversarial": []}
        self.gen = torch.Generator().manual_seed(0)

    def step(self, batch):
        x, y = batch
        start = 0.1 * torch.rand(x.shape, generator=self.gen, dtype=torch.float64)
        witness(start)
        attacked = (x + start).requires_grad_()
        clean = self.mse((attacked, y))
        clean.backward()
        self.history["clean"].append(float(clean.detach()))
        self.zero_grad()
        loss = self.mse((x + 0.1 * attacked.grad.sign(), y))
        self.history["adversarial"].append(float(loss.detach()))
        return loss


class PGD(FGSM):
    """An attack of several steps in eval mode by ``autograd.grad``, as in most libraries."""

    def step(self, batch):
        x, y = batch
        self.net.eval()
        attacked = x + 0.1 * torch.rand(x.shape, generator=self.gen, dtype=torch.float64)
        witness(attacked)
        for _ in range(3):
            attacked.requires_grad_()
            (slope,) = torch.autograd.grad(self.mse((attacked, y)), attacked)
            attacked = (attacked + 0.05 * slope.sign()).clamp(x - 0.1, x + 0.1).detach()
        self.net.train()
        return self.mse((attacked, y))


class DQN(Situation):
    """Acts in a small environment and learns from a replay memory; the target is replaced every fourth step."""

    steps = 18

    class Environment:
        """A walk on a line."""

        def __init__(self):
            self.rng, self.position, self.episodes = random.Random(0), 0.0, 0

        def step(self, action):
            self.position += (1 if action else -1) + self.rng.gauss(0, 0.1)
            done = abs(self.position) > 3
            reward = -abs(self.position)
            if done:
                self.position, self.episodes = 0.0, self.episodes + 1
            return reward, done

        def observe(self):
            return torch.tensor([self.position, self.position**2, 1.0]).double()

    def prepare(self):
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.target = copy.deepcopy(self.net)
        self.environment, self.memory = self.Environment(), deque(maxlen=12)
        self.rng, self.updates, self.epsilon = np.random.default_rng(0), 0, 1.0

    def act(self):
        state = self.environment.observe()
        explores = self.rng.random() < self.epsilon
        action = int(self.rng.integers(2) if explores else self.net(state).argmax())
        reward, done = self.environment.step(action)
        self.memory.append((state, action, reward, done, self.environment.observe()))

    def step(self, batch):
        witness((self.epsilon, self.updates, len(self.memory), self.environment.position))
        witness(self.target[0].weight)
        for _ in range(2):
            self.act()
        self.epsilon *= 0.95
        chosen = [self.memory[int(i)] for i in self.rng.integers(len(self.memory), size=6)]
        states, actions, rewards, dones, following = zip(*chosen, strict=True)
        with torch.no_grad():
            best = self.target(torch.stack(following)).amax(1) * (1 - torch.tensor(dones).double())
        values = self.net(torch.stack(states))[range(6), list(actions)]
        loss = (values - torch.tensor(rewards).double() - 0.9 * best).square().mean()
        self.updates += 1
        if self.updates % 4 == 0:
            self.target.load_state_dict(self.net.state_dict())
        return loss


class DINO(Situation):
    """Student and teacher on multi-crop views, with a center, a growing momentum and an annealed temperature."""

    steps = 12

    def prepare(self):
        self.net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 4)).double()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("center", torch.zeros(4).double())
        self.rng, self.momentum, self.hparams.temperature = np.random.RandomState(0), 0.5, 1.0

    def view(self, x):
        return x + torch.from_numpy(self.rng.normal(size=x.shape)) * 0.1

    def step(self, batch):
        witness((self.momentum, self.hparams.temperature))
        witness(self.center)
        witness(self.teacher[0].weight)
        for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.mul_(self.momentum).add_(s.detach().data, alpha=1 - self.momentum)
        views = [self.view(batch[0]) for _ in range(2)]
        students = [self.net(view) for view in views]
        with torch.no_grad():
            teachers = [self.teacher(view) for view in views]
        wanted = [((t - self.center) / self.hparams.temperature).softmax(1) for t in teachers]
        loss = sum(-(wanted[i] * students[1 - i].log_softmax(1)).sum(1).mean() for i in range(2))
        self.center.mul_(0.9).add_(torch.cat(teachers).mean(0), alpha=0.1)
        self.momentum = min(1.0, self.momentum + 0.01)
        self.hparams.temperature *= 0.97
        return loss


class DINOWithCancelledGradients(DINO):
    """The last layer is frozen at first by dropping its gradients in ``on_after_backward``."""

    forms, has_oracle = AUTOMATIC, False

    def on_after_backward(self):
        for param in self.net[2].parameters():
            param.grad = None


class VAE(Situation):
    """Has its own generator for the latent noise, and an annealed weight."""

    def prepare(self):
        self.net = nn.Linear(3, 4).double()
        self.decoder = nn.Linear(2, 3).double()
        self.gen, self.hparams.beta, self.losses = torch.Generator().manual_seed(1), 0.0, {"kl": [], "rec": []}

    def step(self, batch):
        x = batch[0]
        mean, log_variance = self.net(x).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=self.gen, dtype=torch.float64)
        witness(noise)
        witness(self.hparams.beta)
        self.hparams.beta = min(1.0, self.hparams.beta + 0.1)
        decoded = self.decoder(mean + noise * (log_variance / 2).exp())
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        rec = (decoded - x).square().mean()
        self.losses["kl"].append(float(kl.detach()))
        self.losses["rec"].append(float(rec.detach()))
        return rec + self.hparams.beta * kl


class MAML(Situation):
    """Differentiates through an inner step, on randomly drawn tasks."""

    def prepare(self):
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.tasks, self.adapted = np.random.default_rng(0), []

    def step(self, batch):
        x, y = batch
        losses = []
        for _ in range(2):
            scale = float(self.tasks.normal())
            witness(scale)
            weights = dict(self.net.named_parameters())
            inner = (functional_call(self.net, weights, (x,)) - scale * y).square().mean()
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
            self.adapted.append(float(inner.detach()))
            losses.append((functional_call(self.net, weights, (x,)) - scale * y).square().mean())
        return sum(losses) / 2


class Reptile(MAML):
    """First-order meta-learning: the step trains a copy of the network, and the loss moves the network towards it."""

    def step(self, batch):
        x, y = batch
        scale = float(self.tasks.normal())
        witness(scale)
        learner = copy.deepcopy(self.net)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (learner(x) - scale * y).square().mean()
            loss.backward()
            optimizer.step()
        self.adapted.append(float(loss.detach()))
        pairs = zip(self.net.parameters(), learner.parameters(), strict=True)
        return sum((p - q.detach()).square().sum() for p, q in pairs) + self.mse(batch)


class MoCo(Situation):
    """A queue of keys with a pointer, and a momentum encoder."""

    def prepare(self):
        self.encoder = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(16, 2).double(), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def step(self, batch):
        witness(self.queue)
        witness(self.pointer)
        with torch.no_grad():
            for k, q in zip(self.encoder.parameters(), self.net.parameters(), strict=True):
                k.data = k.data * 0.9 + q.data * 0.1
            keys = nn.functional.normalize(self.encoder(batch[0]), dim=1)
        queries = nn.functional.normalize(self.net(batch[0]), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone().T], 1) / 0.5
        at = int(self.pointer)
        self.queue[at : at + len(keys)] = keys
        self.pointer[0] = (at + len(keys)) % len(self.queue)
        return nn.functional.cross_entropy(logits, torch.zeros(len(keys), dtype=torch.long))


test_trains_as_without, test_gradient = contract(
    FGSM, PGD, DQN, DINO, DINOWithCancelledGradients, VAE, MAML, Reptile, MoCo, methods=(FGR, CENTRAL)
)


class QAT(Situation):
    """Quantization-aware training with the default configuration for x86, fused and with BatchNorm."""

    has_oracle = False

    def prepare(self):
        quantization = torch.ao.quantization
        layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
        self.net = nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub())
        self.net.qconfig = quantization.get_default_qat_qconfig("x86")
        self.net.train()
        quantization.prepare_qat(self.net, inplace=True)
        self.calls = 0

    def make_batches(self):
        return [(x.float(), y.float()) for x, y in super().make_batches()]

    def step(self, batch):
        self.calls += 1
        if self.calls == 6:
            self.net.apply(torch.ao.quantization.disable_observer)
        witness([buffer.clone() for buffer in self.net.buffers()])
        return self.mse(batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_quantization_aware_training(form):
    check_no_trace(QAT, form)
    found = train(QAT, form, FGR, lr=0.05)
    plain = train(QAT, form, lr=0.05)
    pairs = zip(found.gradients, plain.gradients, strict=True)
    assert any(not torch.equal(a["net.1.weight"], b["net.1.weight"]) for a, b in pairs)
    assert all(grad.isfinite().all() for gradients in found.gradients for grad in gradients.values())


@pytest.mark.parametrize("kind", [FGSM, PGD, DQN, DINO, VAE, MAML, Reptile, MoCo])
def test_the_second_pass_makes_a_difference(kind):
    """Otherwise the tests above would be meaningless."""
    plain, found = train(kind, "automatic", lr=0.05), by_hand(kind, "automatic", FGR, 0.05)
    before, after = (list(run.module.net.parameters()) for run in (plain, found))
    assert all(p.isfinite().all() for p in after)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, after, strict=True))
