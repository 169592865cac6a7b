"""Inputs of a weight -> their Gram matrix X'X, summed over all calibration tokens.

Gram matrices are formed in one place, for scores (`obs`) and for repairs alike: products over a few thousand tokens at
a time, added up in float64. Repairs solve a well-damped system, for which float32 products are exact enough at half the
cost. Scores divide by entries of an inverse, which with fewer tokens than columns would show float32's rounding.
Axes: N tokens, C columns of the weight (its input features).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_ONCE = 2048  # multiplied before they are added to the float64 sum
STRIP = 256  # columns of a Gram matrix that are computed at once


def add_gram(total_CC: Tensor, x_NC: Tensor, *, dtype: torch.dtype = torch.float32) -> None:
    """Add X'X to `total_CC` (float64) in place; products are taken in `dtype`, or in float64 where x is.

    >>> total_CC = torch.zeros(2, 2, dtype=torch.float64)
    >>> add_gram(total_CC, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> total_CC.tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    dtype = torch.float64 if x_NC.dtype == torch.float64 else dtype
    for first in range(0, len(x_NC), TOKENS_AT_ONCE):
        total_CC += gram(x_NC[first : first + TOKENS_AT_ONCE].to(dtype))


def gram(x_NC: Tensor) -> Tensor:
    """X'X in the dtype of x. Only strips on and below the diagonal are computed, then mirrored.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    gram_CC = x_NC.new_empty(x_NC.shape[1], x_NC.shape[1])
    for first in range(0, x_NC.shape[1], STRIP):
        below = x_NC[:, first:].t() @ x_NC[:, first : first + STRIP]
        gram_CC[first:, first : first + STRIP] = below
        gram_CC[first : first + STRIP, first:] = below.t()
    return gram_CC
