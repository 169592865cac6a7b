"""Logits and labels, or a teacher's distribution -> the loss that is trained on.

Tensor names end in their axes: B batch, T token, N = B x T, V vocabulary, M position with a label, K top token of the
teacher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from secateur.data.rows import IGNORED
from secateur.errors import ModelError

LEAST_MASS = 1e-6  # float32 cannot tell a smaller probability mass from 0


def nll_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum the negative log-likelihood of the labels; float32, nats. `labels[t]` is the token `logits[t]` predict.

    >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> round(float(nll_loss(logits, torch.tensor([[1, IGNORED]]))), 4)
    1.4402
    """
    logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).float()
    return functional.cross_entropy(logits_NV, labels_BT.reshape(-1), ignore_index=IGNORED, reduction="sum")


def distillation_loss(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    teacher: Mapping[str, Tensor],
    *,
    teacher_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Sum the distillation loss over the positions that have a label; float32, nats.

        (1 - teacher_weight) * nll + teacher_weight * temperature^2 * KL,
        KL = sum over top tokens of p log(p / q) + p_rest log(p_rest / q_rest)

    p and q are the softmax of the teacher's and the student's logits over `temperature` (Hinton, Vinyals and Dean,
    arXiv 1503.02531), p_rest = 1 - sum of p and q_rest = 1 - sum of q over the teacher's top tokens. This is the
    divergence with all other tokens merged into one, so it is at most the full divergence, and 0 where the student
    agrees on the top tokens.

    `teacher` holds `tokens` (M, K: token ids), `logp` (M, K: their log-probabilities) and `rest` (M: the mass of all
    other tokens) at the positions with a label, row by row.

    >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> top = logits[0, :1].log_softmax(-1).topk(2)
    >>> same = {"tokens": top.indices, "logp": top.values, "rest": 1 - top.values.exp().sum(-1)}
    >>> abs(float(distillation_loss(logits, torch.tensor([[1, IGNORED]]), same))) < 1e-6
    True
    """
    logits_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).float()
    positions_M = torch.nonzero(labels_BT.reshape(-1) != IGNORED).flatten()
    scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    # One pass over the vocabulary; all that follows reads few of its entries.
    logsumexp_M = scaled_NV.logsumexp(dim=-1)[positions_M]
    logq_MK = scaled_NV[positions_M[:, None], teacher["tokens"].long()] - logsumexp_M[:, None]
    rest_M = teacher["rest"].float().clamp(min=0.0)
    p_MK = teacher["logp"].float().exp()
    p_MK = p_MK * ((1.0 - rest_M) / p_MK.sum(dim=-1).clamp(min=LEAST_MASS))[:, None]  # float16 on the disk rounds
    logq_rest_M = torch.log(-torch.expm1(logq_MK.logsumexp(dim=-1).clamp(max=-LEAST_MASS)))
    divergence = (torch.xlogy(p_MK, p_MK) - p_MK * logq_MK).sum()
    divergence = divergence + (torch.xlogy(rest_M, rest_M) - rest_M * logq_rest_M).sum()
    loss = teacher_weight * temperature**2 * divergence
    if teacher_weight < 1:
        if temperature != 1.0:
            logsumexp_M = logits_NV.logsumexp(dim=-1)[positions_M]
        labels_M = labels_BT.reshape(-1)[positions_M]
        loss = loss + (1 - teacher_weight) * (logsumexp_M - logits_NV[positions_M, labels_M]).sum()
    return loss


def check_teacher(
    student: tuple[str, PreTrainedTokenizerBase, int], teacher: tuple[str, PreTrainedTokenizerBase, int]
) -> None:
    """Raise `ModelError` unless both have the same vocabulary; each is a name, a tokenizer and a vocabulary size."""
    (name, tokenizer, size), (teacher_name, teacher_tokenizer, teacher_size) = student, teacher
    remedy = "Expected the model that it was cut from, or another with its tokenizer; or train without: --method lora"
    if size != teacher_size:
        raise ModelError(
            f"teacher {teacher_name!r} has a vocabulary of {teacher_size} tokens, and {name!r} one of {size}. {remedy}"
        )
    vocabulary, teacher_vocabulary = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if vocabulary != teacher_vocabulary:
        token = sorted(dict(vocabulary.items() ^ teacher_vocabulary.items()))[0]
        raise ModelError(
            f"teacher {teacher_name!r} has another tokenizer than {name!r}: {token!r} is token "
            f"{teacher_vocabulary.get(token)} there and {vocabulary.get(token)} here. {remedy}"
        )
