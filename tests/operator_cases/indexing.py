"""Positions chosen by indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from operator_cases.case import LOST, SAME, VOCABULARY, Case, below
from secateur.discovery.rules.indexing import COMPUTED_WITH

# Numbers (B, T, 3) -> numbers (B, T, N) of the same units.
CARRIED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda i: i.view(-1).view(i.shape),
    "clone": lambda i: i.clone(),
    "detach": lambda i: i.detach(),
    "_to_copy": lambda i: i.to(torch.int32),
    "t": lambda i: i.flatten(0, 1).t().t().unflatten(0, i.shape[:2]),
    "transpose": lambda i: i.transpose(0, 1).transpose(0, 1),
    "permute": lambda i: i.permute(2, 0, 1).permute(1, 2, 0),
    "unsqueeze squeeze": lambda i: i.unsqueeze(-1).squeeze(-1),
    "expand": lambda i: i.unsqueeze(2).expand(-1, -1, 2, -1).flatten(2),
    "repeat": lambda i: i.repeat(1, 1, 2),
    "cat": lambda i: torch.cat([i, i], -1),
    "stack": lambda i: torch.stack([i, i], 2).flatten(2),
    "split": lambda i: i.split(2, -1)[0],
    "split_with_sizes": lambda i: i.split([1, 2], -1)[1],
    "slice": lambda i: i[..., 1:],
    "select": lambda i: i[..., 1][..., None],
    "unbind": lambda i: i.unbind(-1)[1][..., None],
    "index": lambda i: i[..., [0, 2]],
    "index_select": lambda i: i.index_select(-1, torch.tensor([0, 2])),
    "gather": lambda i: i.gather(-1, torch.zeros_like(i)),
    "sort": lambda i: i.sort(-1).values,
    "where flip": lambda i: torch.where(torch.ones_like(i, dtype=torch.bool), i, i.flip(-1)),
    "clamp": lambda i: i.clamp(0),
}


def carrying(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any, Any], Tensor]:
    return lambda x, n, w: w.w[value(x.topk(3).indices)].sum(2)


CASES = (
    # positions by number
    Case("embedding", lambda x, n, w: x, {**SAME, "embed": "frozen, b"}, reason="other tokens than it returns"),
    Case("embedding", lambda x, n, w: x, {**SAME, "embed": "b, c"}, outputs=VOCABULARY),
    Case(
        "embedding",
        lambda x, n, w: x + F.embedding(torch.arange(x.shape[1]), w.w),
        {**SAME, "w": "frozen, a"},
        weights={"w": (9, 12)},
        reason="looked up by number",
    ),
    Case("index", lambda x, n, w: x[:, torch.tensor([0, 3, 2])], SAME),
    Case("index", lambda x, n, w: x[..., torch.tensor([0, 5, 3])], LOST, columns=3, reason="looked up by number"),
    Case(
        "index",
        lambda x, n, w: w.w[:, torch.tensor([[0], [1]]), torch.tensor([0, 1])].sum((1, 2)) * x,
        {**SAME, "w": "a, frozen, frozen"},
        weights={"w": (12, 4, 5)},
        reason="looked up by number",
    ),
    Case(
        "index",
        lambda x, n, w: w.w[:, torch.tensor([1]), :, torch.tensor([1])].sum(-1) * x,
        {**SAME, "w": "a, frozen, b, frozen"},
        weights={"w": (12, 4, 3, 5)},
        reason="looked up by number",
    ),
    Case(
        "index",
        lambda x, n, w: w.w[torch.tensor([1]), :, torch.tensor([1])] * x,
        {**SAME, "w": "frozen, a, frozen"},
        weights={"w": (4, 12, 5)},
        reason="looked up by number",
    ),
    Case("gather", lambda x, n, w: x.gather(1, torch.zeros_like(x, dtype=torch.long)), SAME),
    Case(
        "gather",
        lambda x, n, w: x.gather(1, torch.zeros(*x.shape[:2], n.a, dtype=torch.long)),
        {"up": "a + b", "head": "a"},
        {"a": 4},
        columns=4,
    ),
    Case(
        "gather",
        lambda x, n, w: x.gather(-1, torch.tensor([5, 0, 3]).expand(*x.shape[:2], 3)),
        LOST,
        columns=3,
        reason="looked up by number",
    ),
    Case("_unsafe_index", lambda x, n, w: torch.ops.aten._unsafe_index(x, [None, torch.tensor([0, 3, 2])]), SAME),
    Case(
        "_unsafe_index",
        lambda x, n, w: torch.ops.aten._unsafe_index(x, [None, None, torch.tensor([5, 3])]),
        LOST,
        columns=2,
        reason="looked up by number",
    ),
    Case("index", lambda x, n, w: x[..., list(range(n.a))], {"up": "a + b", "head": "a"}, {"a": 4}, columns=4),
    Case(
        "index",
        lambda x, n, w: x[..., list(range(-n.b, 0))],
        {"up": "a + b", "head": "b"},
        {"b": 4},
        columns=4,
    ),
    Case("index", lambda x, n, w: x[..., [1, 0]], LOST, columns=2, reason="looked up by number"),
    Case("index_put", lambda x, n, w: x.index_put((torch.tensor([1, 0]),), x[:2]), SAME),
    Case(
        "index_put",
        lambda x, n, w: torch.ops.aten.index_put(x, [None, None, torch.tensor([1, 0])], x.sum()),
        LOST,
        reason="looked up by number",
    ),
    Case(
        "index_put",
        lambda x, n, w: x.clone().index_put_((torch.tensor([1, 0]), torch.tensor([0, 2])), w.w),
        {**SAME, "w": "a"},
        weights={"w": (12,)},
    ),
    Case(
        "_unsafe_index_put",
        lambda x, n, w: torch.ops.aten._unsafe_index_put(x, [torch.tensor([1])], w.w),
        {**SAME, "w": "(1), (1), a"},
        weights={"w": (1, 1, 12)},
    ),
    Case("index_select", lambda x, n, w: x.index_select(1, torch.tensor([0, 3, 2])), SAME),
    Case(
        "index_select",
        lambda x, n, w: x.index_select(-1, torch.tensor([5, 3])),
        LOST,
        columns=2,
        reason="looked up by number",
    ),
    Case(
        "index_add",
        lambda x, n, w: x.index_add(1, torch.tensor([2]), w.w.expand(len(x), 1, -1)),
        {**SAME, "w": "(1), a"},
        weights={"w": (1, 12)},
    ),
    Case(
        "index_add",
        lambda x, n, w: x.index_add(-1, torch.tensor([2, 0]), w.w.expand(*x.shape[:2], 2)),
        {**LOST, "w": "frozen"},
        weights={"w": (2,)},
        reason="looked up by number",
    ),
    Case(
        "index_copy",
        lambda x, n, w: x.index_copy(1, torch.tensor([2]), w.w.expand(len(x), 1, -1)),
        {**SAME, "w": "(1), a"},
        weights={"w": (1, 12)},
    ),
    Case("scatter", lambda x, n, w: x.scatter(1, torch.zeros_like(x, dtype=torch.long)[:, :1], x[:, 1:]), SAME),
    Case(
        "scatter",
        lambda x, n, w: x.scatter(1, torch.zeros(*x.shape[:2], n.a, dtype=torch.long)[:, :1], 2.0),
        {"up": "a + b", "head": "a + b"},
        {"a": 4, "b": 8},
    ),
    Case(
        "scatter",
        lambda x, n, w: x.scatter(-1, torch.tensor([5, 3]).expand(*x.shape[:2], 2), 2.0),
        LOST,
        reason="looked up by number",
    ),
    Case("scatter_add", lambda x, n, w: x.scatter_add(1, torch.zeros_like(x, dtype=torch.long), x.sigmoid()), SAME),
    Case(
        "scatter_add",
        lambda x, n, w: x.scatter_add(-1, torch.zeros_like(x, dtype=torch.long), x),
        LOST,
        reason="looked up by number",
    ),
    Case(
        "scatter_reduce",
        lambda x, n, w: x.scatter_reduce(1, torch.zeros_like(x, dtype=torch.long), x.sigmoid(), "amax"),
        SAME,
    ),
    # positions by number, where the numbers come from a choice among the same positions
    Case(
        "gather topk",
        lambda x, n, w: x.gather(-1, x.topk(3).indices),
        {"up": "a", "head": "frozen"},
        columns=3,
        reason="numbers what aten.topk has chosen",
    ),
    Case(
        "gather argmax",
        lambda x, n, w: x.gather(-1, below(x).argmax(-1, keepdim=True)),
        {"up": "a", "head": "(1)"},
        columns=1,
    ),
    Case(
        "gather argmin",
        lambda x, n, w: x.gather(-1, x.abs().argmin(-1, keepdim=True)),
        {"up": "a", "head": "(1)"},
        columns=1,
    ),
    Case(
        "gather max",
        lambda x, n, w: x.gather(-1, below(x).max(-1, keepdim=True)[1]),
        {"up": "a", "head": "(1)"},
        columns=1,
    ),
    Case(
        "gather min",
        lambda x, n, w: x.gather(-1, x.abs().min(-1, keepdim=True)[1]),
        {"up": "a", "head": "(1)"},
        columns=1,
    ),
    Case("scatter topk", lambda x, n, w: x * torch.zeros_like(x).scatter(-1, x.topk(3)[1], 1.0), SAME),
    Case("scatter topk", lambda x, n, w: x.scatter(-1, x.topk(3)[1], x.topk(3)[0].sigmoid()), SAME),
    Case("scatter_add topk", lambda x, n, w: x.scatter_add(-1, x.topk(3)[1], x.topk(3)[0]), SAME),
    Case("scatter_reduce topk", lambda x, n, w: x.scatter_reduce(-1, x.topk(3)[1], x.topk(3)[0], "prod"), SAME),
    Case(
        "index topk",
        lambda x, n, w: x * w.w[x.topk(3)[1]].sum(-1, keepdim=True),
        {**SAME, "w": "a"},
        weights={"w": (12,)},
    ),
    Case(
        "embedding topk",
        lambda x, n, w: F.embedding(x.topk(3)[1], w.w).sum(2),
        {"up": "a", "head": "b", "w": "a, b"},
        columns=5,
        weights={"w": (12, 5)},
    ),
    Case(
        "index_select argmax",
        lambda x, n, w: w.w.index_select(0, below(x).argmax(-1).flatten()).unflatten(0, x.shape[:2]),
        {"up": "a", "head": "b", "w": "a, b"},
        columns=5,
        weights={"w": (12, 5)},
    ),
    Case(
        "index_put topk",
        lambda x, n, w: x * w.w.clone().index_put_((below(x).topk(3)[1],), w.b),
        {**SAME, "w": "a", "b": "(1)"},
        weights={"w": (12,), "b": (1,)},
    ),
    Case(
        "index_add argmax",
        lambda x, n, w: x * w.w.index_add(0, below(x).argmax(-1).flatten(), x.sum(-1).flatten()),
        {**SAME, "w": "a"},
        weights={"w": (12,)},
    ),
    Case(
        "index_copy argmax",
        lambda x, n, w: x * w.w.index_copy(0, below(x)[0, 0].argmax()[None], w.b),
        {**SAME, "w": "a", "b": "(1)"},
        weights={"w": (12,), "b": (1,)},
    ),
    *[
        Case(
            f"index topk {op}",
            carrying(value),
            {"up": "a", "head": "b", "w": "a, b"},
            columns=5,
            weights={"w": (12, 5)},
        )
        for op, value in CARRIED.items()
    ],
    Case(
        "index topk",  # one weight more, which stands for "no unit"
        lambda x, n, w: w.w[x.topk(3)[1]].sum(2),
        {"up": "a", "head": "b", "w": "a + (1), b"},
        columns=5,
        weights={"w": (13, 5)},
    ),
    Case(
        "index topk",
        lambda x, n, w: w.w[x.topk(3)[1]].sum(2),
        {"up": "frozen", "head": "a", "w": "frozen, a"},
        columns=5,
        weights={"w": (15, 5)},
        reason="looked up by number",
    ),
    Case(
        "nonzero index_select",
        lambda x, n, w: x.index_select(-1, w.w.gt(0).nonzero().squeeze(-1)).sum(-1, keepdim=True),
        {"up": "a", "head": "(1)", "w": "a"},
        columns=1,
        weights={"w": (12,)},
    ),
    Case(
        "nonzero",
        lambda x, n, w: x + w.w.gt(0).nonzero()[0, 1],
        {**SAME, "w": "frozen, frozen"},
        weights={"w": (3, 5)},
        reason=COMPUTED_WITH,
    ),
    # numbers of units that the code computes with
    *[
        Case(f"topk {op}", run, LOST, reason=COMPUTED_WITH)
        for op, run in (
            ("mul", lambda x, n, w: x * x.topk(3)[1].amax(-1, keepdim=True)),
            ("eq", lambda x, n, w: x * x.topk(3)[1].eq(2).any(-1, keepdim=True)),
            ("lt", lambda x, n, w: x * x.topk(3)[1].lt(11).any(-1, keepdim=True)),
            ("sum", lambda x, n, w: x * x.topk(3)[1].sum()),
        )
    ],
    Case("topk eq", lambda x, n, w: x * F.one_hot(x.topk(3)[1], n.a).sum(-2), SAME, {"a": 12}),
    Case("topk eq", lambda x, n, w: x * F.one_hot(x.topk(3)[1], n.a + 1)[..., :-1].sum(-2), SAME, {"a": 12}),
    Case(
        "topk eq",
        lambda x, n, w: x * F.one_hot(x.topk(3)[1], 15).sum(-2)[..., :1],
        LOST,
        reason=COMPUTED_WITH,
    ),
    Case("topk ge", lambda x, n, w: x + x.topk(3)[1].ge(n.a).any(-1, keepdim=True), SAME, {"a": 12}),
    Case("topk ones_like", lambda x, n, w: x * torch.ones_like(x.topk(3)[1]).sum(-1, keepdim=True), SAME),
    Case(
        "topk cat",
        lambda x, n, w: w.w[torch.cat([x.topk(3)[1], (x @ w.v).topk(3)[1]], -1)].sum(2),
        {"up": "frozen", "head": "a", "w": "frozen, a", "v": "frozen, frozen"},
        columns=5,
        weights={"w": (12, 5), "v": (12, 12)},
        reason=COMPUTED_WITH,
    ),
)
