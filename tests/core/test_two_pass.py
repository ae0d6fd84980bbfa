"""The algorithm in its functional form, without Lightning, against references, identities and another package."""

import weakref

import pytest
import pytorch_optimizer
import reference
import torch
from accelerator import treated_as_accelerator
from hypothesis import given
from hypothesis import strategies as st
from modules import (
    METHODS,
    MOVING,
    OPTIMIZERS,
    assert_near,
    assert_same,
    cross_entropy,
    gradients,
    make_batches,
    mlp,
    sgd,
    weights,
)
from outside import Record
from torch import nn

from lightning_gr import GRRule, SAMRule, flood, regularized_backward
from lightning_gr.core.gradients import StashedGradients
from lightning_gr.core.rules import SCHEMES, Probe, Update
from lightning_gr.core.selection import match_params
from lightning_gr.core.storage import WeightStorage
from lightning_gr.core.two_pass import NoLossError, add_second_pass_, extract_loss


def regularized(net, batch, rule, *, loss=cross_entropy, **options):
    """Return the regularized gradient for one batch."""
    net.zero_grad()
    regularized_backward(lambda: loss(net, batch), net, rule, **options)
    return gradients(net)


# --- reference implementations


def train(net, rule, optimizer, batches, **options):
    for batch in batches:
        optimizer.zero_grad()
        regularized_backward(lambda batch=batch: cross_entropy(net, batch), net, rule, **options)
        optimizer.step()


def train_by_hand(method, optimizer, batches, level=None):
    losses = [reference.loss_of(mlp(), cross_entropy, [batch], level=level) for batch in batches]
    return reference.train(mlp(), losses, optimizer, lambda step, loss, theta: method.gradient(loss, theta))


@pytest.mark.parametrize("level", [None, 1.09])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_reference(name, optimizer, level):
    method, (build, by_hand), batches = METHODS[name], OPTIMIZERS[optimizer], make_batches() * 3
    net = mlp()
    train(net, method.rule, build(net.parameters()), batches, level=level)
    assert_near(weights(net), train_by_hand(method, by_hand(), batches, level))


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_reference_in_the_accelerator_branch(name, loss_scale):
    """On accelerators the factor stays on the device: it is multiplied into the gradient and divided out again."""
    net, batch, method = mlp(), make_batches()[0], METHODS[name]
    scale = None if loss_scale is None else torch.tensor(loss_scale, dtype=torch.float64)
    with treated_as_accelerator() as asked:
        found = regularized(net, batch, method.rule, loss_scale=scale)
    assert asked.called == bool(method.rule.update().probes)
    expected = method.gradient(reference.loss_of(net, cross_entropy, [batch]), weights(net))
    assert_near({n: g / (loss_scale or 1.0) for n, g in found.items()}, expected)
    assert_same(weights(net), weights(mlp()))


@pytest.mark.parametrize("name", MOVING)
def test_one_autocast_context_around_both_passes(name):
    """Its cache of 16-bit weights is cleared whenever they are moved or restored."""
    batch = make_batches(dtype=torch.float32)[0]
    nets = [mlp(dtype=torch.float32) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        before = nets[0](batch[0])
        cached = regularized(nets[0], batch, METHODS[name].rule)
        after = nets[0](batch[0])
    assert before.dtype is torch.bfloat16
    assert torch.equal(after, before)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = regularized(nets[1], batch, METHODS[name].rule)
    assert_same(cached, expected)


def test_the_flood_level_of_these_tests_lies_between_the_losses():
    below = [cross_entropy(mlp(), batch).item() < 1.09 for batch in make_batches()]
    assert any(below)
    assert not all(below)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_scale_only_scales_the_result(name):
    method, batch = METHODS[name], make_batches()[0]
    scaled = regularized(mlp(), batch, method.rule, loss_scale=torch.tensor(1024.0), level=0.5)
    expected = regularized(mlp(), batch, method.rule, level=0.5)
    assert_near({n: g / 1024 for n, g in scaled.items()}, expected, 1e-13)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "unnormalized SAM"])
def test_strength_scales_the_penalty_or_the_radius(name, strength):
    net, batch = mlp(), make_batches()[0]
    loss = reference.loss_of(net, cross_entropy, [batch])
    expected = METHODS[name].gradient(loss, weights(net), strength)
    assert_near(regularized(net, batch, METHODS[name].rule, strength=strength), expected)


@pytest.mark.parametrize("name", METHODS)
def test_excluded_parameters_keep_exactly_the_clean_gradient(name):
    net, batch, method = mlp(6, 6), make_batches()[0], METHODS[name]
    biases = {n for n, _ in net.named_parameters() if n.endswith("bias")}
    loss = reference.loss_of(net, cross_entropy, [batch])
    clean = regularized(net, batch, GRRule(gamma=0.0))
    actual = regularized(net, batch, method.rule, exclude=["*.bias"])
    assert_near(actual, reference.excluding(method.gradient, biases)(loss, weights(net)))
    for part, same in ((biases, True), (actual.keys() - biases, False)):
        assert all(torch.equal(actual[n], clean[n]) is same for n in part)


class Real(nn.Module):
    """Computes with complex weights, which are stored as pairs of real numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x):
        return (x.to(torch.complex128) @ torch.view_as_complex(self.weight)).abs()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_complex(Real().weight.detach().clone()))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.weight).abs()


@pytest.mark.parametrize("name", [name for name in METHODS if "ASAM" not in name])  # |θ| differs
def test_complex_parameters_count_as_pairs_of_real_ones(name):
    results = []
    for net in (Complex(), Real()):
        train(net, METHODS[name].rule, sgd(net.parameters()), make_batches())
        weight = net.weight.detach()
        results.append({"weight": torch.view_as_real(weight) if weight.is_complex() else weight})
    assert_near(*results, 1e-13)


def test_a_linear_loss_has_no_curvature():
    net, batch = nn.Linear(5, 3).double(), make_batches()[0]
    results = [
        regularized(net, batch, rule, loss=lambda n, b: n(b[0]).sum())
        for rule in (GRRule(0), GRRule(1.0, 0.1, "exact"))
    ]
    assert_same(*results)


# --- identities, on random networks


class Problem:
    """A random network with a random batch."""

    def __init__(self, hidden, activation, seed):
        self.net = mlp(*hidden, activation=activation, seed=seed)
        self.batch = make_batches(6, 6, seed=seed)[0]

    def __repr__(self):
        return f"{self.net}, {self.batch}"

    def gradient(self, rule, **options):
        return regularized(self.net, self.batch, rule, **options)


problems = st.builds(
    Problem,
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.sampled_from([nn.Tanh, nn.Softplus, nn.Sigmoid, nn.SiLU]),
    st.integers(0, 1000),
)
anywhere = pytest.mark.parametrize("normalize", [False, True])
constants = st.floats(1e-3, 1.0)


@given(problem=problems, rho=constants)
def test_forward_with_gamma_epsilon_is_unnormalized_sam(problem, rho):
    loss = reference.loss_of(problem.net, cross_entropy, [problem.batch])
    expected = reference.unnormalized_sam(loss, weights(problem.net), rho)
    assert_near(problem.gradient(GRRule(rho, rho)), expected)


@anywhere
@given(problem=problems, epsilon=constants, scheme=st.sampled_from(SCHEMES))
def test_gamma_zero_is_plain(normalize, problem, epsilon, scheme):
    problem.net.zero_grad()
    cross_entropy(problem.net, problem.batch).backward()
    plain = gradients(problem.net)
    assert_same(problem.gradient(GRRule(0.0, epsilon, scheme, normalize)), plain)


@anywhere
@given(problem=problems, gamma=constants, epsilon=constants, scheme=st.sampled_from(SCHEMES))
def test_the_penalty_is_linear_in_gamma(normalize, problem, gamma, epsilon, scheme):
    none, once, twice = (problem.gradient(GRRule(k * gamma, epsilon, scheme, normalize)) for k in (0, 1, 2))
    extrapolated = {name: 2 * once[name] - none[name] for name in none}
    assert_near(twice, extrapolated, 1e-10 * max(1, gamma / epsilon))


@anywhere
@given(problem=problems, gamma=constants, epsilon=constants)
def test_central_is_the_mean_of_forward_and_backward(normalize, problem, gamma, epsilon):
    there, back, both = (
        problem.gradient(GRRule(gamma, epsilon, s, normalize)) for s in ("forward", "backward", "central")
    )
    mean = {name: (there[name] + back[name]) / 2 for name in both}
    assert_near(both, mean, 1e-10 * max(1, gamma / epsilon))


@anywhere
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
@given(problem=problems)
def test_finite_differences_converge_to_exact(scheme, order, normalize, problem):
    exact = problem.gradient(GRRule(1.0, scheme="exact", normalize=normalize))

    def error(epsilon):
        found = problem.gradient(GRRule(1.0, epsilon, scheme, normalize))
        return torch.stack([(found[name] - exact[name]).norm() for name in exact]).norm().item()

    coarse, fine = error(1e-2), error(1e-3)
    # the constant is for networks with tiny errors, where the third derivative nearly vanishes
    assert fine <= 2 * coarse / 10**order + 1e-9


@given(problem=problems, rho=constants, adaptive=st.booleans(), factor=st.floats(1e-3, 1e3))
def test_sam_does_not_depend_on_the_scale_of_the_loss(problem, rho, adaptive, factor):
    rule = SAMRule(rho, adaptive)
    expected = {name: factor * g for name, g in problem.gradient(rule).items()}
    assert_near(problem.gradient(rule, loss=lambda net, batch: factor * cross_entropy(net, batch)), expected)


@given(problem=problems, name=st.sampled_from(list(METHODS)), level=st.none() | st.floats(0, 2))
def test_the_weights_are_bit_identical_after_the_call(problem, name, level):
    before = weights(problem.net)
    problem.gradient(METHODS[name].rule, level=level)
    assert_same(weights(problem.net), before)


@given(problem=problems, name=st.sampled_from(list(METHODS)))
def test_a_zero_gradient_moves_nothing(problem, name):
    seen = Record()

    def flat(net, batch):
        seen.append(weights(net))
        return (net(batch[0]) * 0.0).sum()

    result = problem.gradient(METHODS[name].rule, loss=flat)
    assert len(seen) >= 2
    for theta in seen[1:]:
        assert_same(theta, seen[0])
    assert not any(g.any() for g in result.values())  # nor NaN, for which `any` is true


@given(problem=problems, name=st.sampled_from(list(METHODS)), level=st.floats(0, 3))
def test_a_flooded_method_is_the_method_on_the_flooded_loss(problem, name, level):
    explicit = problem.gradient(METHODS[name].rule, loss=lambda net, batch: flood(cross_entropy(net, batch), level))
    assert_near(problem.gradient(METHODS[name].rule, level=level), explicit)


# --- another package


@pytest.mark.parametrize("build", [OPTIMIZERS[name][0] for name in OPTIMIZERS], ids=OPTIMIZERS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_pytorch_optimizer(monkeypatch, adaptive, build):
    # pytorch_optimizer.SAM (as of 4.1.0) perturbs by ρ p² g / ‖|p| g‖ if adaptive, so η = 0, and by ρ g / ‖g‖ if not,
    # with `perturb_eps` added to the norm; it computes the norm in float32, which would only leave 7 digits
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    ours, theirs, batches = mlp(), mlp(), make_batches() * 3
    train(ours, SAMRule(0.3, adaptive), build(ours.parameters()), batches)
    base = build(theirs.parameters())
    options = {key: base.defaults[key] for key in ("lr", "momentum") if key in base.defaults}
    optimizer = pytorch_optimizer.SAM(theirs.parameters(), type(base), 0.3, adaptive, perturb_eps=0.0, **options)
    for batch in batches:
        cross_entropy(theirs, batch).backward()
        optimizer.first_step(zero_grad=True)
        cross_entropy(theirs, batch).backward()
        optimizer.second_step(zero_grad=True)
    assert_near(weights(ours), weights(theirs))


# --- the function itself


def test_the_loss_is_what_a_step_returned_or_holds_as_loss():
    loss = torch.ones(())
    assert extract_loss(loss) is loss
    assert extract_loss({"loss": loss, "x": 1}) is loss
    assert extract_loss({"x": loss}) is extract_loss(None) is None


def names_of(net, patterns):
    return match_params(patterns, net)


def test_patterns_match_any_name_of_a_tied_parameter():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert names_of(net, ["1.weight"]) == {id(net[0].weight)}
    assert names_of(net, ["*.bias"]) == {id(net[0].bias), id(net[1].bias)}
    assert names_of(net, ["0.*", "[1].bias"]) == {id(net[0].weight), id(net[0].bias), id(net[1].bias)}
    assert names_of(net, []) == set()
    with pytest.raises(ValueError, match=r"'0\.Weight' matches none of 0\.weight, 0\.bias, 1\.weight, 1\.bias;"):
        names_of(net, ["*", "0.Weight"])


def test_exact_at_zero_weights():
    """Such as freshly initialized biases."""
    net, batch, method = mlp(), make_batches()[0], METHODS["exact GR"]
    for layer in (net[0], net[2]):
        nn.init.zeros_(layer.bias)
    expected = method.gradient(reference.loss_of(net, cross_entropy, [batch]), weights(net))
    assert_near(regularized(net, batch, method.rule), expected)


def test_exact_where_losses_use_different_parameters():
    a, b = (nn.Parameter(torch.tensor([value])) for value in (2.0, 3.0))
    losses = [lambda: (a**3).sum(), lambda: (b**2).sum()]

    def replay(transform, last=True):
        for loss in losses:
            transform(loss()).backward()

    replay(lambda loss: loss)
    assert add_second_pass_(GRRule(0.1, scheme="exact").update(), [a, b], replay, WeightStorage())
    assert a.grad.item() == pytest.approx(12 + 0.1 * 12 * 12)
    assert b.grad.item() == pytest.approx(6 + 0.1 * 2 * 6)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_second_pass_without_a_loss_leaves_the_clean_gradient(missing):
    """The gradient of this pass and of earlier ones, whichever probe's loss is missing."""
    params, stashed, calls = [nn.Parameter(torch.tensor([value])) for value in (2.0, 3.0)], StashedGradients(), []

    def replay(transform, last):
        calls.append(last)
        if len(calls) == missing:
            raise NoLossError
        transform(sum((param**2).sum() for param in params)).backward()

    for param in params:
        param.grad = torch.tensor([5.0])
    stashed.stash(params)
    sum((param**2).sum() for param in params).backward()
    update = GRRule(0.1, 0.1, "central").update()
    assert not add_second_pass_(update, params, replay, WeightStorage(), stashed=stashed)
    assert [param.item() for param in params] == [2, 3]
    assert [param.grad.item() for param in params] == [9, 11]
    assert calls == [*[False, True][:missing], True]


@pytest.mark.parametrize("rule", [GRRule(0.1, 0.1), SAMRule(0.1), GRRule(0.1, scheme="exact")])
def test_a_missing_loss_at_the_same_weights_is_a_one_line_error(rule):
    param = nn.Parameter(torch.tensor([2.0]))
    param.grad = torch.tensor([4.0])

    def replay(transform, last=True):
        raise NoLossError

    with pytest.raises(RuntimeError, match="returned a loss in the first pass and None when it ran again") as caught:
        add_second_pass_(rule.update(), [param], replay, WeightStorage())
    assert "\n" not in str(caught.value)
    assert param.item() == 2.0


def square(param):
    """Return a replay of the loss Σ p², and a list that records for each call whether it was the last one."""
    calls = []

    def replay(transform, last=True):
        calls.append(last)
        transform((param**2).sum()).backward()

    return replay, calls


def test_a_probe_with_zero_weight_is_skipped():
    param = nn.Parameter(torch.tensor([2.0]))
    param.grad = torch.tensor([4.0])
    replay, calls = square(param)
    update = Update("gradient", 1.0, (Probe(0.5, 0.0), Probe(0.25, 2.0), Probe(1.0, 0.0)))
    assert add_second_pass_(update, [param], replay, WeightStorage())
    assert param.grad.item() == 4 + 2 * (2 * (2 + 0.25 * 4))
    assert calls == [True]


@pytest.mark.parametrize("rule", [SAMRule(0.1), GRRule(0.1, 0.2), GRRule(0.1, scheme="exact")])
@pytest.mark.parametrize("decides", [True, False])
def test_a_gradient_that_is_not_finite_is_left_alone_where_this_process_may_decide(decides, rule):
    param, stashed = nn.Parameter(torch.tensor([2.0])), StashedGradients()
    param.grad = torch.tensor([3.0])
    stashed.stash([param])
    param.grad = torch.tensor([torch.inf])
    replay, calls = square(param)
    done = add_second_pass_(rule.update(), [param], replay, WeightStorage(), stashed=stashed, check_finite=decides)
    assert done is not decides
    assert calls == ([] if decides else [True])
    assert not stashed
    assert param.item() == 2.0


def test_stashed_gradients_are_restored_unweighted():
    """For used, unused and excluded parameters, with a second pass and without."""
    used, unused, excluded = params = [nn.Parameter(torch.tensor([2.0])) for _ in range(3)]
    stashed, update = StashedGradients(), GRRule(0.1, 0.2).update()
    for param in params:
        param.grad = torch.tensor([1.0])
    stashed.stash(params)
    options = {"stashed": stashed, "excluded": [excluded]}
    replay, _ = square(used)
    used.grad = torch.tensor([4.0])
    assert add_second_pass_(update, [used, unused], replay, WeightStorage(), **options)
    assert unused.grad.item() == excluded.grad.item() == 1
    assert used.grad.item() == pytest.approx(1 + 0.5 * 4 + 0.5 * 2 * (2 + 0.2 * 4))
    stashed.stash(params)
    assert not add_second_pass_(update, [used, unused], replay, WeightStorage(), **options)
    assert unused.grad.item() == excluded.grad.item() == 1


def test_equal_coefficients_of_both_gradients_on_accelerators():
    net, batch, rule = mlp(), make_batches()[0], GRRule(0.1, 0.2, normalize=True)
    expected = regularized(net, batch, rule)
    with treated_as_accelerator():
        assert_near(regularized(net, batch, rule), expected)


@pytest.mark.parametrize("name", METHODS)
def test_weighting_before_and_after_the_reduction_agree(name):
    """And ``.grad`` ends the last pass as the result itself, so that the reduction sees the final gradient."""
    net, batch, method = mlp(), make_batches()[0], METHODS[name]
    params, last = list(net.parameters()), Record()

    def replay(transform, is_last=True):
        transform(cross_entropy(net, batch)).backward()
        last.append(gradients(net))

    cross_entropy(net, batch).backward()
    add_second_pass_(method.rule.update(), params, replay, WeightStorage(), weighted=True)
    assert_near(gradients(net), method.gradient(reference.loss_of(net, cross_entropy, [batch]), weights(net)))
    assert_same(last[-1], gradients(net))


def test_an_observer_sees_both_gradients():
    seen, (param, bare) = Record(), (nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1)))
    scale, update = torch.tensor(2.0), GRRule(0.1, 0.1).update()
    param.grad = torch.tensor([6.0, 8.0])

    class Observer:
        def first(self, *args):
            seen.append((*args, param.grad.tolist()))

        def second(self, params):
            seen.append((params, param.grad.tolist(), param.tolist()))

    replay, _ = square(param)
    for check_finite in (True, False):
        seen.clear()
        param.grad = torch.tensor([6.0, 8.0])
        storage, options = WeightStorage(), {"check_finite": check_finite, "loss_scale": scale}
        assert add_second_pass_(update, [param, bare], replay, storage, observer=Observer(), **options)
        (row, first, norm, seen_scale, before), (second, after, values) = seen
        assert row is update
        assert seen_scale is scale
        assert first == second == [param]
        assert norm == 10
        assert before == [6, 8]
        assert after == param.grad.tolist() != before
        assert values == [3, 4]


def test_gradients_with_nan_are_left_alone():
    net, batch = mlp(), make_batches()[0]
    before, calls = weights(net), Record()
    result = regularized(
        net, batch, SAMRule(0.1), loss=lambda net, batch: calls.append(1) or cross_entropy(net, batch) * float("nan")
    )
    assert len(calls) == 1
    assert all(g.isnan().all() for g in result.values())
    assert_same(weights(net), before)


@pytest.mark.parametrize(("rule", "freed"), [(SAMRule(0.1), True), (GRRule(0.1, 0.1), True), (GRRule(0.1, 0.2), False)])
def test_a_first_gradient_that_is_not_kept_is_freed(rule, freed):
    """Before the second one is computed, so that both never take memory at the same time."""
    net, batch = mlp(), make_batches(1)[0]
    first, calls = Record(), Record()

    def loss():
        calls.append(all(gone() is None for gone in first))
        return cross_entropy(net, batch)

    def backward(value):
        value.backward()
        if not first:
            first.extend(weakref.ref(param.grad) for param in net.parameters())

    regularized_backward(loss, net, rule, backward=backward)
    assert calls == [True, freed]
