"""Checks of single arguments; ``callbacks/test_checks.py`` tests those of the callbacks."""

import re

import pytest

from lightning_gr._validate import check_bool, check_choice, check_exclude, check_int, check_level, check_number

nan, inf = float("nan"), float("inf")


def refuses(message, check, *args, **kwargs):
    with pytest.raises(ValueError, match=f"^Expected argument `x` to be {re.escape(message)}") as caught:
        check("x", *args, **kwargs)
    assert str(caught.value).endswith(f"but got {args[0]!r}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, False, "1", None, nan, inf, -inf, -1e-300, 1j, [1]])
@pytest.mark.parametrize("positive", [True, False])
def test_numbers(value, positive):
    refuses("a positive float" if positive else "a non-negative float", check_number, value, positive=positive)


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_zero_is_not_positive(zero):
    check_number("x", zero, positive=False)
    refuses("a positive float", check_number, zero, positive=True)


def test_valid_numbers():
    for value in (1, 1e-300, 1.5, 10**300):
        check_number("x", value, positive=True)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 2])
def test_integers(value):
    refuses("an integer of at least 3", check_int, value, minimum=3)
    check_int("x", 3, minimum=3)


@pytest.mark.parametrize("value", [0, 1, "false", None])
def test_bools(value):
    refuses("True or False", check_bool, value)
    check_bool("x", True)
    check_bool("x", False)


@pytest.mark.parametrize("value", ["c", "", None, ["a"], {}])
def test_choices(value):
    refuses("one of 'a', 'b'", check_choice, value, ("a", "b"))
    check_choice("x", "b", ("a", "b"))


def test_levels():
    check_level(0)
    with pytest.raises(ValueError, match="`level` to be a non-negative float but got -1"):
        check_level(-1)


def test_patterns():
    assert check_exclude(name for name in ("a", "b")) == ("a", "b")
    for value, allowed in [("*.bias", "a list of patterns"), (3, "a list of patterns"), ([3], "a list of strings")]:
        with pytest.raises(ValueError, match=f"`exclude` to be {allowed}"):
            check_exclude(value)
