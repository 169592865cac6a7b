"""A matrix that loses input columns -> new values for those that stay, in closed form.

A new repair is one entry of `REPAIRS`: a function of a `CutMatrix`. A fit to few tokens overfits, most of all in a wide
matrix, so its damping is chosen by its error on tokens that it does not see (`damping_for`). Names of tensors end in
their axes: R rows (outputs), C columns (inputs), K columns that are kept, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.scoring.obs import (
    DAMPING,
    TOKENS_AT_ONCE,
    NormalEquations,
    add_gram,
    fill_above,
    gram_dtype,
    least_squares,
    output_error,
)

DAMPINGS = (DAMPING, 0.1, 1.0, 10.0)  # tried in this order, while the error of held-out tokens falls
HELD_OUT = 4  # one window of so many is held out of the fits that are compared
OUTPUTS_TRIED = 256  # of a matrix, by which dampings are compared


@dataclass(frozen=True, slots=True)
class MatrixInputs:
    """What a matrix reads, over all tokens."""

    gram_CC: Tensor
    """X'X: float32, or float64 where the inputs are."""
    mean_C: Tensor
    """float64."""
    tokens: int
    held_out: MatrixInputs | None = None
    """The part of them by which fits to the others are compared; None where tokens are too few."""

    @property
    def covariance_CC(self) -> Tensor:
        """X'X of the inputs less their mean."""
        return self.gram_CC - self.tokens * torch.outer(self.mean_C, self.mean_C)

    def without(self, part: MatrixInputs) -> MatrixInputs:
        """All tokens but those of a part."""
        tokens = self.tokens - part.tokens
        mean_C = (self.tokens * self.mean_C - part.tokens * part.mean_C) / tokens
        return MatrixInputs(self.gram_CC - part.gram_CC, mean_C, tokens)


@dataclass(frozen=True, slots=True)
class CutMatrix:
    """A matrix and the columns that it keeps."""

    dense_RC: Tensor
    """The dense model's, float64."""
    inputs: MatrixInputs
    kept_K: Tensor
    """Numbers of the columns that stay, int64, ascending."""
    has_bias: bool
    """Whether the architecture adds a bias to its outputs."""
    damping: float = DAMPING
    """Of the fit, as a share of the mean square of the inputs; infinite where the columns are to stay as they are."""

    @property
    def left_RC(self) -> Tensor:
        """The dense matrix with zeros where columns go."""
        left_RC = torch.zeros_like(self.dense_RC)
        left_RC[:, self.kept_K] = self.dense_RC[:, self.kept_K]
        return left_RC


@dataclass(frozen=True, slots=True)
class Fit:
    """New values for the columns that stay, and what is added to the bias of the outputs; both float64."""

    columns_RK: Tensor
    shift_R: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Repair:
    """One method of repair."""

    fit: Callable[[CutMatrix], Fit]
    fits_columns: bool = False
    """Whether it moves the columns that stay, and so needs a damping."""
    scales_norms: bool = False
    """Whether norms over a hidden width that is cut are scaled as well."""
    fits_experts: bool = False
    """Whether the experts that stay are fitted, where some go (see `experts`)."""
    trains_layers: bool = False
    """Whether every layer of the pruned model is trained afterwards (see `reconstruct`)."""


class InputSums:
    """The statistics of inputs that come in parts, those of one window of `HELD_OUT` apart.

    >>> sums = InputSums(8)
    >>> sums.add(torch.arange(12.0)[:, None], first=0, count=6)
    >>> sums.add(torch.arange(12.0, 16.0)[:, None], first=6, count=2)
    >>> inputs = sums.inputs()
    >>> inputs.tokens, inputs.mean_C.item(), inputs.held_out.tokens, inputs.held_out.mean_C.item()
    (16, 7.5, 4, 10.5)
    """

    def __init__(self, windows: int) -> None:
        self._finer = -(-HELD_OUT // windows)  # of fewer windows, a part of each is held out
        self._sums: dict[bool, MatrixInputs] = {}  # held out -> so far

    def add(self, x_NC: Tensor, *, first: int, count: int) -> None:
        """Inputs of any float dtype, N x C: of so many windows from `first` on, one after the other."""
        rows_N = torch.arange(len(x_NC), device=x_NC.device)
        part_N = self._finer * first + rows_N * self._finer * count // max(1, len(x_NC))
        held_out_N = part_N % HELD_OUT == HELD_OUT - 1
        for held_out in (True, False):
            self._add(held_out, x_NC, rows_N[held_out_N == held_out])

    def inputs(self) -> MatrixInputs:
        """The statistics of all that was added, which is one token at least; nothing can be added any more."""
        for each in self._sums.values():
            fill_above(each.gram_CC)
        held_out, rest = self._sums.pop(True, None), self._sums.pop(False, None)
        if held_out is None or rest is None:
            found = held_out or rest
            assert found is not None
            return found
        tokens = rest.tokens + held_out.tokens
        mean_C = (held_out.mean_C * held_out.tokens + rest.mean_C * rest.tokens) / tokens
        return MatrixInputs(rest.gram_CC.add_(held_out.gram_CC), mean_C, tokens, held_out=held_out)

    def _add(self, held_out: bool, x_NC: Tensor, rows_N: Tensor) -> None:
        """Add some rows, a few at a time: a copy of all would be the largest tensor of a repair."""
        if not len(rows_N):
            return
        before = self._sums.get(held_out)
        if before is None:
            empty_CC = x_NC.new_zeros(x_NC.shape[1], x_NC.shape[1], dtype=gram_dtype(x_NC))
            before = MatrixInputs(empty_CC, empty_CC.new_zeros(len(empty_CC), dtype=torch.float64), 0)
        sum_C = before.mean_C * before.tokens
        for some in rows_N.split(TOKENS_AT_ONCE):
            add_gram(before.gram_CC, x_NC[some])
            sum_C += x_NC[some].sum(0, dtype=torch.float64)
        tokens = before.tokens + len(rows_N)
        self._sums[held_out] = MatrixInputs(before.gram_CC, sum_C / tokens, tokens)


def inputs_of(x_NC: Tensor, windows: int = HELD_OUT) -> MatrixInputs:
    """The statistics of inputs, N x C, of any float dtype: of so many windows, one after the other.

    >>> inputs = inputs_of(torch.arange(16.0)[:, None], windows=8)
    >>> inputs.tokens, inputs.mean_C.item(), inputs.held_out.tokens, inputs.held_out.mean_C.item()
    (16, 7.5, 4, 10.5)
    """
    sums = InputSums(windows)
    sums.add(x_NC, first=0, count=windows)
    return sums.inputs()


def damping_for(matrix: CutMatrix) -> float:
    """The damping with which a fit to most of the tokens serves the others best; infinite where none does any good.

    Compared by the errors of some outputs, evenly spaced, in float32, which is exact enough to compare.

    >>> x_NC = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    >>> independent, alike = (inputs_of(each) for each in (x_NC, x_NC.mean(1, keepdim=True) + 0.01 * x_NC))
    >>> ones = torch.ones(2, 24).double()
    >>> [damping_for(CutMatrix(ones, each, torch.arange(12), has_bias=False)) for each in (independent, alike)]
    [1.0, 0.01]
    """
    part = matrix.inputs.held_out
    if part is None:
        return DAMPING
    kept_K = matrix.kept_K
    seen_CC, unseen_CC = (
        (x.covariance_CC if matrix.has_bias else x.gram_CC).float() for x in (matrix.inputs.without(part), part)
    )
    some = slice(None, None, max(1, len(matrix.dense_RC) // OUTPUTS_TRIED))
    dense_RC, left_RC = matrix.dense_RC[some].float(), matrix.left_RC[some].float()
    best, least = math.inf, output_error(left_RC - dense_RC, unseen_CC)
    equations, before = NormalEquations(dense_RC, seen_CC, kept_K, torch.float32), math.inf
    for damping in DAMPINGS:
        left_RC[:, kept_K] = dense_RC[:, kept_K] + equations.change_RK(damping)
        error = output_error(left_RC - dense_RC, unseen_CC)
        if error < least:
            best, least = damping, error
        if error >= before:
            break
        before = error
    return best


def leave_out(matrix: CutMatrix) -> Fit:
    """The columns as they are."""
    return Fit(matrix.dense_RC[:, matrix.kept_K])


def shift_bias(matrix: CutMatrix) -> Fit:
    """The columns as they are, and the mean of what is lost as a bias (FLAP, arXiv 2312.11983).

    >>> x_NC = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    >>> shift_bias(CutMatrix(torch.ones(1, 2).double(), inputs_of(x_NC), torch.tensor([0]), has_bias=True)).shift_R
    tensor([2.], dtype=torch.float64)
    """
    mean_C = matrix.inputs.mean_C
    return Fit(matrix.dense_RC[:, matrix.kept_K], matrix.dense_RC @ mean_C - matrix.left_RC @ mean_C)


def fit_columns(matrix: CutMatrix) -> Fit:
    """The columns, and the bias where there is one, with the least squared error of the outputs.

    >>> x_NC = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> fit = fit_columns(CutMatrix(torch.ones(1, 2).double(), inputs_of(x_NC), torch.tensor([0]), has_bias=False))
    >>> fit.columns_RK.round(decimals=2)
    tensor([[1.9900]], dtype=torch.float64)
    """
    dense_RC, kept_K, inputs = matrix.dense_RC, matrix.kept_K, matrix.inputs
    if math.isinf(matrix.damping):
        return shift_bias(matrix) if matrix.has_bias else leave_out(matrix)
    if not matrix.has_bias:
        return Fit(least_squares(dense_RC, inputs.gram_CC, kept_K, damping=matrix.damping))
    columns_RK = least_squares(dense_RC, inputs.covariance_CC, kept_K, damping=matrix.damping)
    return Fit(columns_RK, dense_RC @ inputs.mean_C - columns_RK @ inputs.mean_C[kept_K])


REPAIRS = {
    "none": Repair(leave_out),
    "bias": Repair(shift_bias),
    "least-squares": Repair(fit_columns, fits_columns=True, scales_norms=True, fits_experts=True),
    "reconstruct": Repair(fit_columns, fits_columns=True, scales_norms=True, fits_experts=True, trains_layers=True),
}
