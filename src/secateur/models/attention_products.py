"""Attention by matrix products of all positions, for CPUs that multiply bfloat16 fast.

Tensor names end in their axes: B batch, H head, T query, S key, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@contextmanager
def bfloat16_attention(*, by_products: bool) -> Iterator[None]:
    """While open, attention in bfloat16 on a CPU is taken by matrix products of all positions.

    Trainings are as fast as with PyTorch's fused kernel or up to a quarter faster, by CPU and cores; the probabilities
    of all pairs of positions are in memory. A position that may read none gets the mean of all. Other inputs, and those
    with dropout, are left to PyTorch, as is everything without `by_products`.

    >>> q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    >>> with bfloat16_attention(by_products=True):
    ...     functional.scaled_dot_product_attention(q, q, q, is_causal=True).shape
    torch.Size([1, 2, 5, 8])
    """
    if not by_products:
        yield
        return
    taken = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = _attend(query, key, value, *args, **kwargs)
        return taken(query, key, value, *args, **kwargs) if found is None else found

    functional.scaled_dot_product_attention = attend  # which models look up at every call
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = taken


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """As PyTorch's function of the same arguments; None for what it is not for."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if dtype != torch.bfloat16 or not query.is_cpu or query.dim() != 4 or dropout_p:
        return None
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() > 4):
        return None
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    if key.shape[:2] != query.shape[:2] or value.shape[:3] != key.shape[:3]:
        return None
    bias_TS = _bias(attn_mask, is_causal, (query.shape[2], key.shape[2]))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    result: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        query, key, value, bias_TS, scale
    )
    return result


def _bias(mask: Tensor | None, causal: bool, shape: tuple[int, int]) -> Tensor | None:
    """What is added to the logits, in bfloat16: nothing where a query reads a key, and the least number elsewhere."""
    if mask is None and causal:
        mask = torch.ones(shape, dtype=torch.bool).tril()
    if mask is None:
        return None
    least = torch.finfo(torch.bfloat16).min
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, least)
    return mask.to(torch.bfloat16).clamp(min=least)


class _Attention(torch.autograd.Function):
    """softmax(scale Q K' + bias) V in bfloat16, and its gradients in Q, K and V."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias_TS: Tensor | None, scale: float) -> Tensor:
        shape = query.shape[:2]
        q_BTD, k_BSD, v_BSD = (each.to(torch.bfloat16).flatten(0, 1) for each in (query, key, value))
        q_BTD = scale * q_BTD
        logits_BTS = torch.bmm(q_BTD, k_BSD.mT)
        if bias_TS is not None:
            logits_BTS.unflatten(0, shape).add_(bias_TS)
        p_BTS = torch.softmax(logits_BTS, dim=-1)
        ctx.save_for_backward(q_BTD, k_BSD, v_BSD, p_BTS)
        ctx.scale, ctx.shape = scale, shape
        result: Tensor = torch.bmm(p_BTS, v_BSD).unflatten(0, shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_BTD, k_BSD, v_BSD, p_BTS = ctx.saved_tensors
        d_BTD = gradients[0].to(torch.bfloat16).flatten(0, 1)
        dv_BSD = torch.bmm(p_BTS.mT, d_BTD)
        dp_BTS = torch.bmm(d_BTD, v_BSD.mT)
        ds_BTS = torch.ops.aten._softmax_backward_data(dp_BTS, p_BTS, -1, torch.bfloat16)
        dq_BTD, dk_BSD = torch.bmm(ds_BTS, k_BSD).mul_(ctx.scale), torch.bmm(ds_BTS.mT, q_BTD)
        return (*(each.unflatten(0, ctx.shape) for each in (dq_BTD, dk_BSD, dv_BSD)), None, None)
