"""Temporarily replacing hooks on parameters."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from lightning_gr.core.hooks import ExchangedHooks, OwnHook, Zero, has_accumulation_hooks, times, without_hooks


@pytest.fixture
def seen():
    return []


@pytest.fixture
def weight(seen):
    """A parameter whose hooks double and record its gradient, and record the accumulated gradient (negated)."""
    param = nn.Parameter(torch.ones(1))
    param.register_hook(lambda grad: 2 * grad)
    param.register_hook(lambda grad: seen.append(grad.item()))
    param.register_post_accumulate_grad_hook(lambda param: seen.append(-param.grad.item()))
    return param


def backward(weight):
    weight.grad = None
    weight.sum().backward()
    return weight.grad.item()


@pytest.mark.parametrize(("after", "gradient", "noted"), [(None, 1.0, []), (True, 2.0, [2.0]), (False, 1.0, [-1.0])])
def test_disabled_hooks_do_not_run_and_are_restored(weight, seen, after, gradient, noted):
    with suppress(KeyboardInterrupt), without_hooks([weight], after_accumulation=after):
        assert backward(weight) == gradient
        assert seen == noted
        raise KeyboardInterrupt
    seen.clear()
    assert backward(weight) == 2.0
    assert seen == [2.0, -2.0]


def test_replacements_run_in_the_order_of_the_original_hooks(weight, seen):
    exchanged = ExchangedHooks([weight], lambda number, hook, after: None if after else Zero())
    assert backward(weight) == 0.0
    assert seen == [-0.0]
    exchanged.put_back()
    exchanged.put_back()
    seen.clear()
    assert backward(weight) == 2.0
    assert seen == [2.0, -2.0]


@pytest.mark.parametrize("factor", [-0.5, 1.0])
def test_a_factor_applies_after_hooks_and_before_accumulation(weight, seen, factor):
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    with suppress(KeyboardInterrupt), times(factor, [weight, frozen]):
        assert backward(weight) == 2.0 * factor
        assert seen == [2.0, -2.0 * factor]
        raise KeyboardInterrupt
    assert backward(weight) == 2.0


def test_a_hook_removed_meanwhile_is_not_restored(weight, seen):
    handle = weight.register_hook(lambda grad: 10 * grad)
    with without_hooks([weight]):
        handle.remove()
        late = weight.register_hook(lambda grad: 3 * grad)
    assert backward(weight) == 6.0
    late.remove()
    assert backward(weight) == 2.0


def test_hooks_of_the_package_are_not_replaced(weight, seen):
    handle = weight.register_hook(Zero())
    with without_hooks([weight]):
        assert backward(weight) == 0.0
    handle.remove()
    assert OwnHook()(weight) is None


def test_which_parameters_have_hooks_after_accumulation(weight):
    assert has_accumulation_hooks(weight)
    other = nn.Parameter(torch.ones(1))
    other.register_hook(lambda grad: grad)
    assert not has_accumulation_hooks(other)
