"""What each operator's rule says of the weights around it, and that a model cut accordingly computes the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.discovery.algebra import Concat, Expression, Fixed, Product, Variable, kept_along, show, variables_in
from secateur.discovery.graph import Ref
from secateur.discovery.inference import infer
from secateur.discovery.joining import group_axes
from secateur.discovery.rules.indexing import COMPUTED_WITH
from secateur.discovery.rules.registry import RULES
from secateur.discovery.rules.state import Inference
from secateur.discovery.tracing import trace

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

    ops: str  # names without "aten.", those of other libraries with theirs
    run: Callable[[Tensor, Any, Any], Tensor]
    axes: dict[str, str]
    units: dict[str, int] = field(default_factory=dict)
    rows: int = 12
    columns: int = 12
    outputs: int = OUTPUTS
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
        "head": (case.outputs, case.columns),
        **case.weights,
    }
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def inferred(case: Case) -> tuple[Inference, dict[str, tuple[Expression, ...]]]:
    """The inference on the case's model, and the dimensions of its weights."""
    weights = random_weights(case)
    state = infer(trace(OneOperator(case, case.units, weights)))
    group_axes(state, "")  # freezes what the operators together leave free but no group can hold
    return state, {name: state.dims_of(Ref(state.graph.parameters[name])) for name in weights}


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
HEADS_ALONE = {"a": 3}
CONSTANT = "makes a constant for each of its positions"


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


def below(x: Tensor) -> Tensor:
    """Numbers below zero, except for masked units: a choice that saw those would take them."""
    return x.abs().neg()


def solved(x: Tensor) -> Tensor:
    """Positions of the sequence from the ones before them, by a triangular system."""
    system = (x @ x.mT).tril() + 9 * torch.eye(x.shape[1], dtype=x.dtype)
    result: Tensor = torch.linalg.solve_triangular(system, x, upper=False)
    return result


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
    Case("log_sigmoid_forward", lambda x, n, w: F.logsigmoid(x), SAME),
    Case("native_dropout", lambda x, n, w: torch.native_dropout(x, 0.0, True)[0], SAME),
    # complex numbers
    Case(
        "view_as_complex view_as_real",
        lambda x, n, w: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(2),
        {"up": "a·frozen", "head": "a·(2)"},
        reason="real and imaginary part",
    ),
    Case(
        "polar view_as_real",
        lambda x, n, w: torch.view_as_real(torch.polar(x, w.w.expand_as(x))).flatten(2),
        {"up": "a", "head": "a·(2)", "w": "a"},
        columns=24,
        weights={"w": (12,)},
    ),
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
    Case("empty_permuted zero", lambda x, n, w: x + torch.empty_permuted((n.a,), (0,)).zero_(), SAME, {"a": 12}),
    Case("rand", lambda x, n, w: x + torch.rand(n.a).ge(0), SAME, {"a": 12}),
    Case("randn", lambda x, n, w: x + torch.randn(n.a).isfinite(), SAME, {"a": 12}),
    Case("arange", lambda x, n, w: x * torch.arange(12), LOST, reason=COMPUTED_WITH),
    Case("linspace", lambda x, n, w: x * torch.linspace(0, 1, 12), LOST, reason=CONSTANT),
    Case("eye", lambda x, n, w: x @ torch.eye(12, dtype=x.dtype), LOST, reason=CONSTANT),
    Case("tril_indices", lambda x, n, w: x * torch.tril_indices(12, 1)[0], LOST, reason=CONSTANT),
    Case("triu_indices", lambda x, n, w: x * torch.triu_indices(1, 12)[1], LOST, reason=CONSTANT),
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
    Case(
        "mv",
        lambda x, n, w: x.flatten(0, 1).mv(w.w).unflatten(0, x.shape[:2])[..., None],
        {"up": "a", "head": "(1)", "w": "a"},
        columns=1,
        weights={"w": (12,)},
    ),
    Case(
        "dot",
        lambda x, n, w: x * w.w.dot(w.v),
        {**SAME, "w": "b", "v": "b"},
        weights={"w": (5,), "v": (5,)},
    ),
    Case(
        "transformers.grouped_mm_fallback",  # all tokens are the first expert's
        lambda x, n, w: torch.ops.transformers.grouped_mm_fallback(
            x.flatten(0, 1), w.w, torch.full((n.c,), x.shape[:2].numel(), dtype=torch.int32)
        ).unflatten(0, x.shape[:2]),
        {"up": "a", "head": "b", "w": "c, a, b"},
        {"c": 3},
        columns=5,
        weights={"w": (3, 12, 5)},
        numbers=False,
    ),
    Case(
        "_grouped_mm",
        lambda x, n, w: (
            torch._grouped_mm(
                x.flatten(0, 1).bfloat16(),
                w.w.bfloat16(),
                offs=torch.full((n.c,), x.shape[:2].numel(), dtype=torch.int32),
            )
            .unflatten(0, x.shape[:2])
            .to(x.dtype)
        ),
        {"up": "a", "head": "b", "w": "c, a, b"},
        {"c": 3},
        rows=16,
        columns=8,
        weights={"w": (3, 16, 8)},
        numbers=False,
    ),
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
    Case("linalg_solve_triangular", lambda x, n, w: solved(x), SAME),
    Case(
        "linalg_solve_triangular",
        lambda x, n, w: torch.linalg.solve_triangular(w.w, x, upper=True, left=False),
        {**LOST, "w": "frozen, frozen"},
        weights={"w": (12, 12)},
        reason="no rule for this use of the operator aten.linalg_solve_triangular",
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


def full_names(case: Case) -> set[str]:
    return {op if "." in op else f"aten.{op}" for op in case.ops.split()}


every_case = pytest.mark.parametrize("case", CASES, ids=names)


@every_case
def test_the_axes_that_an_operator_ties(case: Case) -> None:
    state, dims = inferred(case)
    names = letters(state, dims)
    recorded = {node.op.removesuffix("_") if node.in_place else node.op for node in state.graph.nodes}
    assert full_names(case) <= recorded
    shown = {name: ", ".join(show(lettered(dim, names)) for dim in dims[name]) for name in case.axes}
    shown |= {"up": show(lettered(dims["up"][0], names)), "head": show(lettered(dims["head"][1], names))}
    assert shown == case.axes
    if case.reason:
        frozen = {v for name in ("embed", *case.axes) for dim in dims[name] for v in variables_in(dim)}
        assert any(case.reason in (state.unifier.reason(variable) or "") for variable in frozen)
    sizes = {names[v.name]: v.size for dim in dims.values() for e in dim for v in variables_in(e) if v.name in names}
    assert case.units.items() <= sizes.items()


class OverKept(TorchDispatchMode):
    """Runs the operators of a dense model, each sum, statistic and choice across the positions that are kept."""

    def __init__(self, state: Inference, keep: dict[str, Sequence[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        ops = [node.op for node in state.graph.nodes]
        self.kept: dict[tuple[str, int], dict[int, Tensor]] = {}  # the n-th call of an operator -> dimension -> kept
        for reduction in state.reductions:
            positions = torch.tensor(kept_along(state.unifier.resolve(reduction.dim), keep))
            if len(positions) < reduction.dim.size:
                call = ops[reduction.node], ops[: reduction.node].count(ops[reduction.node])
                self.kept.setdefault(call, {})[reduction.tensor_dim] = positions
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        op = str(func).rpartition(".")[0]
        kept = self.kept.pop((op, self.calls[op]), {})
        self.calls[op] += 1
        return over_kept(op, func, kept, *args, **kwargs or {}) if kept else func(*args, **kwargs or {})


KEEPING_POSITIONS = ("aten._softmax", "aten._safe_softmax", "aten._log_softmax", "aten.native_layer_norm")


def over_kept(op: str, func: Any, kept: dict[int, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`func` of the kept positions of x; where they are among its results, all positions, with zeros for the others."""
    some = x
    for dim, positions in kept.items():
        some = some.index_select(dim, positions)
    if op == "aten.native_layer_norm":
        normalized, weight, bias, *others = args
        first = x.dim() - len(normalized)
        for dim, positions in kept.items():
            weight, bias = (w if w is None else w.index_select(dim - first, positions) for w in (weight, bias))
        args = (some.shape[first:], weight, bias, *others)
    result = func(some, *args, **kwargs)
    found = list(result) if isinstance(result, (list, tuple)) else [result]
    for i, value in enumerate(found):
        if value.dtype == torch.int64:  # numbers of the kept positions
            (positions,) = kept.values()
            found[i] = positions[value]
        elif op in KEEPING_POSITIONS and i == 0:
            indices = torch.meshgrid(*[kept.get(d, torch.arange(n)) for d, n in enumerate(x.shape)], indexing="ij")
            found[i] = torch.zeros_like(x).index_put(indices, value)
    return tuple(found) if isinstance(result, (list, tuple)) else found[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.numbers and case.axes != LOST], ids=names)
def test_the_cut_operator_computes_what_the_masked_one_does(case: Case) -> None:
    state, dims = inferred(case)
    names, weights = letters(state, dims), random_weights(case)
    variables = {v for dim in dims.values() for e in dim for v in variables_in(e) if v.name in names}
    chosen = random.Random(0)
    keep: dict[str, Sequence[int]] = {
        v.name: sorted(chosen.sample(range(v.size), (v.size + 1) // 2)) for v in sorted(variables, key=lambda v: v.name)
    }
    cut, masked = {}, {}
    for name, weight in weights.items():
        kept = torch.meshgrid(*[torch.tensor(kept_along(dim, keep)) for dim in dims[name]], indexing="ij")
        cut[name] = weight[kept]
        masked[name] = torch.zeros_like(weight).index_put(kept, cut[name])
    units_left = {names[v.name]: len(keep[v.name]) for v in variables}
    tokens, outputs = (torch.tensor(kept_along(dims[name][0], keep)) for name in ("embed", "head"))
    input_ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE)
    dense_ids = tokens[input_ids]
    with torch.no_grad():
        (small,) = OneOperator(case, case.units | units_left, cut)(input_ids)
        with OverKept(state, keep) as reference:
            (dense,) = OneOperator(case, case.units, masked)(dense_ids)
    assert not reference.kept  # every one of them was taken over what is kept
    torch.testing.assert_close(small, dense[..., outputs], rtol=0, atol=1e-10)
    assert dense.abs().max() > 0.1  # there is something to compare


@pytest.mark.parametrize("op", RULES)
def test_every_rule_has_a_case(op: str) -> None:
    stand_in = TAKEN_APART.get(op, op)
    assert any(stand_in in full_names(case) for case in CASES)
    assert RULES[op] is RULES[stand_in]
