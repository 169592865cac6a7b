"""A matrix that loses input columns -> new values for those that stay, in closed form.

A new repair is one entry of `REPAIRS`: a function of a `CutMatrix`. Names of tensors end in their axes: R rows
(outputs), C columns (inputs), K columns that are kept, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.scoring.obs import add_gram, least_squares


@dataclass(frozen=True, slots=True)
class MatrixInputs:
    """What a matrix reads, over all tokens: float64."""

    gram_CC: Tensor
    """X'X."""
    mean_C: Tensor
    tokens: int


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
    scales_norms: bool = False
    """Whether norms over a hidden width that is cut are scaled as well."""
    fits_experts: bool = False
    """Whether the experts that stay are fitted, where some go (see `experts`)."""
    trains_layers: bool = False
    """Whether every layer of the pruned model is trained afterwards (see `reconstruct`)."""


def inputs_of(x_NC: Tensor) -> MatrixInputs:
    """The statistics of inputs, of any float dtype."""
    gram_CC = torch.zeros(x_NC.shape[-1], x_NC.shape[-1], dtype=torch.float64, device=x_NC.device)
    add_gram(gram_CC, x_NC)
    return MatrixInputs(gram_CC, x_NC.mean(0, dtype=torch.float64), len(x_NC))


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
    if not matrix.has_bias:
        return Fit(least_squares(dense_RC, inputs.gram_CC, kept_K))
    mean_C = inputs.mean_C
    covariance_CC = inputs.gram_CC - inputs.tokens * torch.outer(mean_C, mean_C)
    columns_RK = least_squares(dense_RC, covariance_CC, kept_K)
    return Fit(columns_RK, dense_RC @ mean_C - columns_RK @ mean_C[kept_K])


REPAIRS = {
    "none": Repair(leave_out),
    "bias": Repair(shift_bias),
    "least-squares": Repair(fit_columns, scales_norms=True, fits_experts=True),
    "reconstruct": Repair(fit_columns, scales_norms=True, fits_experts=True, trains_layers=True),
}
