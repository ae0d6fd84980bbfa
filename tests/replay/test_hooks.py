"""Telling hooks that only read a gradient from those that change it."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_gr.core.hooks import Zero
from lightning_gr.replay.hooks import ObservingHooks, may_change

SEEN = []


class Watcher:
    """Hooks that only read a gradient, written in various ways."""

    def method(self, grad):
        SEEN.append(grad.clone())

    def gives_back(self, grad):
        SEEN.append(grad.clone())
        return grad

    def sometimes(self, grad):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls % 2 == 0:
            return
        SEEN.append(grad.clone())

    def with_name(self, name, grad):
        SEEN.append((name, grad.clone()))

    def __call__(self, grad):
        for _ in range(2):
            self.method(grad)


def gives_it_back_early(grad):
    """A function with branches, one of which returns its argument."""
    if len(SEEN) > 10:
        return grad
    SEEN.append(grad.clone())
    return None


def gives_it_back_early_with_name(name, grad):
    if len(SEEN) > 10:
        return grad
    SEEN.append((name, grad.clone()))
    return None


def asks_for_a_special_method(grad):
    if grad.__len__() > 0:  # ends with an underscore without being in place
        SEEN.append(grad.clone())


class Changer:
    """Hooks that may change a gradient, even if they rarely do."""

    limit = 1e9

    def large_only(self, grad):
        if grad.norm() > self.limit:
            return grad / grad.norm()
        return None

    def in_place(self, grad):
        if grad.norm() > self.limit:
            grad.mul_(0.5)

    def by_operator(self, grad):
        if grad.norm() > self.limit:
            grad /= 2

    def gives_another(self, grad):
        if grad.norm() > self.limit:
            grad = grad / 2
        return grad

    def out(self, grad):
        if grad.norm() > self.limit:
            torch.mul(grad, 2.0, out=grad)

    def after_accumulation(self, param):
        if param.grad.norm() > self.limit:
            param.grad = param.grad / 2

    def through_data(self, param):
        if param.grad.norm() > self.limit:
            param.data = param.grad

    def gives_something_else(self, grad):
        half = grad / 2
        if grad.norm() > self.limit:
            return half
        return None

    def with_name(self, name, grad):
        return grad.sign() if name == "other" else None

    def __call__(self, grad):
        return grad * 2 if grad.norm() > self.limit else None


watcher, changer = Watcher(), Changer()
READING = [
    watcher,
    watcher.method,
    watcher.gives_back,
    watcher.sometimes,
    partial(watcher.with_name, "weight"),
    gives_it_back_early,
    partial(gives_it_back_early_with_name, "weight"),
    asks_for_a_special_method,
    lambda grad: SEEN.append(grad.clone()),
    SEEN.append,
]
CHANGING = [
    changer,
    changer.large_only,
    changer.in_place,
    changer.by_operator,
    changer.gives_another,
    changer.out,
    changer.after_accumulation,
    changer.through_data,
    changer.gives_something_else,
    partial(changer.with_name, "weight"),
    lambda grad: grad * 2 if grad.norm() > 1e9 else None,
]


@pytest.mark.parametrize("hook", READING)
def test_code_that_only_reads_cannot_change_a_gradient(hook):
    assert not may_change(hook)


@pytest.mark.parametrize("hook", CHANGING)
def test_code_that_may_change_a_gradient_is_recognized(hook):
    assert may_change(hook)


def runs(hook, after=False, passes=1, exactly=True, grad=1.0):
    """Return whether a hook runs where hooks that only read are silenced."""
    weight, hooks = nn.Parameter(torch.ones(3)), ObservingHooks()
    calls = []
    noted = lambda tensor: (calls.append(1), hook(tensor))[1]  # noqa: E731
    (weight.register_post_accumulate_grad_hook if after else weight.register_hook)(noted)
    for _ in range(passes):
        weight.grad = None
        with hooks.watched([weight], exactly=exactly):
            (weight * torch.full((3,), grad)).sum().backward()
    calls.clear()
    with hooks.silenced([weight]):
        (weight * torch.ones(3)).sum().backward()
    silenced = not calls
    (weight * torch.ones(3)).sum().backward()
    assert calls  # the hook is restored
    return not silenced


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("hook", READING)
def test_hooks_that_only_read_are_silenced(hook, exactly):
    assert not runs(hook, exactly=exactly)


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize(
    "hook",
    [
        torch.sign,
        lambda grad: 2 * grad,
        lambda grad: (grad.mul_(2), None)[1],
        lambda grad: (grad.data.mul_(2), None)[1],  # does not increase the version counter
        lambda grad: grad.clone(),
    ],
)
def test_hooks_that_change_a_gradient_run(hook, exactly):
    assert runs(hook, exactly=exactly)


def test_a_hook_whose_code_may_change_a_gradient_always_runs():
    weight, hooks, calls = nn.Parameter(torch.ones(3)), ObservingHooks(), []

    def sometimes(grad):
        calls.append(1)
        return grad * 2 if len(calls) > 100 else None

    weight.register_hook(sometimes)
    for exactly in (True, False):
        with hooks.watched([weight], exactly=exactly):
            weight.sum().backward()
        with hooks.silenced([weight]):
            weight.sum().backward()
    assert len(calls) == 4


def test_a_hook_that_changes_its_first_gradient_late():
    """The change is in a function that the hook calls, whose code is not examined."""

    def scale(grad):
        return grad * 0.5 if grad.sum() > 5 else None

    assert not runs(scale)
    assert runs(scale, grad=2.0)


def test_one_that_has_changed_a_gradient_runs_from_then_on_even_if_it_changes_none_again():
    calls = []

    def scale(grad):
        calls.append(1)
        return grad * 2 if len(calls) == 1 else None

    assert runs(lambda grad: scale(grad), passes=3)


@pytest.mark.parametrize("exactly", [True, False])
def test_a_change_of_one_entry_is_seen_if_all_are_compared(exactly):
    weight, hooks, calls = nn.Parameter(torch.ones(1000)), ObservingHooks(), []

    def write(grad):
        calls.append(1)
        grad.data[301] = 5.0

    weight.register_hook(lambda grad: write(grad))
    with hooks.watched([weight], exactly=exactly):
        (2 * weight).pow(2).sum().backward()
    with hooks.silenced([weight]):
        weight.sum().backward()
    assert len(calls) == (2 if exactly else 1)


def test_a_gradient_may_have_one_number_for_all_entries():
    """As that of a sum."""
    weight, hooks, seen = nn.Parameter(torch.ones(100)), ObservingHooks(), []
    weight.register_hook(lambda grad: seen.append(grad.stride()))
    with hooks.watched([weight], exactly=False):
        weight.sum().backward()
    assert seen == [(0,)]


def test_after_accumulation():
    weights = []

    def keep(param):
        weights.append(param.grad)

    def replace(param):
        param.grad = param.grad * 2

    def drop(param):
        param.grad = None

    def step(param):
        param.data = param.data
        with torch.no_grad():
            param.sub_(param.grad)

    assert not runs(keep, after=True)
    assert all(runs(hook, after=True) for hook in (replace, drop, step))


@pytest.mark.parametrize("exactly", [True, False])
def test_a_hook_that_finds_no_gradient(exactly):
    """An earlier one has dropped it."""
    weight, hooks, seen = nn.Parameter(torch.ones(3)), ObservingHooks(), []

    def drop(param):
        param.grad = None

    weight.register_post_accumulate_grad_hook(drop)
    weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
    with hooks.watched([weight], exactly=exactly):
        weight.sum().backward()
    with hooks.silenced([weight]):
        weight.sum().backward()
    assert seen == [None]
    assert weight.grad is None


@pytest.mark.parametrize("make", [lambda: nn.Embedding(3, 2, sparse=True), lambda: nn.Embedding(3, 2, device="meta")])
def test_of_a_gradient_that_is_not_dense_or_not_on_the_host_no_entries_are_read(make):
    layer, hooks, seen = make(), ObservingHooks(), []
    indices = torch.tensor([0, 2], device=layer.weight.device)
    layer.weight.register_hook(lambda grad: seen.append(grad))
    with hooks.watched([layer.weight], exactly=False):
        layer(indices).sum().backward()
    with hooks.silenced([layer.weight]):
        layer(indices).sum().backward()
    assert len(seen) == 1


def test_a_hook_that_fails_is_no_longer_watched():
    weight, hooks = nn.Parameter(torch.ones(3)), ObservingHooks()

    def fails(grad):
        raise FloatingPointError

    weight.register_hook(fails)
    with pytest.raises(FloatingPointError), hooks.watched([weight], exactly=True):
        weight.sum().backward()
    assert list(weight._backward_hooks.values()) == [fails]
    hooks.end()
    with pytest.raises(FloatingPointError), hooks.silenced([weight]):
        weight.sum().backward()


def test_hooks_of_the_package_are_not_watched():
    weight, hooks = nn.Parameter(torch.ones(3)), ObservingHooks()
    handle = weight.register_hook(Zero())
    with hooks.watched([weight], exactly=True):
        weight.sum().backward()
    with hooks.silenced([weight]):
        weight.sum().backward()
    assert weight.grad.tolist() == [0.0] * 3
    handle.remove()
