"""The methods to compare, and how their callbacks are created."""

import pytest

from lightning_gr import SAM, Flooding, GradientRegularization, MomentumSAM
from lightning_gr.tune.space import METHODS, TuneError, check_methods, rounded


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("F-GR", GradientRegularization, "F-GR"),
        ("B-GR", GradientRegularization, "B-GR"),
        ("penalty", GradientRegularization, "F-GR, gradient-norm penalty"),
        ("SAM", SAM, "SAM"),
        ("ASAM", SAM, "ASAM"),
        ("MomentumSAM", MomentumSAM, "Momentum-SAM"),
    ],
)
def test_each_name_creates_its_method_with_the_constants(name, kind, expected):
    method = METHODS[name]
    callback = method.callback(method.at_scale(0.25))
    assert type(callback) is kind
    assert callback.rule.name == expected
    assert [getattr(callback.rule, constant) for constant in method.constants] == [0.25] * len(method.constants)
    assert not callback.verbose


def test_flooding_gets_its_level():
    callback = METHODS["flooding"].callback({"level": 0.5})
    assert isinstance(callback, Flooding)
    assert callback.level == 0.5


def test_settings_are_kept_unless_they_are_searched():
    callback = METHODS["SAM"].callback({"rho": 0.3}, {"rho": 9.0, "interval": 2, "exclude": ["*.bias"]})
    assert (callback.rule.rho, callback.schedule.interval, callback.exclude) == (0.3, 2, ("*.bias",))


def test_plain_training_is_always_compared_and_needs_no_search():
    assert [method.name for method in check_methods(["plain", "SAM", "SAM"])] == ["SAM"]


def test_names_have_the_same_spellings_as_for_other_commands():
    names = ["sam", "SAM", "gr", "msam", "momentum-sam", "Flooding", "b-gr"]
    assert [method.name for method in check_methods(names)] == ["SAM", "F-GR", "MomentumSAM", "flooding", "B-GR"]


@pytest.mark.parametrize("names", [["Adam"], "Adam", ["SAM", "SAM2"], [], ["plain"]])
def test_errors_of_unknown_methods_list_the_known_ones(names):
    with pytest.raises(TuneError, match=r"choose from .*SAM") as error:
        check_methods(names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "expected"), [(0.123456, 0.12), (1999.0, 2000.0), (0.0, 0.0)])
def test_constants_have_two_digits(value, expected):
    assert rounded(value) == expected
