"""The contract for steps without a loss, and for guards that only fire at the displaced weights."""

import warnings

import pytest
import torch
from contract import (
    AUTOMATIC,
    CLOSURES,
    FORMS,
    GRADIENTS,
    STEPS,
    WINDOW,
    Batches,
    Situation,
    as_dict,
    check_gradient,
    make_trainer,
    report,
    same,
    seed,
    train,
)
from oracle import FGR, sam

from lightning_gr import SAM, Flooding, GradientRegularization, SharpnessMonitor, in_second_pass

# a warning of Lightning
pytestmark = pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
DEFAULTS = {"SAM": SAM, "GradientRegularization": GradientRegularization}


class Skips(Situation):
    """Returns None for some of its batches."""

    forms = AUTOMATIC
    none = frozenset()

    def prepare(self):
        self.calls = 0

    def step(self, batch):
        # counted before returning, and restored for second passes
        index, self.calls = self.calls, self.calls + 1
        return None if index in self.none else self.mse(batch)


def skips(*indices, steps=STEPS):
    return type("Skips", (Skips,), {"none": frozenset(indices), "steps": steps})


def run(kind, *callbacks, **options):
    seed()
    module = kind()
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, Batches(module.make_batches()))
    return trainer


@pytest.mark.parametrize("name", DEFAULTS)
def test_none_in_a_logged_step(name):
    callback = DEFAULTS[name]()
    assert run(skips(49, steps=60), callback).global_step == 60
    assert report(callback) == (59, 60)


@pytest.mark.parametrize("options", [{}, {"metrics": "all"}, {"metrics": ()}])
@pytest.mark.parametrize("none", [(0,), (1, 2), (8,), tuple(range(9))])
@pytest.mark.parametrize("name", DEFAULTS)
def test_none_with_each_step_logged(name, none, options):
    callback = DEFAULTS[name](**options)
    assert run(skips(*none), callback, log_every_n_steps=1).global_step == 9
    assert report(callback) == (9 - len(none), 9)


@pytest.mark.parametrize("none", [(0,), (0, 1), (2,)])
@pytest.mark.parametrize("name", DEFAULTS)
def test_fast_dev_run(name, none):
    for length in (1, 3):
        assert run(skips(*none), DEFAULTS[name](), Flooding(0.1), fast_dev_run=length).global_step == length


@pytest.mark.parametrize("accumulation", ["window", "micro_batch"])
@pytest.mark.parametrize("none", [(3, 4, 5), (2,), (0,), (1,), (0, 1), (1, 2, 5), (6, 7, 8), tuple(range(9))])
@pytest.mark.parametrize("name", DEFAULTS)
def test_windows(name, none, accumulation):
    callback = DEFAULTS[name](accumulation=accumulation, metrics="all" if accumulation == "window" else "default")
    trainer = run(skips(*none), callback, accumulate_grad_batches=WINDOW, log_every_n_steps=1)
    assert trainer.global_step == 3
    empty = sum(set(range(start, start + WINDOW)) <= set(none) for start in range(0, 9, WINDOW))
    assert report(callback) == (3 - empty, 3)


@pytest.mark.parametrize("none", [(3, 4, 5), (2,), (0,), (1,), (0, 1), (1, 2, 5), (0, 8), tuple(range(9))])
@pytest.mark.parametrize("form", AUTOMATIC)
def test_gradients_are_those_of_the_oracle(form, none):
    check_gradient(skips(*none), form, FGR)


def test_a_monitor_whose_first_batch_has_no_loss():
    assert run(skips(0), SharpnessMonitor(samples=2), max_epochs=2).global_step == 18


# --- guards


class Guarded(Situation):
    """L = −log(c − w²) at w = 1.5, where c is 4 or 100: finite here, but not at w + 1 if c is 4."""

    wide = frozenset()

    def prepare(self):
        self.net = torch.nn.Linear(1, 1, bias=False).double()
        self.net.weight.data.fill_(1.5)

    def make_batches(self):
        return [torch.tensor(100.0 if index in self.wide else 4.0).double() for index in range(self.steps)]

    def step(self, batch):
        loss = -(batch - self.net.weight.square().sum()).log()
        return loss if self.is_fine(loss) else None

    def is_fine(self, loss):
        return loss.isfinite()


class GuardedByItem(Guarded):
    """A guard that counts what it skips."""

    def prepare(self):
        super().prepare()
        self.skipped = 0

    def is_fine(self, loss):
        if loss.item() != loss.item():
            self.skipped += 1
            return False
        return True


class GuardedSometimes(Guarded):
    """The loss is finite at the moved weights in some steps."""

    wide = frozenset({1, 4, 5, 7})


KINDS = [Guarded, GuardedByItem, GuardedSometimes]


def clean(c):
    return 3.0 / (c - 2.25)


def moved(c):
    return 5.0 / (c - 6.25)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_only_fires_at_the_moved_weights(kind, form):
    method = sam(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(kind, form, method)
    cs = [float(c) for c in kind.make_batches(kind())]
    size = WINDOW if form == "accumulation" else 1
    windows = [cs[start : start + size] for start in range(0, len(cs), size)]
    # a whole window keeps its clean gradient if one of its losses is missing at the moved weights
    expected = [sum(map(clean if 4.0 in window else moved, window)) / size for window in windows]
    assert [float(g["net.weight"]) for g in found.gradients] == pytest.approx(expected)
    ours = [
        str(w.message) for w in caught if "None" in str(w.message) and "training_step` returned" not in str(w.message)
    ]
    assert len(ours) >= 1
    if form != "functional":
        assert len(ours) == 1
        regularized = sum(4.0 not in window for window in windows)
        assert report(found.trainer.callbacks[0]) == (regularized, len(windows))
    same("what is left", found.state, train(kind, form).state)


class Raises(Situation):
    """A library that checks its arguments, as torch.distributions does."""

    def step(self, batch):
        if in_second_pass():
            raise ValueError("Expected parameter loc to satisfy the constraint Real()")
        return self.mse(batch)


@pytest.mark.parametrize("form", FORMS)
def test_an_error_at_the_moved_weights_has_a_note(form):
    with pytest.raises(ValueError, match="constraint") as caught:
        train(Raises, form, sam(0.5))
    assert any("second pass" in note for note in getattr(caught.value, "__notes__", ["second pass"]))
    assert not in_second_pass()


@pytest.mark.parametrize("form", FORMS)
def test_an_error_in_the_first_pass_has_no_note(form):
    class Breaks(Situation):
        def step(self, batch):
            raise ValueError("constraint")

    with pytest.raises(ValueError, match="constraint") as caught:
        train(Breaks, form, sam(0.5))
    assert not getattr(caught.value, "__notes__", [])


class NotFinite(Situation):
    """Some gradients are not finite; they are passed on, and their steps do not count as regularized."""

    def prepare(self):
        self.calls = 0

    def step(self, batch):
        self.calls += 1
        loss = self.mse(batch)
        return loss * float("nan") if self.calls in (2, 5) else loss

    def configure_optimizers(self):
        return Ignores(self.parameters(), lr=self.lr)


class Ignores(torch.optim.SGD):
    """Skips steps with gradients that are not finite, as in hand-written code."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        if all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"]):
            super().step()
        return loss


@pytest.mark.parametrize(("form", "expected"), [("automatic", (7, 9)), ("accumulation", (1, 3)), ("mixin", (7, 9))])
def test_gradients_that_are_not_finite_are_not_counted(form, expected):
    found = train(NotFinite, form, sam(0.5), lr=0.1)
    assert report(found.trainer.callbacks[0]) == expected
    assert len(GRADIENTS) == expected[1]


def test_the_functional_form_needs_a_loss_in_its_first_pass():
    class Nothing(Situation):
        forms = CLOSURES

        def step(self, batch):
            return None

    with pytest.raises(ValueError, match="loss"):
        train(Nothing, "functional", FGR)
    assert as_dict(GRADIENTS) == as_dict([])
