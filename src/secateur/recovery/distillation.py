"""Logits and labels, or a teacher's distribution -> the loss that is trained on.

Tensor names end in their axes: B batch, T token, N = B x T, V vocabulary, M position with a label, K top token of the
teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.rows import IGNORED
from secateur.errors import ModelError

LEAST_MASS = 1e-6  # float32 cannot tell a smaller probability mass from 0
CPU_LOGITS, GPU_LOGITS = 2**18, 2**27  # float32, at once


def nll_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum the negative log-likelihood of the labels; float32, nats. `labels[t]` is the token `logits[t]` predict.

    >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> round(float(nll_loss(logits, torch.tensor([[1, IGNORED]]))), 4)
    1.4402
    """
    no_tokens_MK = torch.empty(int((labels_BT != IGNORED).sum()), 0, device=logits_BTV.device)
    no_teacher = {"tokens": no_tokens_MK, "logp": no_tokens_MK, "rest": no_tokens_MK.sum(dim=-1)}
    return distillation_loss(logits_BTV, labels_BT, no_teacher, teacher_weight=0.0)


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
    labels_N = labels_BT.reshape(-1)
    loss: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        logits_BTV.reshape(-1, logits_BTV.shape[-1]), labels_N, teacher, teacher_weight, temperature
    )
    return loss


class _SummedLoss(torch.autograd.Function):
    """The loss and, in closed form, its gradient, of a few positions at a time.

    Autograd would go over the whole vocabulary about ten times, and keep it in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, teacher: Mapping[str, Tensor], weight: float, temperature: float
    ) -> Tensor:
        unlabelled_N = labels_N == IGNORED
        positions_M = torch.nonzero(~unlabelled_N).flatten()
        labels_M, tokens_MK = labels_N[positions_M], teacher["tokens"].long()
        # 1. The student's log-probabilities of the top tokens, of all others together, and of the labels.
        logsumexp_M, plain_M, label_M = (torch.empty_like(teacher["rest"], dtype=torch.float32) for _ in range(3))
        logq_MK = torch.empty_like(teacher["logp"], dtype=torch.float32)
        for some in _blocks(logits_NV, positions_M):
            exact_mV = logits_NV[positions_M[some]].float()
            label_M[some] = exact_mV.gather(1, labels_M[some, None])[:, 0]
            plain_M[some] = exact_mV.logsumexp(dim=-1)
            scaled_mV = exact_mV if temperature == 1.0 else exact_mV.div_(temperature)
            logsumexp_M[some] = plain_M[some] if temperature == 1.0 else scaled_mV.logsumexp(dim=-1)
            logq_MK[some] = scaled_mV.gather(1, tokens_MK[some]) - logsumexp_M[some, None]
        log_top_M = logq_MK.logsumexp(dim=-1)
        logq_rest_M = torch.log(-torch.expm1(log_top_M.clamp(max=-LEAST_MASS)))
        # 2. The teacher's; float16 on the disk rounds.
        rest_M = teacher["rest"].float().clamp(min=0.0)
        p_MK = teacher["logp"].float().exp()
        p_MK = p_MK * ((1.0 - rest_M) / p_MK.sum(dim=-1).clamp(min=LEAST_MASS))[:, None]
        # 3. The divergence, and the likelihood of the labels.
        divergence = (torch.xlogy(p_MK, p_MK) - p_MK * logq_MK).sum()
        divergence = divergence + (torch.xlogy(rest_M, rest_M) - rest_M * logq_rest_M).sum()
        loss = weight * temperature**2 * divergence + (1 - weight) * (plain_M - label_M).sum()
        # 4. The gradient of the divergence: the student's probabilities, scaled, and what is added at the top tokens.
        others_M = torch.where(log_top_M < -LEAST_MASS, rest_M / logq_rest_M.exp(), 0.0)
        q_MK = logq_MK.exp()
        scale_M = p_MK.sum(dim=-1) - others_M * q_MK.sum(dim=-1)
        top_MK = others_M[:, None] * q_MK - p_MK
        ctx.save_for_backward(
            logits_NV, unlabelled_N, positions_M, labels_M, tokens_MK, logsumexp_M, plain_M, scale_M, top_MK
        )
        ctx.weight, ctx.temperature = weight, temperature
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, unlabelled_N, positions_M, labels_M, tokens_MK, logsumexp_M, plain_M, scale_M, top_MK = (
            ctx.saved_tensors
        )
        of_teacher, of_labels = (w * gradients[0] for w in (ctx.weight * ctx.temperature, 1 - ctx.weight))
        scale_M, top_MK = of_teacher * scale_M, of_teacher * top_MK
        if ctx.temperature == 1.0:  # then both are of the same probabilities
            scale_M = scale_M + of_labels
        d_NV = torch.empty_like(logits_NV)
        d_NV[unlabelled_N] = 0.0
        for some in _blocks(logits_NV, positions_M):
            exact_mV = logits_NV[positions_M[some]].float()
            scaled_mV = exact_mV if ctx.temperature == 1.0 else exact_mV / ctx.temperature
            d_mV = scaled_mV.sub_(logsumexp_M[some, None]).exp_().mul_(scale_M[some, None])
            if ctx.temperature != 1.0:
                d_mV += exact_mV.sub_(plain_M[some, None]).exp_().mul_(of_labels)
            d_mV.scatter_add_(1, tokens_MK[some], top_MK[some])
            d_mV.scatter_add_(1, labels_M[some, None], -of_labels.expand(len(d_mV), 1))
            d_NV[positions_M[some]] = d_mV.to(d_NV.dtype)
        return d_NV, None, None, None, None


def _blocks(logits_NV: Tensor, positions_M: Tensor) -> list[slice]:
    """The positions, as many at a time as a processor's cache holds the logits of, or a GPU has work with."""
    rows = max(1, (GPU_LOGITS if logits_NV.is_cuda else CPU_LOGITS) // logits_NV.shape[1])
    return [slice(first, first + rows) for first in range(0, len(positions_M), rows)]


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
