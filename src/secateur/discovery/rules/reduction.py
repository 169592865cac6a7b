"""Sums, statistics, choices and cumulative operators along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.discovery.algebra import ONE, Fixed
from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference


def reduced(dims: Dims, along: Any, *, keep: bool) -> tuple[Dims, tuple[int, ...]]:
    """The dimensions after a reduction over `along` (None: over all), and the numbers of the ones reduced."""
    if along is None or along == ():
        along = tuple(range(len(dims)))
    which = {d % len(dims) for d in (along if isinstance(along, tuple) else (along,))} if dims else set()
    left = tuple(ONE if i in which else d for i, d in enumerate(dims) if keep or i not in which)
    return left, tuple(sorted(which))


@rule(*aten("sum mean var std linalg_vector_norm norm"))
def sums(state: Inference, node: Node) -> Sequence[Dims]:
    """Sums; a mean or a variance is the statistic of a norm."""
    dims = state.argument(node)
    left, along = reduced(dims, node.arguments.get("dim"), keep=bool(node.arguments.get("keepdim")))
    state.record_reduction("sum" if node.op == "aten.sum" else "statistic", along, dims)
    if node.op != "aten.sum" and state.depends_on_weights(node):
        state.record_operation("norm", (Fixed(2), *dims))
    return [left]


@rule(*aten("amax amin max min argmax argmin any all topk logsumexp"))
def choice(state: Inference, node: Node) -> Sequence[Dims]:
    """A choice among the units of a dimension; where it returns indices, they index these units."""
    dims = state.argument(node)
    left, across = reduced(dims, node.arguments.get("dim"), keep=bool(node.arguments.get("keepdim")))
    least = node.arguments.get("k", 1)
    state.record_reduction("choice", across, dims, least=least)
    if len(across) == 1 and node.op in aten("topk max min argmax argmin"):
        state.index_targets[node.outputs[-1]] = dims[across[0]]
    if node.op == "aten.topk":
        kept = state.unifier.variable(least, frozen="it numbers what aten.topk has chosen")
        along = node.arguments["dim"] % len(dims)
        left = (*dims[:along], kept, *dims[along + 1 :])
    return [left] * len(node.outputs)


@rule(*aten("_softmax _safe_softmax _log_softmax"))
def softmax(state: Inference, node: Node) -> Sequence[Dims]:
    """Attention scores, or a choice among experts."""
    dims = state.argument(node)
    along = node.arguments["dim"] % len(dims)
    state.record_reduction("choice", [along], dims)
    # Attention runs over positions of the text (a frozen dimension), on scores that are a product of two tensors made
    # from the tokens. A softmax over channels, or of one such tensor alone, is a gate.
    if state.unifier.is_frozen(dims[along]) and node.arguments["self"].tensor in state.input_products:
        state.beside_softmax += [dim for i, dim in enumerate(dims) if i != along]
    state.record_operation("softmax", dims)
    return [dims]


@rule(*aten("cumsum cumprod cummax logcumsumexp tril triu flip roll sort"))
def in_order(state: Inference, node: Node) -> Sequence[Dims]:
    """Operators that depend on the order of positions along a dimension."""
    dims = state.argument(node)
    given = node.arguments.get("dim", node.arguments.get("dims", (-2, -1)))
    if given == ():  # `roll` runs through the flattened tensor
        given = tuple(range(len(dims)))
    for along in given if isinstance(given, tuple) else (given,):
        state.unifier.freeze(dims[along], f"{node.op} depends on the order of its positions")
    if node.op == "aten.sort":
        state.index_targets[node.outputs[1]] = dims[given] if dims else ONE
    return [dims] * len(node.outputs)
