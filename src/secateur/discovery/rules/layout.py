"""Views and repetitions: the same elements with dimensions in another order, merged, split, added or repeated."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from secateur.discovery.algebra import ONE, Expression, product
from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, no_rule, rule
from secateur.discovery.rules.state import Dims, Inference


@rule(*aten("t transpose permute"))
def permute(state: Inference, node: Node) -> Sequence[Dims]:
    """Dimensions in another order."""
    dims = state.argument(node)
    if "dims" in node.arguments:
        return [tuple(dims[d] for d in node.arguments["dims"])]
    order = list(range(len(dims)))
    if len(order) >= 2:
        a, b = node.arguments.get("dim0", 0), node.arguments.get("dim1", 1)
        order[a], order[b] = order[b], order[a]
    return [tuple(dims[d] for d in order)]


@rule("aten.unsqueeze")
def unsqueeze(state: Inference, node: Node) -> Sequence[Dims]:
    """A new dimension of size 1."""
    dims = list(state.argument(node))
    dims.insert(node.arguments["dim"] % (len(dims) + 1), ONE)
    return [tuple(dims)]


@rule("aten.squeeze")
def squeeze(state: Inference, node: Node) -> Sequence[Dims]:
    """Dimensions of size 1 go, all of them or those that are named."""
    dims = state.argument(node)
    which = node.arguments.get("dim", tuple(range(len(dims))))
    which = {d % len(dims) for d in (which if isinstance(which, tuple) else (which,))} if dims else set()
    return [tuple(d for i, d in enumerate(dims) if i not in which or d.size != 1)]


@rule("aten.expand")
def expand(state: Inference, node: Node) -> Sequence[Dims]:
    """A dimension of size 1 repeated: new units that share what they come from."""
    dims = state.argument(node)
    shape = state.output_shape(node)
    padded = (ONE,) * (len(shape) - len(dims)) + dims
    result = []
    for dim, size in zip(padded, shape, strict=True):
        if dim.size != size:
            dim = state.unifier.variable(size)
            if state.depends_on_weights(node):
                state.repeated.append(dim)
        result.append(dim)
    return [tuple(result)]


@rule("aten.repeat")
def repeat(state: Inference, node: Node) -> Sequence[Dims]:
    """Whole copies one after another: a product with the number of copies outside."""
    repeats = node.arguments["repeats"]
    dims = state.argument(node)
    padded = (ONE,) * (len(repeats) - len(dims)) + dims
    copies = [state.unifier.variable(n) for n in repeats]
    if state.depends_on_weights(node):
        state.repeated += [copy for copy in copies if copy.size > 1]
    return [tuple(product(pair) for pair in zip(copies, padded, strict=True))]


@rule(*aten("view _unsafe_view reshape"))
def view(state: Inference, node: Node) -> Sequence[Dims]:
    """Runs of dimensions merge into products, or products split into factors, in row-major order."""
    dims = list(state.argument(node))
    shape = list(state.output_shape(node))
    if 0 in shape:
        return [state.new_dims(shape)]
    if prod(shape) != prod(d.size for d in dims):  # a view as another dtype
        return no_rule(state, node)
    result: list[Expression] = []
    # Take the shortest runs of dimensions, in and out, that hold equally many elements: (T, H·D) and (T, H, D) give
    # the runs T -> T and H·D -> H, D.
    while dims or shape:
        run_in, run_out = [dims.pop(0)] if dims else [], [shape.pop(0)] if shape else []
        while (a := prod(d.size for d in run_in)) != (b := prod(run_out)):
            if a < b:
                run_in.append(dims.pop(0))
            else:
                run_out.append(shape.pop(0))
        result += _split(state, run_in, run_out)
    return [tuple(result)]


def _split(state: Inference, run_in: list[Expression], run_out: list[int]) -> list[Expression]:
    """Write the product of `run_in` as factors of the sizes `run_out`."""
    outer: Expression = product(run_in)
    factors: list[Expression] = []
    for size in reversed(run_out):
        outer, inner = state.unifier.factor(outer, size)
        factors.insert(0, inner)
    return factors
