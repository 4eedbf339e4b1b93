"""Whether outputs are the expected ones: cases by hand."""

from __future__ import annotations

import time

import pytest

from renio_megatron.evaluation.code.comparison import evalplus_equal, json_equal, text_equal
from renio_megatron.evaluation.code.values import Opaque

NAN, INF = float("nan"), float("inf")


def equal(expected, got, entry_point="f", arguments=(), atol=0.0, dataset="mbpp"):
    return evalplus_equal(expected, got, dataset=dataset, entry_point=entry_point, arguments=list(arguments), atol=atol)


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [
        (1, 1, True),
        (1, 2, False),
        (1, True, True),
        (1, 1.0, True),
        (1, 1.0000001, False),
        (None, None, True),
        (None, Opaque("generator"), False),
        (Opaque("generator"), Opaque("generator"), False),
        ([1], (1,), False),
        ((1,), [1], False),
        ({1, 2}, frozenset({2, 1}), True),
        ({"a": 1}, {"a": 1.0}, True),
        ("a", "a", True),
        ("1", 1, False),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.3000009, True),
        (0.3, 0.300002, False),
        (2.0, 2, True),
        (2.5, "2.5", False),
        (1e10, 1e10 + 500, True),  # the relative tolerance
        (1e10, 1e10 + 5000, False),
        ([0.3, 0.5], [0.1 + 0.2, 0.5], True),
        ([0.3, 0.5], (0.1 + 0.2, 0.5), False),
        ((0.3,), (0.1 + 0.2,), True),
        ([0.3], [0.3, 0.3], False),
        ([0.3, 1], [0.1 + 0.2, 1], False),  # not all are floats: no tolerance
        ([[0.3]], [[0.1 + 0.2]], False),
        ({"a": 0.3}, {"a": 0.1 + 0.2}, False),
        (0.3, [0.3], False),
        (0.3, None, False),
        (0.3, NAN, False),
        (NAN, NAN, False),
        (INF, INF, True),
        (INF, -INF, False),
        (INF, 1e308, False),
        (0.5, 10**400, False),
        ([0.5], [10**400], False),
        ([], [], True),
    ],
)
def test_equal_or_close(expected, got, right):
    assert equal(expected, got) is right
    assert equal(expected, got, dataset="humaneval") is right


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [
        (0.3, 0.30009, True),
        (0.3, 0.3002, False),
        (3, 3.00005, False),  # of another type
        ([1, 0.5], [1, 0.50005], True),
        ([[0.5], [1.5]], [[0.50005], [1.5]], True),
        ((1 + 1j), (1.00005 + 1j), True),
        ([0.5, "a"], [0.50005, "a"], False),
        ("a", "b", False),
        (None, 0, False),
    ],
)
def test_a_tolerance_of_the_task(expected, got, right):
    assert equal(expected, got, atol=1e-4) is right


def test_a_raised_tolerance_does_not_stay():
    """EvalPlus keeps it for later inputs, where [1, 1.0000001] would then be close to [1, 1]."""
    assert equal(0.3, 0.1 + 0.2)
    assert not equal([1, 1], [1, 1.0000001])


def test_a_zero_is_one_where_the_polynomial_vanishes():
    def zero(coefficients, x):
        return equal(0.0, x, "find_zero", [coefficients], 1e-4, "humaneval")

    assert zero([1, 2], -0.5)
    assert zero([-6, 11, -6, 1], 2.0)
    assert zero([-6, 11, -6, 1], 3)
    assert not zero([1, 2], 0.5)
    for odd in (NAN, INF, 1e308, 10**400, "x", None, [], 1j, Opaque("x")):
        assert not zero([-6, 11, -6, 1], odd)
    assert not equal(0.0, -0.5, "find_zero", [[1, 2]], 1e-4, "mbpp")  # a special task of the other set


@pytest.mark.parametrize(
    ("entry_point", "arguments", "expected", "got", "right"),
    [
        ("are_equivalent", (36, 57), False, True, True),
        ("are_equivalent", (36, 57), False, None, True),
        ("sum_div", (8,), 7, 7, True),
        ("sum_div", (8,), 7, 0, True),
        ("sum_div", (8,), 7, 15, False),
        # edge 3, slant 4: 9 + 2*3*4 = 33; height 4: 9 + 2*3*sqrt(2.25 + 16) = 34.63
        ("surface_Area", (3, 4), 33, 33, True),
        ("surface_Area", (3, 4), 33, 35, True),
        ("surface_Area", (3, 4), 33, 34, False),
        ("surface_Area", (3, 4), 33, "35", False),
        # 1 against 256: |1 - 2| = 1 by the first digits; 001 against 256: 2 + 5 + 5 = 12
        ("digit_distance_nums", (1, 256), 1, 1, True),
        ("digit_distance_nums", (1, 256), 1, 12, True),
        ("digit_distance_nums", (1, 256), 1, 2, False),
        ("similar_elements", (), (4, 5), (5, 4), True),
        ("similar_elements", (), (4, 5), [5, 4, 4], True),
        ("similar_elements", (), (4, 5), {4, 5}, True),
        ("similar_elements", (), (4, 5), (4,), False),
        ("similar_elements", (), (4, 5), 4, False),
        ("similar_elements", (), (4, 5), None, False),
        ("similar_elements", (), (4, 5), [[4], [5]], False),
        ("similar_elements", (), (), range(10**18), False),
        ("check_str", (), Opaque("Match"), Opaque("Match"), True),
        ("check_str", (), Opaque("Match"), True, True),
        ("check_str", (), Opaque("Match"), False, False),
        ("check_str", (), Opaque("Match"), None, False),
        ("check_str", (), Opaque("Match"), "Valid", True),
        ("check_str", (), None, None, True),
        ("check_str", (), None, False, True),
        ("check_str", (), None, "Invalid", False),
        ("check_str", (), None, True, False),
    ],
)
def test_special_tasks(entry_point, arguments, expected, got, right):
    assert equal(expected, got, entry_point, arguments) is right


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [
        ([1, 2], [1, 2], True),
        ([1, 2], (1, 2), True),
        ([[1], [2]], [(1,), (2,)], True),
        ([1, 2], {1, 2}, False),
        ([1, 2], "12", False),
        ({"1": [2]}, {1: (2,)}, True),
        ({"1": [2]}, {"1": [2], "2": 1}, False),
        ({"1": 0, "true": 1, "null": 2}, {1: 0, None: 2}, False),
        ({"null": 2}, {None: 2}, True),
        ({}, None, False),
        (None, None, True),
        (None, 0, False),
        (0.3, 0.1 + 0.2, False),
        (2.0, 2, True),
        (True, 1, True),
        ("a", Opaque("x"), False),
        (10**400, 0.5, False),
    ],
)
def test_values_of_json(expected, got, right):
    assert json_equal(expected, got) is right


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [
        ("1\n2\n", "1\n2\n", True),
        ("1\n2\n", "1\n2", True),
        ("1\n2", "1  \n2\t\n\n", True),
        ("1\n2", "1\r\n2\r\n", True),
        ("1\n2", "\n1\n2", True),
        ("1\n2", "1 2", False),
        ("1\n2", "1\n\n2", False),
        ("1 2", "1  2", True),
        ("1 2", "12", False),
        ("  1", "1", True),
        ("YES", "yes", False),
        ("YES", "YES", True),
        ("YES", "YES YES", False),
        ("0.5", ".50", True),
        ("1e3", "1000", True),
        ("2", "2.0", True),
        ("-0", "0.0", True),
        ("2", "+2", True),
        ("0.3", "0.30000000000000004", False),
        ("1.0 a", "1 a", True),
        ("1_0", "10", False),
        ("inf", "Infinity", False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("1", "sNaN", False),
        ("1", "1e999999999", False),
        ("", "", True),
        ("", "x", False),
        ("x", "", False),
    ],
)
def test_printed_text(expected, got, right):
    assert text_equal(expected, got) is right


def test_hostile_texts_are_compared_in_time():
    begin = time.monotonic()
    for got in ("1" * 1_000_000 + "x", "1e" + "9" * 1_000_000, "1 " * 500_000, "\n" * 1_000_000 + "x", "." * 1_000_000):
        assert not text_equal("1" * 100, got)
        assert not text_equal("1 2\n3", got)
    assert time.monotonic() - begin < 5
