"""Rows of random tokens, and the top tokens of logits, for the tests of distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.data.rows import Rows
from tiny import VOCABULARY


def random_rows(count: int, *, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    lengths_R = torch.randint(2, 12, (count,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_R.cumsum(0)])
    ids_T = torch.randint(0, VOCABULARY, (int(starts[-1]),), generator=generator, dtype=torch.int32)
    loss_mask_T = torch.rand(len(ids_T), generator=generator) < 0.6
    loss_mask_T[starts[:-1]] = False
    return Rows(ids_T, loss_mask_T, starts, torch.zeros(count, dtype=torch.int32))


def top_tokens(logits_MV: Tensor, top_k: int, temperature: float = 1.0) -> dict[str, Tensor]:
    logp_MK, tokens_MK = (logits_MV / temperature).log_softmax(-1).topk(top_k, dim=-1)
    return {"tokens": tokens_MK, "logp": logp_MK, "rest": 1 - logp_MK.exp().sum(-1)}
