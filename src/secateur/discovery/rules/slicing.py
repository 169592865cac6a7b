"""Parts of a dimension by position: concatenation, splits, slices, padding, windows."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.algebra import Fixed, concat
from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, rule
from secateur.discovery.rules.state import Dims, Inference

PADDED = "the code pads it"
WINDOWS = "the code takes windows of it"
EVERY_STEP = "the code takes every other position of it"
ONE_POSITION = "the code takes one position of it"


@rule("aten.cat")
def cat(state: Inference, node: Node) -> Sequence[Dims]:
    """Parts one after another along one dimension; the others agree."""
    tensors = [state.dims_of(ref) for ref in node.arguments["tensors"]]
    tensors = [dims for dims in tensors if len(dims) != 1 or dims[0].size] or tensors[:1]  # empty tensors do not count
    along = node.arguments["dim"] % len(tensors[0])
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], other, strict=True)):
            if i != along:
                state.unifier.unify(a, b)
    result = list(tensors[0])
    result[along] = concat([dims[along] for dims in tensors])
    return [tuple(result)]


@rule("aten.stack")
def stack(state: Inference, node: Node) -> Sequence[Dims]:
    """Tensors side by side along a new dimension, whose positions the code addresses."""
    dims = list(state.broadcast([state.dims_of(ref) for ref in node.arguments["tensors"]]))
    dims.insert(node.arguments["dim"] % (len(dims) + 1), Fixed(len(node.arguments["tensors"])))
    return [tuple(dims)]


@rule(*aten("split split_with_sizes"))
def split(state: Inference, node: Node) -> Sequence[Dims]:
    """Parts of given sizes along one dimension."""
    dims = state.argument(node)
    along = node.arguments["dim"] % len(dims)
    sizes = [state.graph.shapes[number][along] for number in node.outputs]
    pieces = state.unifier.cut(dims[along], sizes)
    return [(*dims[:along], piece, *dims[along + 1 :]) for piece in pieces]


@rule("aten.slice")
def slice_(state: Inference, node: Node) -> Sequence[Dims]:
    """A run of positions of one dimension, or every step-th."""
    along = node.arguments["dim"] % len(state.output_shape(node))
    return [_sliced(state, node, state.output_shape(node)[along])]


@rule("aten.slice_scatter")
def slice_scatter(state: Inference, node: Node) -> Sequence[Dims]:
    """Values written to the positions that `slice` would read."""
    source = state.argument(node, "src")
    part = _sliced(state, node, source[node.arguments["dim"] % len(source)].size)
    for a, b in zip(part, source, strict=True):
        state.unifier.unify(a, b)
    return [state.argument(node)]


def _sliced(state: Inference, node: Node, length: int) -> Dims:
    dims = list(state.argument(node))
    along = node.arguments["dim"] % len(dims)
    whole = dims[along]
    start, end, step = slice(node.arguments["start"], node.arguments["end"], node.arguments["step"]).indices(whole.size)
    if step == 1:
        stop = max(start, end)
        dims[along] = state.unifier.cut(whole, [start, stop - start, whole.size - stop])[1]
    elif whole.size % step == 0 and start < step and end > whole.size - step + start:
        # One position of every run of `step`: the runs are units, the positions within them are the code's.
        dims[along], inner = state.unifier.factor(whole, step)
        state.unifier.freeze(inner, EVERY_STEP)
    else:
        state.unifier.freeze(whole, EVERY_STEP)
        dims[along] = state.unifier.variable(length, frozen=EVERY_STEP)
    return tuple(dims)


@rule(*aten("select unbind"))
def select(state: Inference, node: Node) -> Sequence[Dims]:
    """One position of one dimension, or all of them one by one: the code addresses each."""
    dims = list(state.argument(node))
    state.unifier.freeze(dims.pop(node.arguments["dim"] % len(dims)), ONE_POSITION)
    return [tuple(dims)] * len(node.outputs)


@rule("aten.constant_pad_nd")
def pad(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions added, or with a negative number taken away, at the ends of the last dimensions."""
    dims = list(state.argument(node))
    pads = node.arguments["pad"]
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        along = len(dims) - 1 - i
        removed_before, removed_after = max(-before, 0), max(-after, 0)
        kept = dims[along].size - removed_before - removed_after
        dim = state.unifier.cut(dims[along], [removed_before, kept, removed_after])[1]
        if state.unifier.is_frozen(dim) and dim.size > 1:
            dims[along] = state.unifier.variable(state.output_shape(node)[along], frozen=PADDED)
        else:
            dims[along] = concat([Fixed(max(before, 0)), dim, Fixed(max(after, 0))])
    return [tuple(dims)]


@rule("aten.unfold")
def unfold(state: Inference, node: Node) -> Sequence[Dims]:
    """Windows over a dimension: their number in its place, their positions in a new last one."""
    dims = list(state.argument(node))
    along = node.arguments["dimension"] % len(dims)
    state.unifier.freeze(dims[along], WINDOWS)
    shape = state.output_shape(node)
    dims[along] = state.unifier.variable(shape[along], frozen=WINDOWS)
    return [(*dims, state.unifier.variable(shape[-1], frozen=WINDOWS))]


@rule("aten.diagonal")
def diagonal(state: Inference, node: Node) -> Sequence[Dims]:
    """The positions where the indices of two dimensions agree."""
    dims = list(state.argument(node))
    first, second = (node.arguments[name] % len(dims) for name in ("dim1", "dim2"))
    for along in (first, second):
        state.unifier.freeze(dims[along], "the code takes its diagonal")
    kept = [dim for i, dim in enumerate(dims) if i not in (first, second)]
    return [(*kept, state.unifier.variable(state.output_shape(node)[-1], frozen="it is a diagonal"))]
