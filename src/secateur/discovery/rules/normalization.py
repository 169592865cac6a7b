"""Norms: a mean, a variance or a root mean square across some dimensions, and weights of their shape."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.algebra import ONE, Fixed, product
from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference


@rule(*aten("native_layer_norm _fused_rms_norm rms_norm layer_norm"))
def layer_norm(state: Inference, node: Node) -> Sequence[Dims]:
    """A norm over the last dimensions, with weight and bias of their shape."""
    dims = state.argument(node, "input")
    first = len(dims) - len(node.arguments["normalized_shape"])
    for name in ("weight", "bias"):
        parameter = state.optional_argument(node, name)
        if parameter is not None:
            state.broadcast([dims[first:], parameter])
    state.record_reduction("statistic", range(first, len(dims)), dims)
    state.record_operation("norm", (Fixed(2), *dims))
    statistics = (*dims[:first], *[ONE for _ in dims[first:]])
    return [dims, *[statistics] * (len(node.outputs) - 1)]


@rule("aten.native_group_norm")
def group_norm(state: Inference, node: Node) -> Sequence[Dims]:
    """A norm over the channels of each group, (B, C, ...), with weight and bias (C)."""
    dims = list(state.argument(node, "input"))
    groups, inner = state.unifier.factor(dims[1], dims[1].size // node.arguments["group"])
    state.unifier.freeze(inner, "a group norm takes its statistics across it")
    dims[1] = product([groups, inner])
    for name in ("weight", "bias"):
        parameter = state.optional_argument(node, name)
        if parameter is not None:
            state.unifier.unify(dims[1], parameter[0])
    state.record_operation("norm", (Fixed(2), *dims))
    return [tuple(dims), *[(dims[0], groups)] * (len(node.outputs) - 1)]
