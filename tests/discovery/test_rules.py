"""What each operator's rule says of the weights around it, and that a model cut accordingly computes the same."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from operator_cases import (
    attention,
    convolution,
    creation,
    elementwise,
    indexing,
    layout,
    matmul,
    normalization,
    reduction,
    slicing,
    unknown,
)
from operator_cases.case import HIDDEN, LOST, VOCABULARY, Case
from secateur.discovery.algebra import Concat, Expression, Fixed, Product, Variable, kept_along, show, variables_in
from secateur.discovery.graph import Ref
from secateur.discovery.inference import infer
from secateur.discovery.joining import group_axes
from secateur.discovery.rules.registry import RULES
from secateur.discovery.rules.state import Inference
from secateur.discovery.tracing import trace

CASES = [
    *(*elementwise.CASES, *creation.CASES, *layout.CASES, *slicing.CASES, *indexing.CASES, *reduction.CASES),
    *(*normalization.CASES, *matmul.CASES, *convolution.CASES, *attention.CASES, *unknown.CASES),
]
BATCH, SEQUENCE = 3, 4  # of the runs with numbers


# --- a model of one operator ------------------------------------------------------------------------------------


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


@functools.cache
def inferred(number: int) -> tuple[Inference, dict[str, tuple[Expression, ...]]]:
    """The inference on the model of a case, and the dimensions of its weights."""
    case = CASES[number]
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
    state, dims = inferred(CASES.index(case))
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
        for each in state.reductions:
            positions = torch.tensor(kept_along(state.unifier.resolve(each.dim), keep))
            if len(positions) < each.dim.size:
                call = ops[each.node], ops[: each.node].count(ops[each.node])
                self.kept.setdefault(call, {})[each.tensor_dim] = positions
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
    state, dims = inferred(CASES.index(case))
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
