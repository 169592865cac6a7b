"""Measured numbers -> their uncertainty: standard errors, intervals, and paired differences of two models.

Two models that answer the same questions are compared question by question: what is hard for both cancels, so the
difference is known far better than either accuracy (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section
4.2). Where every answer is right or wrong, the significance is that of McNemar's test in its exact form (Psychometrika
12, 1947): of the questions that exactly one of the two gets right, each is as likely either's if the models are
equally good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054  # standard errors to either side of an estimate that hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True)
class Difference:
    """How much a model differs from another in the same measurements, its standard error, and a two-sided p-value."""

    difference: float  # the model minus the other
    stderr: float | None  # None where there are too few measurements to tell
    p: float


def ratio_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean per item over clusters of items, and its standard error over the clusters (None for a single one).

    `sums` are the clusters' totals (of nats, say) and `counts` their items (tokens). With r the ratio of all sums to
    all counts, the error is sqrt(n / (n - 1) sum (s - r c)^2) / sum c, the usual one of a ratio estimator (Cochran,
    Sampling Techniques, 1977, section 6.3); for clusters of one size it is sd / sqrt(n) of the clusters' means.

    >>> ratio_and_error([2.0, 6.0], [2, 2])
    (2.0, 1.0)
    """
    n, items = len(sums), sum(counts)
    ratio = math.fsum(sums) / items
    if n < 2 or not math.isfinite(ratio):
        return ratio, None
    squares = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / items


def mcnemar(first_only: int, second_only: int) -> float:
    """The two-sided p-value of McNemar's exact test: so many were right for the first alone and for the second alone.

    Twice the smaller tail of a binomial distribution with probability 1/2, at most 1.

    >>> mcnemar(1, 9)
    0.021484375
    """
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, float(2 * tail / 2**n))


def normal_p(difference: float, stderr: float | None) -> float:
    """The two-sided p-value of a difference of so many standard errors, of a normal distribution.

    >>> round(normal_p(1.96, 1.0), 4), normal_p(0.0, 0.0)
    (0.05, 1.0)
    """
    if difference == 0 or stderr is None:
        return 1.0
    return math.erfc(abs(difference) / stderr / math.sqrt(2)) if stderr > 0 else 0.0


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Compare a model's value of every document with another model's of the same.

    The standard error is that of the mean of the differences. For values of 0 and 1 the p-value is `mcnemar`'s, for
    others `normal_p`'s.

    >>> paired([1, 0, 0, 0], [1, 1, 1, 0])
    Difference(difference=-0.5, stderr=0.28867513459481287, p=0.5)
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean, stderr = ratio_and_error(differences, [1] * len(differences))
    if {*values, *others} <= {0, 1}:
        return Difference(mean, stderr, mcnemar(differences.count(1), differences.count(-1)))
    return Difference(mean, stderr, normal_p(mean, stderr))


def paired_ratio(sums: Sequence[float], others: Sequence[float], counts: Sequence[int]) -> Difference:
    """Compare totals of the same clusters: by how much the mean per item differs, with `ratio_and_error`'s error.

    For the nats of windows, it is the difference of nats per token, that is, the logarithm of how many times the
    perplexity is the other's.

    >>> paired_ratio([3.0, 5.0], [2.0, 2.0], [2, 2]).difference
    1.0
    """
    ratio, stderr = ratio_and_error([s - other for s, other in zip(sums, others, strict=True)], counts)
    return Difference(ratio, stderr, normal_p(ratio, stderr))


def mean_of_errors(errors: Sequence[float | None]) -> float | None:
    """The standard error of the unweighted mean of independent estimates: root of the sum of squares, over their count.

    >>> mean_of_errors([3.0, 4.0])
    2.5
    """
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The unweighted mean of differences over independent tasks, with the p-value of `normal_p`."""
    mean = math.fsum(each.difference for each in differences) / len(differences)
    stderr = mean_of_errors([each.stderr for each in differences])
    return Difference(mean, stderr, normal_p(mean, stderr))


def interval(estimate: float, stderr: float | None) -> tuple[float, float] | None:
    """The 95 % interval of an estimate, from the normal distribution; None where the error is not known."""
    return None if stderr is None else (estimate - Z95 * stderr, estimate + Z95 * stderr)


def quantiles(values: Sequence[float] | Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles of the values with linear interpolation, in float64.

    >>> quantiles([1.0, 2.0, 4.0], (0.25, 0.5))
    [1.5, 2.0]
    """
    values_X = torch.as_tensor(values, dtype=torch.float64)
    return [values_X.quantile(share).item() for share in shares]
