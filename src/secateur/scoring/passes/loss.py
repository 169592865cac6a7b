"""Logits and token ids -> the next-token cross-entropy, with no second tensor of the logits' size but its gradient.

Axes: B samples, T tokens, N tokens of all samples, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOSS_ROWS = 64  # rows of logits that are made probabilities at once
NO_LABEL = -100


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor, weight: float) -> Tensor:
    """The sum over all tokens but the first of their cross-entropy (nats), times a weight: a float64 scalar.

    Its backward pass takes it for the end of the graph: it ignores a factor from outside.

    >>> loss = next_token_loss(torch.zeros(1, 3, 8), torch.tensor([[0, 1, 2]]), 0.5)
    >>> round(float(loss), 4)  # ln 8 for each of two tokens
    2.0794
    """
    labels_BT = functional.pad(ids_BT[:, 1:], (0, 1), value=NO_LABEL)
    labels_N = labels_BT.flatten().to(logits_BTV.device)
    loss: Tensor = _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_N, weight)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, weight: float) -> Tensor:
        gradient_NV = torch.empty_like(logits_NV)
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(logits_NV), LOSS_ROWS):
            rows = slice(first, min(first + LOSS_ROWS, len(logits_NV)))
            labelled_N1 = (labels_N[rows] != NO_LABEL)[:, None]
            label_N1 = labels_N[rows, None].clamp_min(0)
            # log p, then in place p - [v = label]: the gradient of the cross-entropy by the logits.
            p_NV = torch.log_softmax(logits_NV[rows].float(), -1)
            total -= p_NV.gather(1, label_N1).where(labelled_N1, 0).sum().double().cpu()
            p_NV.exp_().scatter_add_(1, label_N1, torch.full_like(label_N1, -1, dtype=p_NV.dtype))
            gradient_NV[rows] = p_NV.mul_(labelled_N1 * weight)
        ctx.save_for_backward(gradient_NV)
        return (total * weight).to(logits_NV.device)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV, None, None  # `outer` is 1
