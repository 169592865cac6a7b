"""Views and repetitions."""

from __future__ import annotations

import torch

from operator_cases.case import HEADS, LOST, SAME, Case, heads, joined

CASES = (
    # the order of dimensions, and dimensions of size 1
    Case("t mm", lambda x, n, w: x @ w.w.t(), {**SAME, "head": "b", "w": "b, a"}, columns=5, weights={"w": (5, 12)}),
    Case("t", lambda x, n, w: x + w.w.t(), {**SAME, "w": "a"}, weights={"w": (12,)}),
    Case(
        "transpose",
        lambda x, n, w: (x.transpose(0, -1) + w.w).transpose(0, 2),
        {**SAME, "w": "a, (1), (1)"},
        weights={"w": (12, 1, 1)},
    ),
    Case(
        "permute",
        lambda x, n, w: (x.permute(-1, 0, 1) + w.w).permute(1, 2, 0),
        {**SAME, "w": "a, (1), (1)"},
        weights={"w": (12, 1, 1)},
    ),
    Case(
        "unsqueeze sum", lambda x, n, w: (x.unsqueeze(-2) * w.w).sum(2), {**SAME, "w": "b, a"}, weights={"w": (3, 12)}
    ),
    Case("unsqueeze", lambda x, n, w: (x.unsqueeze(-1) * w.w).sum(-1), {**SAME, "w": "a, b"}, weights={"w": (12, 3)}),
    Case("squeeze", lambda x, n, w: x.unsqueeze(0).squeeze(0), SAME),
    Case("squeeze", lambda x, n, w: x[None, :, :, None].squeeze(), SAME),
    Case("squeeze", lambda x, n, w: x[None, :, :, None].squeeze((0, 2, -1)), SAME),
    # copies side by side
    Case(
        "expand",
        lambda x, n, w: x.unsqueeze(2).expand(-1, -1, n.b, -1).flatten(2),
        {**SAME, "head": "b·a"},
        {"a": 12, "b": 3},
        columns=36,
    ),
    Case(
        "expand",
        lambda x, n, w: x + w.w.expand(3, -1, -1).sum(0),
        {**SAME, "w": "(1), a"},
        weights={"w": (1, 12)},
    ),
    Case("repeat", lambda x, n, w: x.repeat(1, 1, n.b), {**SAME, "head": "b·a"}, {"a": 12, "b": 3}, columns=36),
    Case("repeat", lambda x, n, w: x.repeat(2, 1, 1, 1).sum(0), SAME),
    Case(
        "expand",
        lambda x, n, w: x.repeat_interleave(n.b, dim=-1),
        {**SAME, "head": "a·b"},
        {"a": 12, "b": 3},
        columns=36,
    ),
    # factors and merged dimensions
    Case(
        "view _unsafe_view",
        lambda x, n, w: x.view(*x.shape[:2], n.a, n.b).transpose(2, 3).reshape(*x.shape[:2], -1),
        {"up": "a·b", "head": "b·a"},
        HEADS,
    ),
    Case("view", lambda x, n, w: x.view(-1, n.a).view(1, -1, n.a).view(x.shape), SAME, {"a": 12}),
    Case(
        "view",
        lambda x, n, w: joined(heads(joined(heads(x, 3).transpose(1, -1)), 6)),
        {"up": "frozen·frozen", "head": "frozen·frozen"},
        reason="do not factor",
    ),
    Case(
        "view",
        lambda x, n, w: x.to(torch.float32).view(torch.int16).to(x.dtype),
        LOST,
        columns=24,
        reason="no rule for this use of the operator aten.view",
    ),
    Case("view cat", lambda x, n, w: torch.cat([x, x[:0].view(0, *x.shape[1:])]), SAME),
)
