"""Positions chosen by a tensor of indices: lookups, gathers, scatters.

Indices that come from a choice among units (`topk`, `argmax`, `nonzero`) or that count them (`arange`) index these
units: the dimension that is looked up is unified with them, so an expert goes with its row of the router. Any other
index freezes the dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.algebra import Expression
from secateur.discovery.graph import Node, Ref
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference

LOOKED_UP = "its positions are looked up by number"
COMPUTED_WITH = "the code computes with the numbers of its positions"


@rule("aten.embedding")
def embedding(state: Inference, node: Node) -> Sequence[Dims]:
    """Rows of a table (V, D) by index."""
    rows, width = state.argument(node, "weight")
    look_up(state, node.arguments["indices"], rows, "its rows are looked up by number (an embedding)")
    state.embedding_tables.append(node.arguments["weight"].tensor)
    return [(*state.argument(node, "indices"), width)]


def look_up(state: Inference, indices: Ref, dim: Expression, reason: str = LOOKED_UP) -> bool:
    """Unify `dim` with what the indices are known to index, else freeze it; returns whether they are unified."""
    target = state.index_targets.get(indices.tensor)
    if target is not None:
        if unify_indexed(state, target, dim):
            return True
        state.unifier.freeze(target, reason)
    state.unifier.freeze(dim, reason)
    return False


def unify_indexed(state: Inference, a: Expression, b: Expression) -> bool:
    """Unify two dimensions that the same indices address, where one is at most one position longer than the other.

    That one position more is a code for "none of them": a router's extra score, or the class of `one_hot` for it.
    """
    shorter, longer = sorted((state.unifier.resolve(a), state.unifier.resolve(b)), key=lambda dim: dim.size)
    if longer.size - shorter.size > 1:
        return False
    _unify_start(state, shorter, longer)
    return True


def _unify_start(state: Inference, short: Expression, long: Expression) -> None:
    """Unify a dimension with the first positions of another."""
    state.unifier.unify(short, state.unifier.cut(long, [short.size, long.size - short.size])[0])


@rule(*aten("index _unsafe_index"))
def index(state: Inference, node: Node) -> Sequence[Dims]:
    """x[indices]: positions of some dimensions chosen by index tensors; the others stay."""
    return [_indexed(state, node, state.argument(node))]


@rule(*aten("index_put _unsafe_index_put"))
def index_put(state: Inference, node: Node) -> Sequence[Dims]:
    """Values written to the positions that `index` would read."""
    dims = state.argument(node)
    state.broadcast([_indexed(state, node, dims), state.argument(node, "values")])
    return [dims]


def _indexed(state: Inference, node: Node, dims: Dims) -> Dims:
    """The dimensions of `x[indices]` for a tensor x with these dimensions."""
    indices = node.arguments["indices"]
    chosen = [i for i, ref in enumerate(indices) if ref is not None]
    first = chosen[0]
    if len(chosen) == 1 and (run := _run(state.graph.literal_indices.get(indices[first].tensor, ()), dims[first].size)):
        # The code writes out neighbouring positions, x[..., [2, 3]]: that is a slice.
        pieces = state.unifier.cut(dims[first], [run.start, len(run), dims[first].size - run.stop])
        return (*dims[:first], pieces[1], *dims[first + 1 :])
    for i in chosen:
        known = look_up(state, indices[i], dims[i])
        if known and state.depends_on_weights(node):
            state.selected.append(dims[i])
    at = state.broadcast([state.dims_of(indices[i]) for i in chosen])
    # torch puts the indexed dimensions where the first one was, but to the front where others lie between them.
    others = [(i, dim) for i, dim in enumerate(dims) if i not in chosen]
    adjacent = chosen == list(range(first, chosen[-1] + 1))
    before = [dim for i, dim in others if adjacent and i < first]
    return (*before, *at, *[dim for _, dim in others[len(before) :]])


def _run(positions: Sequence[int], size: int) -> range | None:
    """Positions one after another as a range, else None."""
    first = positions[0] % size if positions else 0
    run = range(first, first + len(positions))
    return run if positions and [p % size for p in positions] == list(run) else None


@rule("aten.index_select")
def index_select(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of one dimension chosen by a list of indices."""
    dims = list(state.argument(node))
    along = node.arguments["dim"] % len(dims)
    if look_up(state, node.arguments["index"], dims[along]) and state.depends_on_weights(node):
        state.selected.append(dims[along])
    dims[along] = state.argument(node, "index")[0]
    return [tuple(dims)]


@rule(*aten("index_add index_copy"))
def index_add(state: Inference, node: Node) -> Sequence[Dims]:
    """Slices added to, or written to, the positions of one dimension that a list of indices names."""
    dims, source = state.argument(node), state.argument(node, "source")
    along = node.arguments["dim"] % len(dims)
    look_up(state, node.arguments["index"], dims[along])
    for i, (a, b) in enumerate(zip(dims, source, strict=True)):
        state.unifier.unify(b, state.argument(node, "index")[0] if i == along else a)
    return [dims]


@rule("aten.gather")
def gather(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of one dimension chosen element by element."""
    at = state.argument(node, "index")
    _look_up_elementwise(state, node, at)
    return [at]


@rule(*aten("scatter scatter_add scatter_reduce"))
def scatter(state: Inference, node: Node) -> Sequence[Dims]:
    """Values written to positions of one dimension, chosen element by element."""
    _look_up_elementwise(state, node, state.argument(node, "index"))
    source = state.optional_argument(node, "src")
    if source is not None:
        for a, b in zip(state.argument(node, "index"), source, strict=True):
            _unify_start(state, a, b)
    return [state.argument(node)]


def _look_up_elementwise(state: Inference, node: Node, at: Dims) -> None:
    """One dimension is looked up; along each other one the indices cover the first positions."""
    dims = state.argument(node)
    along = node.arguments["dim"] % len(dims)
    look_up(state, node.arguments["index"], dims[along])
    for i, (a, b) in enumerate(zip(at, dims, strict=True)):
        if i != along:
            _unify_start(state, a, b)


@rule("aten.nonzero")
def nonzero(state: Inference, node: Node) -> Sequence[Dims]:
    """Where a tensor is not zero: a row of indices for each place, one for each dimension."""
    dims = state.argument(node)
    if len(dims) == 1:
        state.index_targets[node.outputs[0]] = dims[0]
    else:  # one tensor with the indices of several dimensions
        for dim in dims:
            state.unifier.freeze(dim, COMPUTED_WITH)
    return [state.new_dims(state.output_shape(node), frozen="their number depends on the data")]
