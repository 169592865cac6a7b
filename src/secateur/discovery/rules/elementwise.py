"""Element-wise operators and copies: the output has the dimensions of the inputs, which agree under broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.algebra import Fixed
from secateur.discovery.graph import Node, references
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference


@rule(*aten("copy fill masked_fill zero polar"))  # which torch does not tag as element-wise
def pointwise(state: Inference, node: Node) -> Sequence[Dims]:
    """Any element-wise operator, registered or not: its tensors agree under broadcasting."""
    dims = state.broadcast([state.dims_of(ref) for ref in references(node.arguments.values())])
    return [dims] * len(node.outputs)


@rule(
    *aten("alias detach clone _to_copy contiguous lift_fresh dropout"),
    *aten("zeros_like ones_like full_like empty_like rand_like randn_like"),
)
def same(state: Inference, node: Node) -> Sequence[Dims]:
    """Copies, and tensors made like another."""
    return [state.argument(node)]


@rule(*aten("log_sigmoid_forward native_dropout"))
def same_with_by_product(state: Inference, node: Node) -> Sequence[Dims]:
    """An element-wise operator that also returns a buffer or a mask, of the same shape or empty."""
    dims = state.argument(node, "self" if "self" in node.arguments else "input")
    shape = tuple(dim.size for dim in dims)
    others = [dims if state.graph.shapes[number] == shape else state.new_dims((0,)) for number in node.outputs[1:]]
    return [dims, *others]


@rule("aten.view_as_complex")
def view_as_complex(state: Inference, node: Node) -> Sequence[Dims]:
    """(..., 2) -> (...): pairs of numbers in the last dimension become one complex number."""
    *dims, pair = state.argument(node)
    state.unifier.freeze(pair, "it is the real and imaginary part of complex numbers")
    return [tuple(dims)]


@rule("aten.view_as_real")
def view_as_real(state: Inference, node: Node) -> Sequence[Dims]:
    """(...) -> (..., 2): complex numbers become pairs."""
    return [(*state.argument(node), Fixed(2))]
