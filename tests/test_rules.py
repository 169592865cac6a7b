"""What each operator's rule says of the weights around it, and that a model cut accordingly computes the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.axes.algebra import Concat, Expression, Fixed, Product, Variable, kept_along, show, variables_in
from secateur.axes.groups import group_axes
from secateur.axes.rules import RULES, Inference, infer
from secateur.graph import Ref, trace

VOCABULARY, HIDDEN, OUTPUTS = 26, 6, 7
BATCH, SEQUENCE = 3, 4  # of the runs with numbers


# --- a model of one operator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An operator between two linear layers, and the axes that its rule should find.

    `run(x, n, w)` gets what `up` gives, (B, T, rows), and returns what `head` takes, (B, T, columns). `n.a` is the
    number of units of group a, `w.name` a weight. In `axes` groups are a, b, ... in the order in which they are met:
    in the rows of `up`, in the columns of `head`, then elsewhere; "frozen" stands for what cannot be cut.
    """

    ops: str  # names without "aten."
    run: Callable[[Tensor, Any, Any], Tensor]
    axes: dict[str, str]
    units: dict[str, int] = field(default_factory=dict)
    rows: int = 12
    columns: int = 12
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = ""  # part of the reason why the frozen axes are
    numbers: bool = True  # whether the operator runs on the CPU


class OneOperator(nn.Module):
    """tokens -> embed -> up -> the operator -> head."""

    def __init__(self, case: Case, units: dict[str, int], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.units = case, units
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor, ...]:
        w: Any = self
        x = F.linear(F.embedding(input_ids, w.embed), w.up)
        x = self.case.run(x, SimpleNamespace(**self.units), w)
        return (F.linear(x, w.head),)


def random_weights(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (VOCABULARY, HIDDEN),
        "up": (case.rows, HIDDEN),
        "head": (OUTPUTS, case.columns),
        **case.weights,
    }
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def inferred(case: Case) -> tuple[Inference, dict[str, tuple[Expression, ...]]]:
    """The inference on the case's model, and the dimensions of its weights."""
    weights = random_weights(case)
    state = infer(trace(OneOperator(case, case.units, weights)))
    group_axes(state, "")  # freezes what the operators together leave free but no group can hold
    return state, {name: state.of(Ref(state.graph.parameters[name])) for name in weights}


def letters(state: Inference, dims: dict[str, tuple[Expression, ...]]) -> dict[str, str]:
    """Free variables -> a, b, ... in the order that `Case` describes."""
    others = [dim for name in dims if name not in ("up", "head", "embed") for dim in dims[name]]
    ordered = (dims["up"][0], dims["head"][1], *others, *dims["embed"])
    found = [v for dim in ordered for v in variables_in(dim)]
    free = dict.fromkeys(v.name for v in found if state.unifier.reason(v) is None)
    return dict(zip(free, "abcdefgh", strict=False))


def lettered(expression: Expression, names: dict[str, str]) -> Expression:
    match expression:
        case Variable(name=name, size=size):
            return Variable(names.get(name, "frozen"), size)
        case Product(factors=factors):
            return Product(tuple(lettered(factor, names) for factor in factors))
        case Concat(parts=parts):
            return Concat(tuple(lettered(part, names) for part in parts))
        case Fixed():
            return expression


# --- the cases --------------------------------------------------------------------------------------------------

SAME = {"up": "a", "head": "a"}  # unit by unit
LOST = {"up": "frozen", "head": "frozen"}
HEADS = {"a": 3, "b": 4}


def heads(x: Tensor, n: int) -> Tensor:
    """(B, T, n·D) -> (B, n, T, D)."""
    split: Tensor = x.unflatten(-1, (n, -1))
    return split.transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, n, T, D) -> (B, T, n·D)."""
    return x.transpose(1, 2).flatten(2)


def stored(x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of x whose first half along the last dimension is overwritten."""
    half = x.shape[-1] // 2
    copy = x.clone()
    copy[..., :half].copy_(value(x[..., half:]))
    return copy


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
    # copies, and tensors made like another
    Case("alias", lambda x, n, w: torch.ops.aten.alias(x), SAME),
    Case("detach", lambda x, n, w: x.detach(), SAME),
    Case("clone", lambda x, n, w: x.clone(), SAME),
    Case("_to_copy", lambda x, n, w: x.to(x.dtype, copy=True), SAME),
    Case("lift_fresh", lambda x, n, w: x * torch.tensor(2.0), SAME),
    Case("lift_fresh", lambda x, n, w: x * torch.tensor([1.0, 2.0] * 6), LOST, reason="a constant of the code"),
    Case("zeros_like", lambda x, n, w: x + torch.zeros_like(x), SAME),
    Case("ones_like", lambda x, n, w: x + torch.ones_like(x), SAME),
    Case("full_like", lambda x, n, w: x + torch.full_like(x, 2.0), SAME),
    Case("empty_like fill", lambda x, n, w: x + torch.empty_like(x).fill_(2.0), SAME),
    Case("rand_like", lambda x, n, w: x + torch.rand_like(x).ge(0), SAME),
    Case("randn_like", lambda x, n, w: x + torch.randn_like(x).isfinite(), SAME),
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
    # positions by number
    Case("embedding", lambda x, n, w: x, {**SAME, "embed": "frozen, b"}, reason="looked up by number"),
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
    Case("gather topk", lambda x, n, w: x.gather(-1, x.topk(3).indices), LOST, columns=3, reason="looked up by number"),
    # the order of positions
    Case("cumsum", lambda x, n, w: x.cumsum(1), SAME),
    Case("cumsum", lambda x, n, w: x.cumsum(-1), LOST, reason="aten.cumsum depends on the order"),
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
    # tensors made by the code
    Case("zeros", lambda x, n, w: x + torch.zeros(n.a), SAME, {"a": 12}),
    Case("ones", lambda x, n, w: x + torch.ones(n.a), SAME, {"a": 12}),
    Case("full", lambda x, n, w: x + torch.full((n.a,), 2.0), SAME, {"a": 12}),
    Case("empty zero", lambda x, n, w: x + torch.empty(n.a).zero_(), SAME, {"a": 12}),
    Case("scalar_tensor", lambda x, n, w: x * torch.scalar_tensor(2.0), SAME),
    Case("new_ones", lambda x, n, w: x + x.new_ones(n.a), SAME, {"a": 12}),
    Case("new_zeros", lambda x, n, w: x + x.new_zeros(n.a), SAME, {"a": 12}),
    Case("new_full", lambda x, n, w: x + x.new_full((n.a,), 2.0), SAME, {"a": 12}),
    Case("new_empty zero", lambda x, n, w: x + x.new_empty(n.a).zero_(), SAME, {"a": 12}),
    Case("arange", lambda x, n, w: x * torch.arange(12), LOST, reason="counts its positions"),
    Case("linspace", lambda x, n, w: x * torch.linspace(0, 1, 12), LOST, reason="counts its positions"),
    # sums
    Case("sum", lambda x, n, w: x.sum(-1, keepdim=True), {"up": "a", "head": "(1)"}, columns=1),
    Case("sum", lambda x, n, w: x * x.sum((0, 1)), SAME),
    Case("sum", lambda x, n, w: x * x.sum(), SAME),
    Case("mean", lambda x, n, w: x - x.mean(1, keepdim=True), SAME),
    Case("mean", lambda x, n, w: x * x.pow(2).mean(-1, keepdim=True).rsqrt(), SAME),
    Case("mean", lambda x, n, w: x * x.mean(), SAME),
    Case("var", lambda x, n, w: x * x.var(-1, keepdim=True), SAME),
    Case("linalg_vector_norm", lambda x, n, w: x / x.norm(dim=-1, keepdim=True), SAME),
    # choices
    Case("amax", lambda x, n, w: x - x.amax(1, keepdim=True), SAME),
    Case("amax", lambda x, n, w: x - x.amax(-1, keepdim=True), LOST, reason="aten.amax chooses among"),
    Case("amin", lambda x, n, w: x - x.amin(), LOST, reason="aten.amin chooses among"),
    Case("max", lambda x, n, w: x - x.max(-1, keepdim=True).values, LOST, reason="aten.max chooses among"),
    Case("max", lambda x, n, w: x - x.max(), LOST, reason="aten.max chooses among"),
    Case("min", lambda x, n, w: x - x.min(1, keepdim=True).values, SAME),
    Case("min", lambda x, n, w: x - x.min(-1, keepdim=True).values, LOST, reason="aten.min chooses among"),
    Case("argmax", lambda x, n, w: x * x.argmax(-1, keepdim=True), LOST, reason="aten.argmax chooses among"),
    Case("any", lambda x, n, w: x * x.gt(0).any(-1, keepdim=True), LOST, reason="aten.any chooses among"),
    Case("all", lambda x, n, w: x * x.gt(0).all(-1, keepdim=True), LOST, reason="aten.all chooses among"),
    Case("topk", lambda x, n, w: x.topk(3, -1).values, LOST, columns=3, reason="aten.topk chooses among"),
    Case("topk", lambda x, n, w: x.topk(3, 1).values, SAME),
    Case("_softmax", lambda x, n, w: x.softmax(1), SAME),
    Case("_softmax", lambda x, n, w: x.softmax(-1), LOST, reason="a softmax runs across it"),
    Case("_log_softmax", lambda x, n, w: x.log_softmax(-1), LOST, reason="a softmax runs across it"),
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
    # matrix products
    Case(
        "mm",
        lambda x, n, w: torch.mm(x.flatten(0, 1), w.w).unflatten(0, x.shape[:2]),
        {**SAME, "head": "b", "w": "a, b"},
        columns=5,
        weights={"w": (12, 5)},
    ),
    Case(
        "addmm",
        lambda x, n, w: F.linear(x, w.w, w.b),
        {**SAME, "head": "b", "w": "b, a", "b": "b"},
        columns=5,
        weights={"w": (5, 12), "b": (5,)},
    ),
    Case(
        "bmm",
        lambda x, n, w: (
            torch.bmm(x.flatten(0, 1).unflatten(-1, (n.a, -1)).transpose(0, 1), w.w)
            .transpose(0, 1)
            .flatten(1)
            .unflatten(0, x.shape[:2])
        ),
        {"up": "a·b", "head": "a·c", "w": "a, b, c"},
        HEADS,
        columns=15,
        weights={"w": (3, 4, 5)},
    ),
    Case(
        "baddbmm",
        lambda x, n, w: (
            torch.baddbmm(w.b, x.flatten(0, 1).unflatten(-1, (n.a, -1)).transpose(0, 1), w.w)
            .transpose(0, 1)
            .flatten(1)
            .unflatten(0, x.shape[:2])
        ),
        {"up": "a·b", "head": "a·c", "w": "a, b, c", "b": "a, (1), c"},
        HEADS,
        columns=15,
        weights={"w": (3, 4, 5), "b": (3, 1, 5)},
    ),
    # attention in one operator
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
        "_safe_softmax bmm",
        lambda x, n, w: attend(heads(x, n.a), heads(x, n.a), heads(x, n.a), attn_mask=w.bias),
        {"up": "a·b", "head": "a·b", "bias": "a, (1), (1)"},
        HEADS,
        weights={"bias": (3, 1, 1)},
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
    *[
        Case(name, fused_attention(name), {"up": "a·b", "head": "a·b"}, HEADS, numbers=False)
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
    ],
    # written in place
    Case("add", lambda x, n, w: x.clone().add_(w.w), {**SAME, "w": "a"}, weights={"w": (12,)}),
    Case("masked_fill", lambda x, n, w: x.clone().masked_fill_(w.w > 0, 0.0), {**SAME, "w": "a"}, weights={"w": (12,)}),
    Case("copy", lambda x, n, w: stored(x, torch.sigmoid), {"up": "(2)·a", "head": "(2)·a"}),
    Case("copy", lambda x, n, w: torch.empty_like(x).copy_(w.w) * x, {**SAME, "w": "a"}, weights={"w": (12,)}),
    # operators without a rule
    Case(
        "kthvalue",
        lambda x, n, w: x - x.kthvalue(2, keepdim=True).values,
        LOST,
        reason="there is no rule for this use of the operator aten.kthvalue (in the model)",
    ),
    Case("glu", lambda x, n, w: F.glu(x), LOST, columns=6, reason="no rule for this use of the operator aten.glu"),
    Case(
        "_fft_r2c",
        lambda x, n, w: torch.fft.fft(x).abs(),
        LOST,
        reason="no rule for this use of the operator aten._fft_r2c",
    ),
)

# Operators that torch takes apart before they reach the recorder -> one with a case and the same rule.
TAKEN_APART = {
    "aten.contiguous": "aten.clone",
    "aten.dropout": "aten.clone",
    "aten.reshape": "aten.view",
    "aten.layer_norm": "aten.native_layer_norm",
    "aten.rms_norm": "aten.native_layer_norm",
    "aten._fused_rms_norm": "aten.native_layer_norm",
    "aten._scaled_dot_product_attention_math": "aten._scaled_dot_product_flash_attention_for_cpu",
}


def names(case: Case) -> str:
    return case.ops.replace(" ", "-")


every_case = pytest.mark.parametrize("case", CASES, ids=names)


@every_case
def test_the_axes_that_an_operator_ties(case: Case) -> None:
    state, dims = inferred(case)
    names = letters(state, dims)
    recorded = {node.op.removesuffix("_") if node.in_place else node.op for node in state.graph.nodes}
    assert {f"aten.{op}" for op in case.ops.split()} <= recorded
    shown = {name: ", ".join(show(lettered(dim, names)) for dim in dims[name]) for name in case.axes}
    shown |= {"up": show(lettered(dims["up"][0], names)), "head": show(lettered(dims["head"][1], names))}
    assert shown == case.axes
    if case.reason:
        frozen = {v for name in ("embed", *case.axes) for dim in dims[name] for v in variables_in(dim)}
        assert any(case.reason in (state.unifier.reason(variable) or "") for variable in frozen)
    sizes = {names[v.name]: v.size for dim in dims.values() for e in dim for v in variables_in(e) if v.name in names}
    assert case.units.items() <= sizes.items()


@pytest.mark.parametrize("case", [case for case in CASES if case.numbers and case.axes != LOST], ids=names)
def test_the_cut_operator_computes_what_the_masked_one_does(case: Case) -> None:
    state, dims = inferred(case)
    names, weights = letters(state, dims), random_weights(case)
    averaged = {v.name for dim in state.averaged for v in variables_in(state.unifier.resolve(dim))}
    variables = {v for dim in dims.values() for e in dim for v in variables_in(e) if v.name in names}
    chosen = random.Random(0)
    keep: dict[str, Sequence[int]] = {
        v.name: sorted(chosen.sample(range(v.size), (v.size + 1) // 2))
        for v in sorted(variables, key=lambda v: v.name)
        if v.name not in averaged  # a norm across it would be of other numbers
    }
    assert keep
    cut, masked = {}, {}
    for name, weight in weights.items():
        kept = torch.meshgrid(*[torch.tensor(kept_along(dim, keep)) for dim in dims[name]], indexing="ij")
        cut[name] = weight[kept]
        masked[name] = torch.zeros_like(weight).index_put(kept, cut[name])
    units_left = {names[v.name]: len(keep.get(v.name, range(v.size))) for v in variables}
    input_ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE)
    with torch.no_grad():
        (small,) = OneOperator(case, case.units | units_left, cut)(input_ids)
        (dense,) = OneOperator(case, case.units, masked)(input_ids)
    torch.testing.assert_close(small, dense, rtol=0, atol=1e-10)
    assert dense.abs().max() > 0.1  # there is something to compare


@pytest.mark.parametrize("op", RULES)
def test_every_rule_has_a_case(op: str) -> None:
    stand_in = TAKEN_APART.get(op, op)
    assert any(stand_in in {f"aten.{name}" for name in case.ops.split()} for case in CASES)
    assert RULES[op] is RULES[stand_in]
