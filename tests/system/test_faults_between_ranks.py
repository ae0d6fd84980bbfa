"""Ranks that differ in their gradients, batches, layers or decisions give the reference's result and do not hang."""

import copy
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import faulty_ranks
import pytest
import reference
import torch
from faulty_ranks import CASES, HOOKED, HOOKS, LEVEL, LOCAL_STEPS, RANKS, Net, batches_of, loss_of, parts_of
from launching import torchrun
from modules import METHODS, STATEFUL, assert_near, weights
from torch.func import functional_call

LIMIT = 400
pytestmark = [pytest.mark.launch, pytest.mark.timeout(LIMIT + 60)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each rank for all cases; processes are only started once, since that takes most of the time."""
    folder = tmp_path_factory.mktemp("faulty")
    torchrun("faulty_ranks.py", folder, ranks=RANKS, limit=LIMIT)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def value(net, theta, case, rank, index):
    """Return the loss of a micro-batch at θ."""
    return functional_call(
        _Loss(net),
        {f"net.{n}": p for n, p in theta.items()},
        (batches_of(case, rank)[index], parts_of(case.parts, rank, index)),
    )


class _Loss(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch, parts):
        return loss_of(self.net, batch, parts)


def is_there(case, rank, index):
    return (rank, index) not in case.without


class Meeting:
    """Averages the losses of a micro-batch over ranks, each of which runs in its own thread."""

    def __init__(self):
        self.changed, self.losses, self.turns = threading.Condition(), defaultdict(dict), defaultdict(int)

    def mean(self, ranks, index, losses):
        with self.changed:
            for rank, loss in losses.items():
                self.turns[rank, index] += 1
                mine = self.losses[index, self.turns[rank, index]]
                mine[rank] = float(loss.detach())
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(mine) == len(ranks), timeout=20)
            return sum(mine.values()) / len(mine)


def window_loss(net, case, indices, ranks, meeting=None):
    """Return the mean over ranks of Σ L/window over a window's micro-batches, with flooding, as a function of θ."""
    net = copy.deepcopy(net)  # threads must not share it

    def total(theta):
        each = []
        for index in indices:
            there = [rank for rank in range(RANKS) if is_there(case, rank, index)]
            losses = {rank: value(net, theta, case, rank, index) for rank in there if rank in ranks}
            below = bool(losses and case.flooding and meeting.mean(there, index, losses) < LEVEL)
            each += [(-loss if below else loss) / len(ranks) / case.window for loss in losses.values()]
        return sum(each) + 0.0 * sum(p.square().sum() for p in theta.values())

    return total


def by_hand(case):
    """Train in one process with the float64 reference."""
    net = Net()
    theta = {n: p.detach().clone() for n, p in net.named_parameters()}
    left = [{n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(RANKS)]  # in `.grad` of each rank
    optimizer = reference.SGD(momentum=0.9 if case.parts == "all" else 0.0)
    method = None if case.method is None else (METHODS | STATEFUL)[case.method]
    stateful = method.reference() if case.method in STATEFUL else None
    excluded = [n for n in theta for pattern in case.options.get("exclude", ()) if n.endswith(pattern.strip("*"))]
    local, micro = not case.options.get("ascent_sync", True), case.options.get("accumulation") == "micro_batch"
    step = 0
    for start in range(0, faulty_ranks.BATCHES, case.window):
        indices = range(start, start + case.window)
        for rank in range(RANKS):
            # Lightning only zeroes gradients at the first micro-batch of a window, if that has a loss
            if (rank, start) not in case.without:
                left[rank] = {n: torch.zeros_like(p) for n, p in theta.items()}
        due = step >= case.options.get("start_step", 0) and step % case.options.get("interval", 1) == 0
        strength = min(1.0, step / case.options["warmup_steps"]) if "warmup_steps" in case.options else 1.0

        def gradient(loss, step=step, due=due, strength=strength, theta=theta):
            if method is None or not due:
                return reference.plain(loss, theta)
            if stateful is not None:
                return stateful.gradient(step, loss, theta, optimizer)
            clip = case.options.get("gradient_clip")
            if clip:
                return clipped_central(method, loss, theta, clip, excluded)
            act = lambda part_loss, part: method.gradient(part_loss, part, strength)  # noqa: E731
            return reference.excluding(act, excluded)(loss, theta) if excluded else act(loss, theta)

        groups = [[index] for index in indices] if micro else [indices]
        makers = [(rank,) for rank in range(RANKS)] if local else [tuple(range(RANKS))]
        new = {n: torch.zeros_like(p) for n, p in theta.items()}
        # a separate micro-batch uses the gradient of its whole loss, which then counts as one part of the window
        scale, meeting = case.window if micro else 1, Meeting()

        def made(ranks, groups=groups, gradient=gradient, scale=scale, meeting=meeting):
            losses = [window_loss(net, case, group, ranks, meeting) for group in groups]
            return [gradient(lambda t, loss=loss: scale * loss(t)) for loss in losses]

        with ThreadPoolExecutor(len(makers)) as pool:
            for own in chain.from_iterable(pool.map(made, makers)):
                new = {n: new[n] + own[n] / scale / len(makers) for n in new}
        total = {n: new[n] + sum(each[n] for each in left) / RANKS for n in new}
        if all(is_there(case, rank, indices[-1]) for rank in range(RANKS)):
            theta = optimizer.step(theta, total)
            left = [total] * RANKS
            step += 1
        else:
            for rank in range(RANKS):  # without a step, gradients stay on their ranks and are not reduced
                own = reference.plain(window_loss(net, case, indices, (rank,), Meeting()), theta)
                left[rank] = {n: left[rank][n] + own[n] for n in own}
    return theta


def clipped_central(method, loss, theta, limit, excluded):
    """Clip each gradient before combining them, for the central scheme and for SAM."""
    free = {n: p for n, p in theta.items() if n not in excluded}
    fixed = {n: p for n, p in theta.items() if n in excluded}
    clean = reference.plain(loss, theta)
    g = reference.clipped({n: clean[n] for n in free}, limit)

    def at(distance, d):
        there = reference.combine(1.0, free, distance, d)
        return reference.clipped(reference.plain(lambda part: loss({**fixed, **part}), there), limit)

    if "rho" in method.constants:
        final = at(method.constants["rho"], reference.unit(g))
    else:
        gamma, epsilon = method.constants["gamma"], method.constants["epsilon"]
        both = reference.combine(1.0, at(epsilon, g), -1.0, at(-epsilon, g))
        final = reference.combine(1.0, g, gamma / (2 * epsilon), both)
    return {**{n: clean[n] for n in fixed}, **final}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(results, name):
    case, start = CASES[name], weights(Net())
    expected = by_hand(case)
    for rank in results:
        moved = {n: rank[name][n] - start[n] for n in start}
        assert_near(moved, {n: expected[n] - start[n] for n in start}, 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_identical_weights(results, name):
    a, b = (rank[name] for rank in results)
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_count_optimizer_steps(results, name):
    """Counts are the same as in plain training, whatever the number of passes; the custom hook counts buckets."""
    kind, case = HOOKS[name][0], HOOKED[HOOKS[name][1]]
    steps = range(1, faulty_ranks.BATCHES // case.window + 1)
    for rank in results:
        plain = rank[f"{kind}, plain"]["counts"][: len(steps)]
        assert rank[name]["counts"] == plain
        if kind != "own":
            assert plain == [step if kind == "power" else min(step, LOCAL_STEPS) for step in steps]


@pytest.mark.parametrize("name", [name for name in HOOKED if not name.startswith("NaN")])
def test_power_sgd_is_not_biased_by_the_ascent(results, name):
    """Its error feedback compensates for the compression, so the weights stay close to those without it."""
    full, start = by_hand(HOOKED[name]), weights(Net())
    for rank in results:
        moved = {n: rank[f"power, {name}"]["weights"][n] - start[n] for n in start}
        assert_near(moved, {n: full[n] - start[n] for n in start}, 0.08)


@pytest.mark.parametrize("name", ["step", "step, local", "rule"])
@pytest.mark.parametrize(("window", "manual"), [(1, False), (2, False), (1, True)])
def test_ranks_that_decide_differently_all_end_with_an_error(results, name, window, manual):
    """The error comes in the step where they differ, before any rank waits for another one."""
    for rank in results:
        message, step = rank["moody"][name, window, manual]
        assert "decided differently on some ranks in optimizer step 3" in message
        assert step == 3


@pytest.mark.parametrize("name", ["rho", "interval", "scheme", "exclude", "level", "sync"])
def test_ranks_with_different_settings_all_end_with_an_error(results, name):
    for rank in results:
        message, step = rank["moody"][name, 1, False]
        assert "differ between ranks" in message
        assert step == 0
