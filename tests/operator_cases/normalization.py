"""Norms."""

from __future__ import annotations

import torch.nn.functional as F

from operator_cases.case import HEADS, HEADS_ALONE, SAME, Case

CASES = (
    # norms
    Case(
        "native_layer_norm",
        lambda x, n, w: F.layer_norm(x, x.shape[-1:], w.w, w.b),
        {**SAME, "w": "a", "b": "a"},
        weights={"w": (12,), "b": (12,)},
    ),
    Case(
        "native_layer_norm",
        lambda x, n, w: F.layer_norm(x.unflatten(-1, (n.a, n.b)), (n.a, n.b)).flatten(2),
        {"up": "a·b", "head": "a·b"},
        HEADS,
    ),
    Case(
        "native_layer_norm",
        lambda x, n, w: F.layer_norm(x.unflatten(-1, (n.a, n.b)), (n.b,), w.w).flatten(2),
        {"up": "a·b", "head": "a·b", "w": "b"},
        HEADS,
        weights={"w": (4,)},
    ),
    Case(
        "native_group_norm",
        lambda x, n, w: F.group_norm(x.transpose(1, 2), n.a, w.w, w.b).transpose(1, 2),
        {"up": "a·frozen", "head": "a·frozen", "w": "a·frozen", "b": "a·frozen"},
        HEADS_ALONE,
        weights={"w": (12,), "b": (12,)},
        reason="a group norm takes its statistics across it",
    ),
)
