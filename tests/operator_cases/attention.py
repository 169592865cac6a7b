"""Attention in one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from operator_cases.case import HEADS, Case, heads, joined


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Fused attention of (B, H, T, D) -> (B, T, H·D); the scale does not depend on the sizes."""
    return joined(F.scaled_dot_product_attention(query, key, value, scale=1.0, **options))


def fused_attention(name: str) -> Callable[[Tensor, Any, Any], Tensor]:
    """Attention by a kernel that is not made for the CPU, or only there."""

    def run(x: Tensor, n: Any, w: Any) -> Tensor:
        y = heads(x, n.a)
        extra = (None, False) if "efficient" in name else (None,) if "overrideable" in name else ()
        result: Tensor = getattr(torch.ops.aten, name)(y, y, y, *extra)[0]
        return joined(result)

    return run


CASES = (
    Case(
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda x, n, w: attend(heads(x, n.a), heads(x, n.a), heads(x, n.a)),
        {"up": "a·b", "head": "a·b"},
        HEADS,
    ),
    Case(
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda x, n, w: attend(heads(x, n.a * n.b), heads(x @ w.k, n.a), heads(x @ w.v, n.a), enable_gqa=True),
        {"up": "a·b·c", "head": "a·b·d", "k": "a·b·c, a·c", "v": "a·b·c, a·d"},
        {"a": 2, "b": 2},
        rows=12,
        weights={"k": (12, 6), "v": (12, 6)},
    ),
    Case(
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda x, n, w: attend(heads(x, n.a), heads(x, n.a), heads(x, n.a), attn_mask=w.bias),
        {"up": "a·b", "head": "a·b", "bias": "(1), a, (1), (1)"},
        HEADS,
        weights={"bias": (1, 3, 1, 1)},
    ),
    Case(
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda x, n, w: attend(
            heads(x, n.a), heads(w.k.expand(len(x), -1, -1), n.a), heads(w.v.expand(len(x), -1, -1), n.a)
        ),
        {"up": "a·b", "head": "a·c", "k": "frozen, a·b", "v": "frozen, a·c"},
        HEADS,
        columns=12,
        weights={"k": (5, 12), "v": (5, 12)},
        reason="a softmax runs across it",
    ),
    Case(
        "_safe_softmax bmm",
        lambda x, n, w: attend(heads(x, n.a), heads(x, n.a), heads(x, n.a), attn_mask=w.bias),
        {"up": "a·b", "head": "a·b", "bias": "a, (1), (1)"},
        HEADS,
        weights={"bias": (3, 1, 1)},
    ),
    *[
        Case(name, fused_attention(name), {"up": "a·b", "head": "a·b"}, HEADS, numbers=False)
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
    ],
)
