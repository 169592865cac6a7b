"""Errors, intervals and p-values equal scipy's, and the closed forms where there are some."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from secateur.evaluation.significance import (
    Difference,
    interval,
    mcnemar,
    mean_difference,
    mean_of_errors,
    normal_p,
    paired,
    paired_ratio,
    ratio_and_error,
)

NUMBERS = st.floats(-100, 100)
ANSWERS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)


@given(st.lists(NUMBERS, min_size=2, max_size=40))
def test_the_error_of_a_mean_is_scipys(values: list[float]) -> None:
    mean, stderr = ratio_and_error(values, [1] * len(values))
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert stderr == pytest.approx(stats.sem(values), abs=1e-9)


@given(st.lists(NUMBERS, min_size=2, max_size=40), st.integers(1, 9))
def test_clusters_of_one_size_have_the_error_of_the_mean_of_their_means(means: list[float], size: int) -> None:
    ratio, stderr = ratio_and_error([mean * size for mean in means], [size] * len(means))
    assert (ratio, stderr) == pytest.approx((sum(means) / len(means), stats.sem(means)), abs=1e-9)


def test_the_error_of_a_ratio_by_hand() -> None:
    # r = 12 / 6 = 2; residuals 3 - 2, 4 - 4, 5 - 6 = 1, 0, -1; sqrt(3/2 x 2) / 6
    assert ratio_and_error([3.0, 4.0, 5.0], [1, 2, 3]) == pytest.approx((2.0, math.sqrt(3) / 6))


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_thousands() -> None:
    assert mcnemar(2000, 2000) == 1.0
    assert mcnemar(1000, 2000) == pytest.approx(stats.binomtest(1000, 3000, 0.5).pvalue)


@given(ANSWERS)
def test_paired_answers(answers: list[tuple[int, int]]) -> None:
    ours, theirs = ([float(value) for value in column] for column in zip(*answers, strict=True))
    found = paired(ours, theirs)
    assert found.difference == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    assert found.stderr == pytest.approx(stats.sem([a - b for a, b in zip(ours, theirs, strict=True)]), abs=1e-12)
    assert found.p == mcnemar(answers.count((1, 0)), answers.count((0, 1)))
    other_way = paired(theirs, ours)
    assert (other_way.difference, other_way.p) == (-found.difference, found.p)


def test_paired_values_that_are_not_right_or_wrong_are_a_z_test() -> None:
    ours, theirs = [0.5, 0.25, 1.0, 0.1], [0.75, 0.5, 1.0, 0.9]
    found = paired(ours, theirs)
    assert found.stderr is not None
    z = found.difference / found.stderr
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(z)))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(1, 50)), min_size=2, max_size=20))
def test_paired_windows(rows: list[tuple[float, float, int]]) -> None:
    sums, others, counts = (list(column) for column in zip(*rows, strict=True))
    found = paired_ratio(sums, others, counts)
    assert found.difference == pytest.approx((sum(sums) - sum(others)) / sum(counts), abs=1e-9)
    assert found.stderr == ratio_and_error([a - b for a, b in zip(sums, others, strict=True)], counts)[1]


def test_a_constant_difference_is_certain_though_either_mean_is_not() -> None:
    ours, theirs = [1.0, 5.0, 9.0], [0.5, 4.5, 8.5]
    assert paired_ratio(ours, theirs, [1, 1, 1]) == Difference(0.5, 0.0, 0.0)


@given(NUMBERS.filter(bool), st.floats(0.01, 100))
def test_p_of_a_normal_distribution(difference: float, stderr: float) -> None:
    assert normal_p(difference, stderr) == pytest.approx(2 * stats.norm.sf(abs(difference) / stderr), abs=1e-12)


def test_edges() -> None:
    assert normal_p(0.0, 0.0) == 1.0
    assert normal_p(0.1, 0.0) == 0.0
    assert normal_p(0.1, None) == 1.0
    assert ratio_and_error([4.0], [2]) == (2.0, None)
    assert ratio_and_error([math.inf, 1.0], [2, 2]) == (math.inf, None)
    assert interval(1.0, None) is None
    low, high = interval(1.0, 2.0) or (0.0, 0.0)
    assert (low, high) == pytest.approx(stats.norm.interval(0.95, 1.0, 2.0))
    assert mean_of_errors([0.1, None]) is None


def test_the_mean_of_tasks_adds_variances() -> None:
    differences = [Difference(0.1, 0.03, 0.5), Difference(-0.3, 0.04, 0.5)]
    found = mean_difference(differences)
    assert (found.difference, found.stderr) == pytest.approx((-0.1, 0.025))
    assert found.p == pytest.approx(2 * stats.norm.sf(4))
