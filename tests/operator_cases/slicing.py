"""Parts of a dimension by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from operator_cases.case import LOST, SAME, Case, heads, joined

CASES = (
    # parts
    Case("cat", lambda x, n, w: torch.cat([x, x * 2], -1), {**SAME, "head": "(2)·a"}, columns=24),
    Case(
        "cat",
        lambda x, n, w: torch.cat([x, x @ w.w], -1),
        {**SAME, "head": "a + b", "w": "a, b"},
        columns=17,
        weights={"w": (12, 5)},
    ),
    Case(
        "cat",
        lambda x, n, w: torch.cat([w.w.expand(len(x), -1, -1), x], 1),
        {**SAME, "w": "frozen, a"},
        weights={"w": (2, 12)},
        reason="the model returns it",
    ),
    Case("cat", lambda x, n, w: torch.cat([torch.empty(0), x]), SAME),
    Case("stack", lambda x, n, w: torch.stack([x, -x], 2).flatten(2), {**SAME, "head": "(2)·a"}, columns=24),
    Case("stack", lambda x, n, w: torch.stack([x, -x], -1).flatten(2), {**SAME, "head": "a·(2)"}, columns=24),
    Case(
        "stack",
        lambda x, n, w: (w.w + torch.stack([x, -x], -1)).flatten(2),
        {"up": "a", "head": "a·frozen", "w": "frozen"},
        columns=24,
        weights={"w": (2,)},
        reason="addresses its positions",
    ),
    Case(
        "split",
        lambda x, n, w: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[1],
        {"up": "(2)·a", "head": "a"},
        columns=6,
    ),
    Case(
        "split_with_sizes cat",
        lambda x, n, w: torch.cat(x.split([n.a, n.b], -1)[::-1], -1),
        {"up": "a + b", "head": "b + a"},
        {"a": 4, "b": 8},
    ),
    Case(
        "split_with_sizes",
        lambda x, n, w: joined(heads(x, n.a).split([n.b, n.c], -1)[1]),
        {"up": "a·(b + c)", "head": "a·c"},
        {"a": 3, "b": 2, "c": 2},
        columns=6,
    ),
    Case("slice", lambda x, n, w: x[..., : n.a], {"up": "a + b", "head": "a"}, {"a": 4}, columns=4),
    Case("slice", lambda x, n, w: x[..., -n.b :], {"up": "a + b", "head": "b"}, {"b": 4}, columns=4),
    Case("slice", lambda x, n, w: x[:, :2], SAME),
    Case(
        "slice", lambda x, n, w: x[..., 1::2], {"up": "a·frozen", "head": "a"}, columns=6, reason="every other position"
    ),
    Case(
        "slice stack",
        lambda x, n, w: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(2),
        {"up": "a·frozen", "head": "a·(2)"},
        reason="every other position",
    ),
    Case("slice", lambda x, n, w: x[..., ::5], LOST, columns=3, reason="every other position"),
    Case("slice", lambda x, n, w: x[..., 1:-1:2], LOST, columns=5, reason="every other position"),
    Case(
        "slice_scatter",
        lambda x, n, w: x.slice_scatter(x[..., n.a :].sigmoid(), -1, 0, n.a),
        {"up": "(2)·a", "head": "(2)·a"},
        {"a": 6},
    ),
    Case(
        "slice_scatter",
        lambda x, n, w: x.slice_scatter(w.w.expand(*x.shape[:2], -1), -1, n.a),
        {"up": "a + b", "head": "a + b", "w": "b"},
        {"a": 8},
        weights={"w": (4,)},
    ),
    Case(
        "slice_scatter",
        lambda x, n, w: x.slice_scatter(w.w.expand(*x.shape[:2], -1), -1, 0, step=2),
        {"up": "a·frozen", "head": "a·frozen", "w": "a"},
        weights={"w": (6,)},
        reason="every other position",
    ),
    Case(
        "select",
        lambda x, n, w: x.unflatten(-1, (n.a, -1)).select(-1, 1),
        {"up": "a·frozen", "head": "a"},
        {"a": 3},
        columns=3,
        reason="one position",
    ),
    Case(
        "unbind",
        lambda x, n, w: torch.addcmul(*x.unflatten(-1, (3, -1)).unbind(2)),
        {"up": "frozen·a", "head": "a"},
        columns=4,
        reason="one position",
    ),
    # positions added, and windows
    Case("constant_pad_nd", lambda x, n, w: F.pad(x, (1, 2)), {"up": "a", "head": "(1) + a + (2)"}, columns=15),
    Case("constant_pad_nd", lambda x, n, w: F.pad(x, (-n.a, 0)), {"up": "a + b", "head": "b"}, {"a": 4}, columns=8),
    Case(
        "constant_pad_nd", lambda x, n, w: F.pad(x, (1, -n.b)), {"up": "a + b", "head": "(1) + a"}, {"b": 4}, columns=9
    ),
    Case("constant_pad_nd", lambda x, n, w: F.pad(x, (0, 0, 2, -1)), SAME),
    Case("unfold", lambda x, n, w: x.unfold(1, 2, 1).sum(-1), SAME),
    Case(
        "unfold",
        lambda x, n, w: x.unfold(-1, 4, 2).flatten(2),
        {"up": "frozen", "head": "frozen·frozen"},
        columns=20,
        reason="takes windows of it",
    ),
    Case("diagonal", lambda x, n, w: x.diagonal(0, 0, 1).t(), SAME),
    Case(
        "diagonal",
        lambda x, n, w: x * w.w.diagonal(),
        {**LOST, "w": "frozen, frozen"},
        weights={"w": (12, 14)},
        reason="it is a diagonal",
    ),
)
