"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.algebra import product
from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import no_rule, rule
from secateur.discovery.rules.state import Dims, Inference


@rule("aten.convolution")
def convolution(state: Inference, node: Node) -> Sequence[Dims]:
    """Input (B, C, ...) with weight (O, C / groups, ...): groups of channels read groups of channels."""
    if node.arguments["transposed"]:
        return no_rule(state, node)
    batch, channels, *_ = state.argument(node, "input")
    weight = state.argument(node, "weight")
    groups = node.arguments["groups"]
    read, inner = state.unifier.factor(channels, channels.size // groups)
    written, outer = state.unifier.factor(weight[0], weight[0].size // groups)
    if groups == 1:
        state.unifier.unify(channels, weight[1])
    else:
        state.unifier.unify(read, written)
        state.unifier.unify(inner, weight[1])
    for dim in weight[2:]:
        state.unifier.freeze(dim, "it numbers the positions of a convolution's kernel")
    state.batched.append(channels)
    out = product([written, outer])
    bias = state.optional_argument(node, "bias")
    if bias is not None:
        state.unifier.unify(out, bias[0])
    space = state.new_dims(state.output_shape(node)[2:], frozen="a convolution runs along it")
    state.record_operation("matmul", (batch, *space, *weight))
    return [(batch, out, *space)]
