"""Sums, statistics, choices and cumulative operators."""

from __future__ import annotations

import torch

from operator_cases.case import LOST, SAME, Case, below

CASES = (
    # the order of positions
    Case("cumsum", lambda x, n, w: x.cumsum(1), SAME),
    Case("cumsum", lambda x, n, w: x.cumsum(-1), LOST, reason="aten.cumsum depends on the order"),
    Case("cumprod", lambda x, n, w: x.cumprod(1), SAME),
    Case("cumprod", lambda x, n, w: x.cumprod(-1), LOST, reason="aten.cumprod depends on the order"),
    Case("cummax", lambda x, n, w: x.cummax(1).values, SAME),
    Case("cummax", lambda x, n, w: x.cummax(-1).values, LOST, reason="aten.cummax depends on the order"),
    Case("logcumsumexp", lambda x, n, w: x.logcumsumexp(1), SAME),
    Case("logcumsumexp", lambda x, n, w: x.logcumsumexp(-1), LOST, reason="aten.logcumsumexp depends on the order"),
    Case("tril", lambda x, n, w: x.tril(), LOST, reason="aten.tril depends on the order"),
    Case("triu", lambda x, n, w: x.triu(), LOST, reason="aten.triu depends on the order"),
    Case("triu", lambda x, n, w: x.transpose(0, 2).triu().transpose(0, 2), SAME),
    Case("flip", lambda x, n, w: x.flip(0, 1), SAME),
    Case("flip", lambda x, n, w: x.flip(-1), LOST, reason="aten.flip depends on the order"),
    Case("roll", lambda x, n, w: x.roll(1, 1), SAME),
    Case("roll", lambda x, n, w: x.roll(1, -1), LOST, reason="aten.roll depends on the order"),
    Case("roll", lambda x, n, w: x.roll(1), LOST, reason="aten.roll depends on the order"),
    Case("sort", lambda x, n, w: x.sort(1).values, SAME),
    Case("sort", lambda x, n, w: x.sort().values, LOST, reason="aten.sort depends on the order"),
    # sums
    Case("sum", lambda x, n, w: x.sum(-1, keepdim=True), {"up": "a", "head": "(1)"}, columns=1),
    Case("sum", lambda x, n, w: x * x.sum((0, 1)), SAME),
    Case("sum", lambda x, n, w: x * x.sum(), SAME),
    Case("mean", lambda x, n, w: x - x.mean(1, keepdim=True), SAME),
    Case("mean", lambda x, n, w: x * x.pow(2).mean(-1, keepdim=True).rsqrt(), SAME),
    Case("mean", lambda x, n, w: x * x.mean(), SAME),
    Case("var", lambda x, n, w: x * x.var(-1, keepdim=True), SAME),
    Case("std", lambda x, n, w: x * x.std(-1, keepdim=True), SAME),
    Case("linalg_vector_norm", lambda x, n, w: x / x.norm(dim=-1, keepdim=True), SAME),
    Case("norm", lambda x, n, w: x / torch.ops.aten.norm(x, 2, [-1], True), SAME),
    # choices
    Case("amax", lambda x, n, w: x - x.amax(1, keepdim=True), SAME),
    Case("amax", lambda x, n, w: x - below(x).amax(-1, keepdim=True), SAME),
    Case("amin", lambda x, n, w: x - x.abs().amin(), SAME),
    Case("max", lambda x, n, w: x - below(x).max(-1, keepdim=True).values, SAME),
    Case("max", lambda x, n, w: x - below(x).max(), SAME),
    Case("maximum", lambda x, n, w: x.max(w.w), {**SAME, "w": "a"}, weights={"w": (12,)}),
    Case("min", lambda x, n, w: x - x.min(1, keepdim=True).values, SAME),
    Case("min", lambda x, n, w: x - x.abs().min(-1, keepdim=True).values, SAME),
    Case("argmax", lambda x, n, w: x * x.argmax(1, keepdim=True), SAME),
    Case("argmin", lambda x, n, w: x * x.argmin(1, keepdim=True), SAME),
    Case("any", lambda x, n, w: x + x.eq(0).any(-1, keepdim=True), SAME),
    Case("all", lambda x, n, w: x + x.ne(0).all(-1, keepdim=True), SAME),
    Case("logsumexp", lambda x, n, w: x - x.logsumexp(-1, keepdim=True), SAME),
    Case("topk", lambda x, n, w: x.topk(3, -1).values, {"up": "a", "head": "frozen"}, columns=3, reason="has chosen"),
    Case("topk", lambda x, n, w: x.topk(3, 1).values, SAME),
    Case("_softmax", lambda x, n, w: x.softmax(1), SAME),
    Case("_softmax", lambda x, n, w: x.softmax(-1), SAME),
    Case("_log_softmax", lambda x, n, w: x.log_softmax(-1), SAME),
)
