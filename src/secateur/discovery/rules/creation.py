"""Tensors that the code makes: constants, ranges, random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference


@rule(*aten("zeros ones full empty scalar_tensor new_ones new_zeros new_full new_empty empty_permuted rand randn"))
def filled(state: Inference, node: Node) -> Sequence[Dims]:
    """The same value (or a random one) at every position, so nothing ties its dimensions."""
    return [state.new_dims(state.output_shape(node))]


@rule("aten.arange")
def arange(state: Inference, node: Node) -> Sequence[Dims]:
    """0, 1, 2, ... index their own positions, until something is computed with them; other ranges are constants."""
    start, step = (node.arguments.get(name) for name in ("start", "step"))
    if start in (None, 0) and step in (None, 1):
        (dim,) = state.new_dims(state.output_shape(node))
        state.index_targets[node.outputs[0]] = dim
        return [(dim,)]
    return position_dependent(state, node)


@rule(*aten("linspace eye tril_indices triu_indices"))
def position_dependent(state: Inference, node: Node) -> Sequence[Dims]:
    """Another value at each position."""
    return [state.new_dims(state.output_shape(node), frozen="the code makes a constant for each of its positions")]
