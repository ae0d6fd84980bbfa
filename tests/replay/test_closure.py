"""The functional form: its passes over a closure, the arguments it accepts and the errors it raises."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from modules import (
    METHODS,
    Counts,
    assert_near,
    assert_same,
    cross_entropy,
    gradients,
    make_batches,
    mlp,
    weights,
    with_momentum,
)
from outside import Record
from torch import nn

from lightning_gr import GRRule, SAMRule, flood, in_second_pass, regularized_backward
from lightning_gr.core.ahead import Ahead
from lightning_gr.core.rules import SCHEMES, Update
from lightning_gr.core.storage import SMALLEST, WeightStorage
from lightning_gr.replay.closure import ClosurePasses, _memory_of
from lightning_gr.replay.evaluation import Surroundings
from lightning_gr.replay.footprint import Footprint
from lightning_gr.rules import FriendlySAMRule, MomentumSAMRule, State


def regularized(net, batch, rule, *, loss=cross_entropy, **options):
    """Return the regularized gradient for one batch."""
    net.zero_grad()
    regularized_backward(lambda: loss(net, batch), net, rule, **options)
    return gradients(net)


@pytest.mark.parametrize("name", METHODS)
def test_all_passes_see_the_random_numbers_and_buffers_of_the_first(name):
    batch, method = make_batches()[0], METHODS[name]

    def noisy(net, batch, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return cross_entropy(lambda x: net(nn.functional.dropout(x, 0.5)), batch)

    def frozen(net, batch):
        return noisy(lambda x: net(x) * 2, batch, seed=5)

    net = Counts()
    torch.manual_seed(5)
    actual = regularized(net, batch, method.rule, loss=noisy)
    continued = torch.rand(3)
    expected = regularized(mlp(), batch, method.rule, loss=frozen)
    assert_near({n.removeprefix("net."): g for n, g in actual.items()}, expected, 1e-13)
    assert net.count == 1
    noisy(mlp(), batch, seed=5)
    assert torch.equal(continued, torch.rand(3))


def test_returns_the_clean_loss_and_counts_its_calls():
    net, batch = mlp(), make_batches()[0]
    clean = cross_entropy(net, batch).detach()
    for scheme, passes in zip(SCHEMES, (2, 2, 3, 2), strict=True):
        losses = Record()
        loss = regularized_backward(
            lambda losses=losses: losses.append(cross_entropy(net, batch)) or losses[-1],
            net,
            GRRule(0.1, 0.1, scheme),
            level=10.0,
            loss_scale=torch.tensor(2.0),
        )
        assert torch.equal(loss, clean)
        assert not loss.requires_grad
        assert len(losses) == passes


def test_takes_parameters_mappings_and_another_backward():
    batch, expected = make_batches()[0], mlp()
    regularized(expected, batch, SAMRule(0.1))
    net, called = mlp(), []
    regularized_backward(
        lambda: {"loss": cross_entropy(net, batch), "other": 1},
        iter(net.parameters()),
        SAMRule(0.1),
        backward=lambda loss: called.append(1) or loss.backward(),
    )
    assert_same(gradients(net), gradients(expected))
    assert len(called) == 2


@pytest.mark.parametrize("level", [0.0, 10.0])
@pytest.mark.parametrize("rule", [GRRule(0.0), SAMRule(0.0), GRRule(0.1, 0.2)])
def test_a_scale_and_a_level(rule, level):
    batch, nets = make_batches()[0], (mlp(), mlp())
    clean = regularized(nets[0], batch, rule, loss=lambda *at: flood(cross_entropy(*at), level))
    actual = regularized(nets[1], batch, rule, level=level, loss_scale=torch.tensor(8.0))
    assert_near(actual, {name: 8 * grad for name, grad in clean.items()}, 1e-13)


def test_any_name_of_a_tied_parameter_excludes_it():
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)).double()
    net[2].weight = net[0].weight
    clean, excluded = (regularized(net, make_batches()[0], GRRule(gamma), exclude=["2.weight"]) for gamma in (0, 0.1))
    assert torch.equal(excluded["0.weight"], clean["0.weight"])
    assert not torch.equal(excluded["3.weight"], clean["3.weight"])


@pytest.mark.parametrize(
    ("loss_fn", "params", "options", "message"),
    [
        (lambda: 1.0, [torch.ones(1, requires_grad=True)], {}, "to return a loss with a graph but got float"),
        (lambda: None, [torch.ones(1, requires_grad=True)], {}, "to return a loss with a graph but got NoneType"),
        (lambda: {"x": 1}, [torch.ones(1, requires_grad=True)], {}, "to return a loss with a graph but got NoneType"),
        (lambda: torch.ones(()), [torch.ones(1, requires_grad=True)], {}, "with a graph but got a tensor without one"),
        (lambda: 1.0, [], {}, "Expected `params` to contain a parameter"),
        (lambda: 1.0, nn.Tanh(), {}, "Expected `params` to contain a parameter"),
        (lambda: 1.0, [torch.ones(1)], {"exclude": ["x"]}, "to be a module if `exclude` is given"),
        (lambda: 1.0, nn.Linear(1, 1), {"exclude": ["x"]}, "'x' matches none of weight, bias"),
        (lambda: 1.0, nn.Linear(1, 1), {"exclude": "bias"}, "to be a list of patterns"),
    ],
)
def test_errors(loss_fn, params, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        regularized_backward(loss_fn, params, GRRule(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("local", [True, False])
def test_passes_that_are_reduced_over_devices(local):
    """The first pass is reduced unless it is local, and of the replays only the last one is."""
    net, batch, unsynced, seen = mlp(), make_batches()[0], Record(), Record()

    @contextmanager
    def without_sync():
        unsynced.append(1)
        yield
        unsynced.clear()

    def loss_fn():
        seen.append(len(unsynced))
        return cross_entropy(net, batch)

    def backward(loss):
        seen.append(len(unsynced))
        loss.backward()

    surroundings = Surroundings(Footprint(lambda: {"net": net}), trained=lambda: list(net.parameters()))
    options = {"backward": backward, "backward_again": backward, "without_sync": without_sync, "local": local}
    passes = ClosurePasses(loss_fn, surroundings, WeightStorage(), **options)
    passes.first()
    passes.replay(lambda loss: loss, last=False)
    passes.replay(lambda loss: loss)
    assert seen == [local, local, 1, 1, 0, 0]


def test_a_missing_loss_at_the_moved_weights():
    net, batch, clean, flags = mlp(), make_batches()[0], mlp(), Record()
    cross_entropy(clean, batch).backward()
    clean_weight = clean[0].weight

    def loss_fn():
        flags.append(in_second_pass())
        return cross_entropy(net, batch) if torch.equal(net[0].weight, clean_weight) else None

    with pytest.warns(UserWarning, match=r"returned None in a second pass.*`epsilon` or `rho`") as caught:
        regularized_backward(loss_fn, net, SAMRule(0.1))
    assert len(caught) == 1
    assert_same(gradients(net), gradients(clean))
    assert flags == [False, True, False]  # the last call recomputes the clean gradient


def test_captured_variables_are_written_once_per_step():
    """Each step has a new closure, so written variables are remembered by name."""
    net, batch = mlp(), make_batches()[0]
    large, other, calls = (torch.zeros(2**11, dtype=torch.float64) for _ in range(3))
    found = Record()
    for step in range(6):

        def loss_fn(step=step):
            found.append([float(x[0]) for x in (large, other, calls)])
            calls.add_(1)
            (large if step % 3 else other).add_(1)
            return cross_entropy(net, batch) * (1 + large[0] + other[0])

        net.zero_grad()
        regularized_backward(loss_fn, net, SAMRule(0.1))
        assert found[-1] == found[-2], (step, list(found))
        assert (calls == step + 1).all()
        assert (other == 1 + step // 3).all()
        assert (large == step - step // 3).all()


@torch.no_grad()
def step_in_place(param):
    param.sub_(param.grad)


def step_unseen(param):
    param.data.sub_(param.grad)


def step_elsewhere(param):
    param.data = param.data - param.grad
    param.grad = None


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused():
    net, batch = mlp(), make_batches()[0]
    for param in net.parameters():
        param.register_post_accumulate_grad_hook(step_unseen)
    regularized(net, batch, GRRule(0.0))  # allowed without a second pass
    with pytest.raises(RuntimeError, match="during the backward pass"):
        regularized(net, batch, GRRule(0.1))


def test_an_optimizer_that_steps_now_and_then_is_refused():
    """In a step in which nothing is learned, too."""
    net, batch, now = mlp(), make_batches()[0], []
    net[0].weight.register_post_accumulate_grad_hook(lambda param: step_unseen(param) if now else None)
    for _ in range(2):
        regularized(net, batch, GRRule(0.1))
    now.append(True)
    with pytest.raises(RuntimeError, match="during the backward pass"):
        regularized(net, batch, GRRule(0.1))


def test_nothing_is_searched_without_a_second_pass():
    net = mlp()
    regularized(net, make_batches()[0], GRRule(0.0))
    surroundings, _ = _memory_of(net, list(net.parameters()))
    assert not surroundings.footprint.places
    regularized(net, make_batches()[0], GRRule(0.1))
    assert surroundings.footprint.places


def test_what_is_learned_about_a_module_lives_as_long_as_the_module():
    net = mlp()
    params = list(net.parameters())
    memory = _memory_of(net, params)
    assert _memory_of(net, params) is memory
    surroundings, _ = memory
    assert surroundings.trained() == params
    assert _memory_of(None, params)[0] is not _memory_of(None, params)[0]
    gone = weakref.ref(net)
    del net, params  # freed without garbage collection, as there are no reference cycles
    assert gone() is None
    assert surroundings.trained() == []


def test_an_iterator_that_only_a_closure_holds_is_named_once():
    net, batch, numbers = mlp(), make_batches()[0], iter(range(100))

    def train():
        for _ in range(3):
            regularized_backward(lambda: cross_entropy(net, batch) * (1 + next(numbers)), net, SAMRule(0.1))

    with pytest.warns(UserWarning, match="`numbers` cannot be put back") as caught:
        train()
    assert len(caught) == 1


# --- rules that look at more than the gradient


class Told:
    """A rule that keeps what it is told."""

    def __init__(self):
        self.contexts = []

    def update(self, at):
        self.contexts.append(at)
        return Update("gradient", 1.0)


def test_a_rule_is_told_of_the_strength_the_step_and_the_first_group():
    net, batch, rule, state = mlp(), make_batches()[0], Told(), State()
    rates = zip(net.parameters(), (4.0, 3.0, 2.0, 1.0), strict=True)
    optimizer = torch.optim.SGD([{"params": [param], "lr": lr} for param, lr in rates])
    for options in ({}, {"strength": 0.5, "state": state, "optimizer": optimizer}, {"state": state}):
        regularized(net, batch, rule, **options)
    assert [(at.strength, at.step, at.lr) for at in rule.contexts] == [(1.0, 0, 0.0), (0.5, 0, 4.0), (1.0, 1, 0.0)]
    assert state.step == 2


def test_a_rule_that_keeps_something_needs_a_state():
    with pytest.raises(ValueError, match="Expected `state` with a rule that keeps 'average'"):
        regularized(mlp(), make_batches()[0], FriendlySAMRule(0.2))


@pytest.mark.parametrize("exclude", [[], ["0.*"]])
def test_momentum_sam_takes_its_gradient_at_the_point_ahead(exclude):
    net, batch = mlp(), make_batches()[0]
    optimizer = with_momentum(net)
    before = weights(net)
    targets = list(net.parameters())[2 if exclude else 0 :]
    with Ahead(optimizer, targets, 0.5, WeightStorage()).displaced():
        expected = regularized(net, batch, GRRule(0.0))
    found = regularized(net, batch, MomentumSAMRule(1.0), strength=0.5, optimizer=optimizer, exclude=exclude)
    assert_same(found, expected)
    assert_same(weights(net), before)
    with pytest.raises(ValueError, match="Expected `optimizer` with a rule that looks ahead"):
        regularized(net, batch, MomentumSAMRule(0.5))
    assert_same(regularized(net, batch, MomentumSAMRule(0.0)), regularized(net, batch, GRRule(0.0)))


@pytest.mark.parametrize("step", [step_in_place, step_unseen, step_elsewhere])
@pytest.mark.parametrize("name", ["0.bias", "0.weight"])
@pytest.mark.parametrize("smallest", [0, SMALLEST])
def test_momentum_sam_too_refuses_an_optimizer_that_steps_in_the_backward_pass(step, name, smallest, monkeypatch):
    monkeypatch.setattr("lightning_gr.core.storage.SMALLEST", smallest)
    net = mlp()
    optimizer = with_momentum(net)
    net.get_parameter(name).register_post_accumulate_grad_hook(step)
    with pytest.raises(RuntimeError, match="during the backward pass"):
        regularized(net, make_batches()[0], MomentumSAMRule(0.5), optimizer=optimizer)


def test_gradients_that_a_closure_leaves_behind_belong_to_the_loss():
    """As where it back-propagates a penalty by itself."""
    batch = make_batches()[0]

    def penalty(net):
        return sum(param.pow(4).sum() for param in net.parameters())

    def in_parts(net, batch):
        penalty(net).backward()
        return cross_entropy(net, batch)

    def at_once(net, batch):
        return penalty(net) + cross_entropy(net, batch)

    assert_near(*(regularized(mlp(), batch, SAMRule(0.2), loss=loss) for loss in (in_parts, at_once)))


def test_a_hook_that_changes_a_single_entry_runs_in_both_passes():
    """At first all entries are compared, and what is learned then is not forgotten."""
    net, calls = nn.Linear(40, 25), Record()

    def write(grad):
        calls.append(1)
        grad.data[7, 3] = 5.0

    net.weight.register_hook(lambda grad: write(grad))
    for step in range(1, 4):
        regularized(net, torch.ones(2, 40), SAMRule(0.1), loss=lambda net, x: net(x).pow(2).sum())
        assert len(calls) == 2 * step


def test_an_iterator_of_the_module_is_named_by_its_path():
    net = mlp()
    net.numbers = iter(range(100))
    with pytest.warns(UserWarning, match=r"`module\.numbers` cannot be put back"):
        regularized(net, make_batches()[0], SAMRule(0.1), loss=lambda *at: cross_entropy(*at) * (1 + next(net.numbers)))


def test_hooks_that_only_look_run_once_a_step():
    net, seen = mlp(), Record()
    net[0].bias.register_hook(lambda grad: seen.append(1))
    for step in range(3):
        regularized(net, make_batches()[0], SAMRule(0.1))
        assert len(seen) == step + 1


def test_a_gradient_is_clipped_before_it_is_combined():
    net, batch = mlp(), make_batches()[0]
    clean = regularized(net, batch, GRRule(0.0))
    norm = torch.cat([grad.flatten() for grad in clean.values()]).norm().item()
    found = regularized(net, batch, GRRule(0.1, 0.2), gradient_clip=(norm / 2, norm * 100))
    half = {name: grad / 2 for name, grad in clean.items()}
    moved = mlp()
    with torch.no_grad():
        for name, param in moved.named_parameters():
            param += 0.2 * half[name]
    second = regularized(moved, batch, GRRule(0.0))
    assert_near(found, {name: 0.5 * half[name] + 0.5 * second[name] for name in clean})
