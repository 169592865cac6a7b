"""Convolutions."""

from __future__ import annotations

import torch.nn.functional as F

from operator_cases.case import HEADS, LOST, Case

CASES = (
    Case(
        "convolution",
        lambda x, n, w: F.conv1d(x.transpose(1, 2), w.w, w.b, padding=1).transpose(1, 2),
        {"up": "a", "head": "b", "w": "b, a, frozen", "b": "b"},
        columns=5,
        weights={"w": (5, 12, 3), "b": (5,)},
        reason="positions of a convolution's kernel",
    ),
    Case(
        "convolution",
        lambda x, n, w: F.conv1d(x.transpose(1, 2), w.w, padding=2, groups=n.a)[..., :-2].transpose(1, 2),
        {"up": "a", "head": "a", "w": "a, (1), frozen"},
        {"a": 12},
        weights={"w": (12, 1, 3)},
        reason="positions of a convolution's kernel",
    ),
    Case(
        "convolution",
        lambda x, n, w: F.conv1d(x.transpose(1, 2), w.w, w.b, groups=n.a).transpose(1, 2),
        {"up": "a·b", "head": "a·c", "w": "a·c, b, (1)", "b": "a·c"},
        HEADS,
        columns=6,
        weights={"w": (6, 4, 1), "b": (6,)},
    ),
    Case(
        "convolution",
        lambda x, n, w: F.conv_transpose1d(x.transpose(1, 2), w.w).transpose(1, 2),
        {**LOST, "w": "frozen, frozen, frozen"},
        columns=5,
        weights={"w": (12, 5, 2)},
        reason="no rule for this use of the operator aten.convolution",
    ),
)
