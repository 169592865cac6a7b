"""Logits and labels, or a teacher's distribution -> the loss that is trained on.

Tensor names end in their axes: B batch, T token, N = B x T, V vocabulary, M position with a label, K top token of the
teacher.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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

    Autograd would go over the whole vocabulary about ten times, and keep it in float32. Here each exponential is taken
    once, for both.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, teacher: Mapping[str, Tensor], weight: float, temperature: float
    ) -> Tensor:
        # 1. The teacher's distribution; float16 on the disk rounds.
        tokens_MK, rest_M = teacher["tokens"].long(), teacher["rest"].float().clamp(min=0.0)
        p_MK = teacher["logp"].float().exp()
        p_MK = p_MK * ((1.0 - rest_M) / p_MK.sum(dim=-1).clamp(min=LEAST_MASS))[:, None]
        loss = weight * temperature**2 * (torch.xlogy(p_MK, p_MK).sum() + torch.xlogy(rest_M, rest_M).sum())
        labelled_N = labels_N != IGNORED
        d_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        if d_NV is not None:
            d_NV[~labelled_N] = 0.0
        for rows, some in _blocks(logits_NV, labelled_N):
            labels_m1, tokens_mK, p_mK, rest_m = labels_N[rows, None], tokens_MK[some], p_MK[some], rest_M[some]
            # 2. The student's probabilities, and what they are divided by to add up to 1.
            exact_mV = logits_NV[rows].float()
            label_m1, top_mK = exact_mV.gather(1, labels_m1), exact_mV.gather(1, tokens_mK)
            largest_m1 = exact_mV.amax(dim=-1, keepdim=True)
            exact_mV = exact_mV.sub_(largest_m1) if exact_mV.dtype != logits_NV.dtype else exact_mV - largest_m1
            plain_mV = exact_mV.exp() if temperature != 1.0 else exact_mV.exp_()
            scaled_mV = plain_mV if temperature == 1.0 else exact_mV.div_(temperature).exp_()
            plain_m1, scaled_m1 = (each.sum(dim=-1, keepdim=True) for each in (plain_mV, scaled_mV))
            # 3. The log-probabilities of the top tokens, and of all others together.
            logq_mK = (top_mK - largest_m1) / temperature - scaled_m1.log()
            log_top_m = logq_mK.logsumexp(dim=-1)
            logq_rest_m = torch.log(-torch.expm1(log_top_m.clamp(max=-LEAST_MASS)))
            loss -= weight * temperature**2 * ((p_mK * logq_mK).sum() + (rest_m * logq_rest_m).sum())
            loss += (1 - weight) * (plain_m1.log() + largest_m1 - label_m1).sum()
            if d_NV is None:
                continue
            # 4. The gradient: the probabilities, scaled, and what is added at the top tokens and the labels.
            others_m = torch.where(log_top_m < -LEAST_MASS, rest_m / logq_rest_m.exp(), 0.0)
            q_mK = logq_mK.exp()
            of_teacher_m1 = (weight * temperature * (p_mK.sum(dim=-1) - others_m * q_mK.sum(dim=-1)))[:, None]
            if temperature == 1.0:
                d_mV = scaled_mV.mul_((of_teacher_m1 + (1 - weight)) / scaled_m1)
            else:
                d_mV = scaled_mV.mul_(of_teacher_m1 / scaled_m1).add_(plain_mV.mul_((1 - weight) / plain_m1))
            d_mV.scatter_add_(1, tokens_mK, weight * temperature * (others_m[:, None] * q_mK - p_mK))
            d_mV.scatter_add_(1, labels_m1, torch.full_like(label_m1, weight - 1))
            d_NV[rows] = d_mV
        ctx.d_NV = d_NV
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_NV, ctx.d_NV = ctx.d_NV, None  # a second pass would find it scaled
        if d_NV is None:
            raise RuntimeError("the gradient of the loss has been used: call the loss again")
        return d_NV.mul_(gradients[0]), None, None, None, None


def _blocks(logits_NV: Tensor, labelled_N: Tensor) -> Iterator[tuple[slice, slice]]:
    """Positions that stand together and have a label: where they are in all positions, and in those with a label.

    As many at a time as a processor's cache holds the logits of, or a GPU has work with.
    """
    rows = max(1, (GPU_LOGITS if logits_NV.is_cuda else CPU_LOGITS) // logits_NV.shape[1])
    changes = torch.nonzero(labelled_N.diff()).flatten().add_(1).tolist()
    bounds, done = [0, *changes, len(labelled_N)], 0
    first_labelled = bool(labelled_N[:1].any())
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first_labelled == (number % 2 == 0):
            for start in range(first, last, rows):
                count = min(rows, last - start)
                yield slice(start, start + count), slice(done, done + count)
                done += count


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
