"""Inputs of a weight -> their Gram matrix X'X, summed over all calibration tokens.

Gram matrices are formed in one place, for scores (`obs`) and for repairs alike. Products are taken in float32 over a
few thousand tokens, then added up in float64: as exact as a damped inverse needs, at half the cost of float64 products.
Axes: N tokens, C columns of the weight (its input features).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TOKENS_AT_ONCE = 2048  # multiplied in float32 before they are added to the float64 sum
STRIP = 256  # columns of a Gram matrix that are computed at once


def add_gram(total_CC: Tensor, x_NC: Tensor) -> None:
    """Add X'X to `total_CC` (float64) in place; x of any float dtype.

    >>> total_CC = torch.zeros(2, 2, dtype=torch.float64)
    >>> add_gram(total_CC, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> total_CC.tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    for (part_NC,) in _token_blocks(x_NC):
        total_CC += gram(part_NC)


def add_cross_gram(total_CC: Tensor, y_NC: Tensor, x_NC: Tensor) -> None:
    """Add Y'X to `total_CC` (float64) in place: of the same tokens, y from the dense model, x from the pruned one.

    >>> total_CC = torch.zeros(1, 2, dtype=torch.float64)
    >>> add_cross_gram(total_CC, torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> total_CC.tolist()
    [[1.0, 5.0]]
    """
    for y_part_NC, x_part_NC in _token_blocks(y_NC, x_NC):
        total_CC += y_part_NC.t() @ x_part_NC


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


def _token_blocks(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of each input, a few thousand at a time: float32, or float64 where the first input is."""
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    for first in range(0, len(inputs[0]), TOKENS_AT_ONCE):
        yield tuple(x_NC[first : first + TOKENS_AT_ONCE].to(dtype) for x_NC in inputs)
