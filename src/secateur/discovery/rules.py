"""One rule per ATen operator: which dimensions of its tensors are equal.

A rule takes the inference so far and a node, unifies what the operator forces to agree, and returns the dimensions of
the outputs. To teach Secateur a new operator, write a function here and put its name in the decorator. An operator
without a rule freezes every dimension of its inputs, with a reason that names it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from secateur.discovery.algebra import ONE, Expression, Fixed, Unifier, concat, product, units_along, variables_in
from secateur.discovery.graph import Graph, Node, Ref

logger = logging.getLogger(__name__)

Dims = tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """Work that one operator does: `product of the sizes of dims` multiply-accumulates, of one kind."""

    kind: str  # "matmul", "norm", "softmax", "activation" or "rotary"
    dims: Dims
    module: str = ""  # whose forward does it


@dataclass(frozen=True, slots=True)
class Across:
    """A sum or a statistic that an operator takes across a dimension, or a choice that it makes among its positions.

    Such a dimension can be cut; the sum, the statistic or the choice is then over the units that stay.
    """

    node: int  # of the graph
    along: int  # which dimension of its first tensor
    dim: Expression
    what: str  # "sum", "statistic" or "choice"
    least: int = 1  # positions that the choice needs


@dataclass(slots=True)
class Inference:
    """The dimensions of every tensor seen so far, and what the operators told about them."""

    graph: Graph
    unifier: Unifier = field(default_factory=Unifier)
    dims: dict[int, Dims] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    expanded: list[Expression] = field(default_factory=list)  # made by repeating something of size 1
    across: list[Across] = field(default_factory=list)  # in the order of the operators
    picked: list[Expression] = field(default_factory=list)  # of these weights, a choice picks
    points: dict[int, Expression] = field(default_factory=dict)  # tensor of numbers -> the dimension they number
    compared: list[tuple[Expression, int]] = field(default_factory=list)  # the units, and the number
    vocabulary: Expression = ONE  # the tokens, which the inputs number
    mixed: list[Expression] = field(default_factory=list)  # number what mixes the sequence other than by a softmax
    scored: list[Expression] = field(default_factory=list)  # number the attention scores that a softmax takes
    tables: list[int] = field(default_factory=list)  # weights whose rows are looked up
    from_weights: set[int] = field(default_factory=set)  # tensors that depend on a weight
    from_angles: set[int] = field(default_factory=set)  # tensors that depend on a sine or cosine
    from_inputs: set[int] = field(default_factory=set)  # tensors that depend on the tokens
    products: set[int] = field(default_factory=set)  # tensors that depend on a product of two such, and on no later one
    module: str = ""  # whose forward the current node belongs to
    node: int = 0  # the current node, by number

    def of(self, value: Any) -> Dims:
        """The dimensions of a tensor argument, in normal form."""
        return tuple(self.unifier.resolve(d) for d in self.dims[value.tensor])

    def fresh(self, shape: Iterable[int], *, frozen: str | None = None) -> Dims:
        """New dimensions of the given sizes."""
        return tuple(self.unifier.variable(size, frozen=frozen) for size in shape)

    def shape(self, node: Node, output: int = 0) -> tuple[int, ...]:
        """The sizes of an output of the node."""
        return self.graph.shapes[node.outputs[output]]

    def takes(self, what: str, along: Iterable[int], dims: Dims, *, least: int = 1) -> None:
        """Write down that the current operator takes a sum, a statistic or a choice across dimensions of a tensor."""
        for dim in along:
            self.across.append(Across(self.node, dim % len(dims), dims[dim], what, least))

    def work(self, kind: str, dims: Iterable[Expression]) -> None:
        """Write down the multiply-accumulates of an operator."""
        self.operations.append(Operation(kind, tuple(dims), self.module))


Rule = Callable[[Inference, Node], Sequence[Dims]]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def apply(state: Inference, node: Node) -> None:
    """Run the rule of one node and store the dimensions of its outputs."""
    inputs = list(references(node.arguments.values()))
    name = node.op.removesuffix("_") if node.in_place else node.op
    chosen = RULES.get(name) or (pointwise if node.pointwise else no_rule)
    state.module = node.module
    _follow(state, node, name, inputs)
    _carry(state, node, name)
    for number, dims in zip(node.outputs, _dims_by(chosen, state, node), strict=True):
        if number in state.dims:  # written in place
            for old, new in zip(state.of(Ref(number)), dims, strict=True):
                state.unifier.unify(old, new)
        else:
            state.dims[number] = dims


def _dims_by(chosen: Rule, state: Inference, node: Node) -> Sequence[Dims]:
    """What the rule says of the outputs; where it does not cover a use of the operator, all is frozen instead."""
    wanted = [state.graph.shapes[number] for number in node.outputs]
    try:
        found = chosen(state, node)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        logger.debug("the rule of %s failed in %s: %s", node.op, node.module, error)
        return no_rule(state, node)
    if [tuple(dim.size for dim in dims) for dims in found] != wanted:
        logger.debug("the rule of %s gives other sizes than %s in %s", node.op, wanted, node.module)
        return no_rule(state, node)
    return found


def references(values: Iterable[Any]) -> Iterator[Ref]:
    """The tensors among the arguments, also inside lists."""
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, tuple):
            yield from references(value)


def _follow(state: Inference, node: Node, name: str, inputs: list[Ref]) -> None:
    """Note which outputs come from weights and which from sines and cosines; count the work of the small operators."""
    weighty = [ref for ref in inputs if ref.tensor in state.from_weights]
    angular = [ref for ref in inputs if ref.tensor in state.from_angles]
    if weighty:
        state.from_weights.update(node.outputs)
    elif angular or name in ("aten.cos", "aten.sin", "aten.polar"):
        state.from_angles.update(node.outputs)
    told = [ref for ref in inputs if ref.tensor in state.from_inputs]
    if told:
        state.from_inputs.update(node.outputs)
    if name in ("aten.bmm", "aten.baddbmm"):
        if len(told) >= 2:
            state.products.update(node.outputs)
    elif name not in ("aten.mm", "aten.addmm") and any(ref.tensor in state.products for ref in inputs):
        state.products.update(node.outputs)
    if name == "aten.mul" and weighty and angular:
        state.work("rotary", state.of(max(weighty, key=lambda ref: prod(state.graph.shapes[ref.tensor]))))
    if name in ACTIVATIONS and weighty:
        state.work("activation", state.of(node.arguments["self"]))


def _carry(state: Inference, node: Node, name: str) -> None:
    """Numbers of units stay such when they are copied, picked, or put in another order; else the units freeze."""
    used = [value for argument, value in node.arguments.items() if argument not in ("index", "indices")]
    found = [state.unifier.resolve(state.points[r.tensor]) for r in references(used) if r.tensor in state.points]
    if name == "aten.eq" and len(found) == 2 and not state.unifier.is_frozen(found[0]):  # which units are the same
        shorter, longer = sorted(found, key=lambda units: units.size)
        if longer.size - shorter.size <= 1:  # one position more than there are units is a code for "none of them"
            state.unifier.unify(shorter, state.unifier.cut(longer, [shorter.size, longer.size - shorter.size])[0])
            return
    if found and name in CARRYING:
        state.points.update(dict.fromkeys(node.outputs, found[0]))
    if name in COMPARISONS and isinstance(number := node.arguments["other"], (int, float)):
        state.compared += [(units, int(number)) for units in found]
    elif name not in CARRYING | MADE_LIKE or len(set(found)) > 1:
        for units in found:
            state.unifier.freeze(units, COMPUTED_WITH)


def _freeze_what_is_compared(state: Inference) -> None:
    """Freeze units whose numbers are compared with one of theirs; one more may stand for "none", and tokens have names.

    The number of a token that the code compares with comes from the config, and so can follow a cut.
    """
    for units, number in state.compared:
        units = state.unifier.resolve(units)
        if 0 <= number < units.size and units != state.unifier.resolve(state.vocabulary):
            for variable in variables_in(units):
                if units_along(units, variable.name)[number] >= 0:
                    state.unifier.freeze(variable, COMPUTED_WITH)


COMPARISONS = frozenset(f"aten.{name}" for name in "eq ne lt le gt ge".split())
MADE_LIKE = frozenset(
    f"aten.{name}"
    for name in (
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty".split()
    )
)

CARRYING = frozenset(
    f"aten.{name}"
    for name in (
        "view _unsafe_view reshape alias detach clone _to_copy contiguous lift_fresh t transpose permute unsqueeze "
        "squeeze expand repeat cat stack split split_with_sizes slice select unbind index index_select gather sort "
        "where clamp masked_fill index_put flip"
    ).split()
)

ACTIVATIONS = frozenset(
    f"aten.{name}" for name in "silu gelu relu sigmoid tanh elu leaky_relu mish softplus hardswish hardsigmoid".split()
)


def no_rule(state: Inference, node: Node) -> Sequence[Dims]:
    """Freeze everything that an unknown operator touches."""
    reason = f"there is no rule for this use of the operator {node.op} (in {node.module or 'the model'})"
    for ref in references(node.arguments.values()):
        for dim in state.of(ref):
            state.unifier.freeze(dim, reason)
    return [state.fresh(state.graph.shapes[number], frozen=reason) for number in node.outputs]


def broadcast(state: Inference, tensors: Sequence[Dims]) -> Dims:
    """Unify the dimensions of tensors aligned at the right; a dimension of size 1 agrees with any."""
    result: list[Expression] = []
    for position in range(max((len(dims) for dims in tensors), default=0), 0, -1):
        here = [dims[-position] for dims in tensors if len(dims) >= position and dims[-position].size != 1]
        for other in here[1:]:
            state.unifier.unify(here[0], other)
        result.append(state.unifier.resolve(here[0]) if here else ONE)
    return tuple(result)


@rule("aten.copy", "aten.fill", "aten.masked_fill", "aten.zero", "aten.polar")  # torch does not tag these so
def pointwise(state: Inference, node: Node) -> Sequence[Dims]:
    """Any element-wise operator: its tensors agree under broadcasting."""
    return [broadcast(state, [state.of(ref) for ref in references(node.arguments.values())])] * len(node.outputs)


# --- the same dimensions, or fewer, or in another order ---------------------------------------------------------


@rule(
    *"aten.alias aten.detach aten.clone aten._to_copy aten.contiguous aten.lift_fresh aten.dropout".split(),
    *"aten.zeros_like aten.ones_like aten.full_like aten.empty_like aten.rand_like aten.randn_like".split(),
)
def same(state: Inference, node: Node) -> Sequence[Dims]:
    """Copies and tensors made like another."""
    return [state.of(node.arguments["self"])]


@rule("aten.log_sigmoid_forward", "aten.native_dropout")
def same_and_more(state: Inference, node: Node) -> Sequence[Dims]:
    """An element-wise operator with a by-product."""
    dims = state.of(node.arguments.get("self", node.arguments.get("input")))
    others = [dims if state.graph.shapes[n] == _sizes(dims) else state.fresh((0,)) for n in node.outputs[1:]]
    return [dims, *others]


def _sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(dim.size for dim in dims)


@rule("aten.view_as_complex")
def view_as_complex(state: Inference, node: Node) -> Sequence[Dims]:
    """Pairs of numbers in the last dimension become one complex number."""
    *dims, pair = state.of(node.arguments["self"])
    state.unifier.freeze(pair, "it is the real and imaginary part of complex numbers")
    return [tuple(dims)]


@rule("aten.view_as_real")
def view_as_real(state: Inference, node: Node) -> Sequence[Dims]:
    """Complex numbers become pairs in a new last dimension."""
    return [(*state.of(node.arguments["self"]), Fixed(2))]


@rule("aten.t", "aten.transpose", "aten.permute")
def permute(state: Inference, node: Node) -> Sequence[Dims]:
    """Dimensions in another order."""
    dims = state.of(node.arguments["self"])
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
    dims = list(state.of(node.arguments["self"]))
    dims.insert(node.arguments["dim"] % (len(dims) + 1), ONE)
    return [tuple(dims)]


@rule("aten.squeeze")
def squeeze(state: Inference, node: Node) -> Sequence[Dims]:
    """Dimensions of size 1 go."""
    dims = state.of(node.arguments["self"])
    which = node.arguments.get("dim", tuple(range(len(dims))))
    which = {d % len(dims) for d in (which if isinstance(which, tuple) else (which,))} if dims else set()
    return [tuple(d for i, d in enumerate(dims) if i not in which or d.size != 1)]


@rule("aten.expand")
def expand(state: Inference, node: Node) -> Sequence[Dims]:
    """A dimension of size 1 repeated: new units that share what they come from."""
    dims = state.of(node.arguments["self"])
    shape = state.shape(node)
    padded = (ONE,) * (len(shape) - len(dims)) + dims
    result = []
    for dim, size in zip(padded, shape, strict=True):
        if dim.size != size:
            dim = state.unifier.variable(size)
            if node.arguments["self"].tensor in state.from_weights:
                state.expanded.append(dim)
        result.append(dim)
    return [tuple(result)]


@rule("aten.repeat")
def repeat(state: Inference, node: Node) -> Sequence[Dims]:
    """Whole copies one after another: a product with the number of copies outside."""
    repeats = node.arguments["repeats"]
    dims = state.of(node.arguments["self"])
    padded = (ONE,) * (len(repeats) - len(dims)) + dims
    copies = [state.unifier.variable(n) for n in repeats]
    if node.arguments["self"].tensor in state.from_weights:
        state.expanded += [copy for copy in copies if copy.size > 1]
    return [tuple(product(pair) for pair in zip(copies, padded, strict=True))]


@rule("aten.view", "aten._unsafe_view", "aten.reshape")
def view(state: Inference, node: Node) -> Sequence[Dims]:
    """Runs of dimensions merge into products, or products split into factors, in row-major order."""
    dims = list(state.of(node.arguments["self"]))
    shape = list(state.shape(node))
    if 0 in shape:
        return [state.fresh(shape)]
    if prod(shape) != prod(d.size for d in dims):  # a view as another dtype
        return no_rule(state, node)
    result: list[Expression] = []
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


# --- parts and positions ----------------------------------------------------------------------------------------


@rule("aten.cat")
def cat(state: Inference, node: Node) -> Sequence[Dims]:
    """Parts one after another along one dimension; the others agree."""
    tensors = [state.of(ref) for ref in node.arguments["tensors"]]
    tensors = [dims for dims in tensors if len(dims) != 1 or dims[0].size] or tensors[:1]
    along = node.arguments["dim"] % len(tensors[0])
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], other, strict=True)):
            if i != along:
                state.unifier.unify(a, b)
    result = list(tensors[0])
    result[along] = concat([dims[along] for dims in tensors])
    return [tuple(state.unifier.resolve(dim) for dim in result)]


@rule("aten.stack")
def stack(state: Inference, node: Node) -> Sequence[Dims]:
    """Tensors side by side along a new dimension, whose positions are the code's."""
    dims = list(broadcast(state, [state.of(ref) for ref in node.arguments["tensors"]]))
    dims.insert(node.arguments["dim"] % (len(dims) + 1), Fixed(len(node.arguments["tensors"])))
    return [tuple(dims)]


@rule("aten.split", "aten.split_with_sizes")
def split(state: Inference, node: Node) -> Sequence[Dims]:
    """Parts of given sizes along one dimension."""
    dims = state.of(node.arguments["self"])
    along = node.arguments["dim"] % len(dims)
    sizes = [state.graph.shapes[number][along] for number in node.outputs]
    pieces = state.unifier.cut(dims[along], sizes)
    return [(*dims[:along], piece, *dims[along + 1 :]) for piece in pieces]


@rule("aten.slice")
def slice_(state: Inference, node: Node) -> Sequence[Dims]:
    """A run of positions of one dimension, or every step-th."""
    along = node.arguments["dim"] % len(state.shape(node))
    return [_sliced(state, node, state.shape(node)[along])]


@rule("aten.slice_scatter")
def slice_scatter(state: Inference, node: Node) -> Sequence[Dims]:
    """Values written to the positions that `slice` would read."""
    source = state.of(node.arguments["src"])
    part = _sliced(state, node, source[node.arguments["dim"] % len(source)].size)
    for a, b in zip(part, source, strict=True):
        state.unifier.unify(a, b)
    return [state.of(node.arguments["self"])]


def _sliced(state: Inference, node: Node, length: int) -> Dims:
    dims = list(state.of(node.arguments["self"]))
    along = node.arguments["dim"] % len(dims)
    whole = dims[along]
    start, end, step = slice(node.arguments["start"], node.arguments["end"], node.arguments["step"]).indices(whole.size)
    if step == 1:
        stop = max(start, end)
        dims[along] = state.unifier.cut(whole, [start, stop - start, whole.size - stop])[1]
    elif whole.size % step == 0 and start < step and end > whole.size - step + start:
        dims[along], inner = state.unifier.factor(whole, step)
        state.unifier.freeze(inner, EVERY_STEP)
    else:
        state.unifier.freeze(whole, EVERY_STEP)
        dims[along] = state.unifier.variable(length, frozen=EVERY_STEP)
    return tuple(dims)


@rule("aten.select")
def select(state: Inference, node: Node) -> Sequence[Dims]:
    """One position of one dimension, which is thereby the code's to choose."""
    dims = list(state.of(node.arguments["self"]))
    state.unifier.freeze(dims.pop(node.arguments["dim"] % len(dims)), AT_POSITION)
    return [tuple(dims)]


@rule("aten.unbind")
def unbind(state: Inference, node: Node) -> Sequence[Dims]:
    """All positions of one dimension, one by one."""
    dims = list(state.of(node.arguments["self"]))
    state.unifier.freeze(dims.pop(node.arguments["dim"] % len(dims)), AT_POSITION)
    return [tuple(dims)] * len(node.outputs)


@rule("aten.embedding")
def embedding(state: Inference, node: Node) -> Sequence[Dims]:
    """Rows of a table by number."""
    rows, width = state.of(node.arguments["weight"])
    look_up(state, node.arguments["indices"], rows, "its rows are looked up by number (an embedding)")
    state.tables.append(node.arguments["weight"].tensor)
    return [(*state.of(node.arguments["indices"]), width)]


def look_up(state: Inference, numbers: Ref, dim: Expression, reason: str | None = None) -> bool:
    """Positions of `dim` are chosen by a tensor of numbers: the dimension that these number, or frozen."""
    target = state.points.get(numbers.tensor)
    if target is not None:
        target, dim = state.unifier.resolve(target), state.unifier.resolve(dim)
        shorter, longer = sorted((target, dim), key=lambda d: d.size)
        # One position more than there are units is a code for "none of them".
        if longer.size - shorter.size <= 1:
            state.unifier.unify(shorter, state.unifier.cut(longer, [shorter.size, longer.size - shorter.size])[0])
            return True
        state.unifier.freeze(target, reason or LOOKED_UP)
    state.unifier.freeze(dim, reason or LOOKED_UP)
    return False


@rule("aten.index", "aten._unsafe_index")
def index(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of some dimensions chosen by index tensors; the others stay."""
    return [_indexed(state, node, state.of(node.arguments["self"]))]


def _indexed(state: Inference, node: Node, dims: Dims) -> Dims:
    """The dimensions of `x[indices]` for a tensor x with these dimensions."""
    indices = node.arguments["indices"]
    chosen = [i for i, ref in enumerate(indices) if ref is not None]
    if len(chosen) == 1 and (run := _run(state.graph.values.get(indices[chosen[0]].tensor, ()), dims[chosen[0]].size)):
        pieces = state.unifier.cut(dims[chosen[0]], [run.start, len(run), dims[chosen[0]].size - run.stop])
        return (*dims[: chosen[0]], pieces[1], *dims[chosen[0] + 1 :])
    for i in chosen:
        known = look_up(state, indices[i], dims[i])
        if known and node.arguments["self"].tensor in state.from_weights:
            state.picked.append(dims[i])
    at = broadcast(state, [state.of(indices[i]) for i in chosen])
    others = [(i, dim) for i, dim in enumerate(dims) if i not in chosen]
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    before = [dim for i, dim in others if adjacent and i < chosen[0]]
    return tuple(state.unifier.resolve(d) for d in (*before, *at, *[dim for _, dim in others[len(before) :]]))


def _run(positions: Sequence[int], size: int) -> range | None:
    """Positions one after another as a range, else None."""
    first = positions[0] % size if positions else 0
    run = range(first, first + len(positions))
    return run if positions and [p % size for p in positions] == list(run) else None


@rule("aten.index_put", "aten._unsafe_index_put")
def index_put(state: Inference, node: Node) -> Sequence[Dims]:
    """Values written to the positions that `index` would read."""
    dims = state.of(node.arguments["self"])
    broadcast(state, [_indexed(state, node, dims), state.of(node.arguments["values"])])
    return [tuple(state.unifier.resolve(dim) for dim in dims)]


@rule("aten.index_select")
def index_select(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of one dimension chosen by a list of numbers."""
    dims = list(state.of(node.arguments["self"]))
    along = node.arguments["dim"] % len(dims)
    if look_up(state, node.arguments["index"], dims[along]) and node.arguments["self"].tensor in state.from_weights:
        state.picked.append(dims[along])
    dims[along] = state.of(node.arguments["index"])[0]
    return [tuple(state.unifier.resolve(dim) for dim in dims)]


@rule("aten.index_add", "aten.index_copy")
def index_add(state: Inference, node: Node) -> Sequence[Dims]:
    """Slices added to the positions of one dimension that a list of numbers names."""
    dims, source = state.of(node.arguments["self"]), state.of(node.arguments["source"])
    along = node.arguments["dim"] % len(dims)
    look_up(state, node.arguments["index"], dims[along])
    for i, (a, b) in enumerate(zip(dims, source, strict=True)):
        state.unifier.unify(b, state.of(node.arguments["index"])[0] if i == along else a)
    return [tuple(state.unifier.resolve(dim) for dim in dims)]


@rule("aten.gather")
def gather(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of one dimension chosen element by element."""
    dims, at = state.of(node.arguments["self"]), state.of(node.arguments["index"])
    along = node.arguments["dim"] % len(dims)
    look_up(state, node.arguments["index"], dims[along])
    _unify_beginnings(state, at, dims, along)
    return [tuple(state.unifier.resolve(dim) for dim in at)]


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(state: Inference, node: Node) -> Sequence[Dims]:
    """Values written to positions of one dimension, chosen element by element."""
    dims, at = state.of(node.arguments["self"]), state.of(node.arguments["index"])
    along = node.arguments["dim"] % len(dims)
    look_up(state, node.arguments["index"], dims[along])
    _unify_beginnings(state, at, dims, along)
    if node.arguments.get("src") is not None:
        _unify_beginnings(state, state.of(node.arguments["index"]), state.of(node.arguments["src"]), None)
    return [state.of(node.arguments["self"])]


def _unify_beginnings(state: Inference, short: Dims, long: Dims, along: int | None) -> None:
    """Unify each dimension but one with the first positions of another."""
    for i, (a, b) in enumerate(zip(short, long, strict=True)):
        if i != along:
            state.unifier.unify(a, state.unifier.cut(b, [a.size, b.size - a.size])[0])


@rule("aten.nonzero")
def nonzero(state: Inference, node: Node) -> Sequence[Dims]:
    """Where a tensor is not zero: a row of numbers for each place, one for each dimension."""
    dims = state.of(node.arguments["self"])
    if len(dims) == 1:
        state.points[node.outputs[0]] = dims[0]
    else:  # one tensor of numbers of several dimensions
        for dim in dims:
            state.unifier.freeze(dim, COMPUTED_WITH)
    return [state.fresh(state.shape(node), frozen="their number depends on the data")]


@rule("aten.constant_pad_nd")
def pad(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions added, or taken away, at the ends of the last dimensions."""
    dims = list(state.of(node.arguments["self"]))
    pads = node.arguments["pad"]
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        along = len(dims) - 1 - i
        dim = state.unifier.cut(
            dims[along], [max(-before, 0), dims[along].size + min(before, 0) + min(after, 0), max(-after, 0)]
        )[1]
        if state.unifier.is_frozen(dim) and dim.size > 1:
            dims[along] = state.unifier.variable(state.shape(node)[along], frozen=PADDED)
        else:
            dims[along] = concat([Fixed(max(before, 0)), dim, Fixed(max(after, 0))])
    return [tuple(dims)]


@rule("aten.unfold")
def unfold(state: Inference, node: Node) -> Sequence[Dims]:
    """Windows over a dimension: their number in its place, their positions in a new last one."""
    dims = list(state.of(node.arguments["self"]))
    along = node.arguments["dimension"] % len(dims)
    state.unifier.freeze(dims[along], WINDOWS)
    shape = state.shape(node)
    dims[along] = state.unifier.variable(shape[along], frozen=WINDOWS)
    return [(*dims, state.unifier.variable(shape[-1], frozen=WINDOWS))]


@rule("aten.diagonal")
def diagonal(state: Inference, node: Node) -> Sequence[Dims]:
    """The positions where two dimensions agree."""
    dims = list(state.of(node.arguments["self"]))
    first, second = (node.arguments[name] % len(dims) for name in ("dim1", "dim2"))
    for along in (first, second):
        state.unifier.freeze(dims[along], "the code takes its diagonal")
    kept = [dim for i, dim in enumerate(dims) if i not in (first, second)]
    return [(*kept, state.unifier.variable(state.shape(node)[-1], frozen="it is a diagonal"))]


@rule(
    *"aten.cumsum aten.cumprod aten.cummax aten.logcumsumexp aten.tril aten.triu aten.flip aten.roll aten.sort".split()
)
def in_order(state: Inference, node: Node) -> Sequence[Dims]:
    """Operators that depend on the order of positions along a dimension."""
    dims = state.of(node.arguments["self"])
    given = node.arguments.get("dim", node.arguments.get("dims", (-2, -1)))
    if given == ():  # `roll` runs through the flattened tensor
        given = tuple(range(len(dims)))
    for along in given if isinstance(given, tuple) else (given,):
        state.unifier.freeze(dims[along], f"{node.op} depends on the order of its positions")
    if node.op == "aten.sort":
        state.points[node.outputs[1]] = dims[given] if dims else ONE
    return [dims] * len(node.outputs)


# --- tensors made by the code -----------------------------------------------------------------------------------


@rule(
    *"aten.zeros aten.ones aten.full aten.empty aten.scalar_tensor aten.new_ones aten.new_zeros".split(),
    *"aten.new_full aten.new_empty aten.empty_permuted aten.rand aten.randn".split(),
)
def constant(state: Inference, node: Node) -> Sequence[Dims]:
    """Tensors with one value everywhere; nothing ties their dimensions."""
    return [state.fresh(state.shape(node))]


@rule("aten.arange")
def arange(state: Inference, node: Node) -> Sequence[Dims]:
    """0, 1, 2, ... number their own positions, until something is computed with them; any others are constants."""
    start, step = (node.arguments.get(name) for name in ("start", "step"))
    if start in (None, 0) and step in (None, 1):
        (dim,) = state.fresh(state.shape(node))
        state.points[node.outputs[0]] = dim
        return [(dim,)]
    return counting(state, node)


@rule("aten.linspace", "aten.eye", "aten.tril_indices", "aten.triu_indices")
def counting(state: Inference, node: Node) -> Sequence[Dims]:
    """Tensors whose values differ from position to position."""
    return [state.fresh(state.shape(node), frozen="the code makes a constant for each of its positions")]


# --- sums across a dimension ------------------------------------------------------------------------------------


def reduced(dims: Dims, along: Any, *, keep: bool) -> tuple[Dims, tuple[int, ...]]:
    """The dimensions after a reduction over `along` (None: over all), and the numbers of the ones reduced."""
    if along is None or along == ():
        along = tuple(range(len(dims)))
    which = {d % len(dims) for d in (along if isinstance(along, tuple) else (along,))} if dims else set()
    left = tuple(ONE if i in which else d for i, d in enumerate(dims) if keep or i not in which)
    return left, tuple(sorted(which))


@rule("aten.sum", "aten.mean", "aten.var", "aten.std", "aten.linalg_vector_norm", "aten.norm")
def reduction(state: Inference, node: Node) -> Sequence[Dims]:
    """Sums; a mean or a variance is the statistic of a norm."""
    dims = state.of(node.arguments["self"])
    left, across = reduced(dims, node.arguments.get("dim"), keep=bool(node.arguments.get("keepdim")))
    state.takes("sum" if node.op == "aten.sum" else "statistic", across, dims)
    if node.op != "aten.sum" and node.arguments["self"].tensor in state.from_weights:
        state.work("norm", (Fixed(2), *dims))
    return [left]


@rule(
    *"aten.amax aten.amin aten.max aten.min aten.argmax aten.argmin aten.any aten.all aten.topk aten.logsumexp".split()
)
def extremum(state: Inference, node: Node) -> Sequence[Dims]:
    """A choice among the units of a dimension; what chooses by number tells which units its numbers are of."""
    dims = state.of(node.arguments["self"])
    left, across = reduced(dims, node.arguments.get("dim"), keep=bool(node.arguments.get("keepdim")))
    least = node.arguments.get("k", 1)
    state.takes("choice", across, dims, least=least)
    if len(across) == 1 and node.op in ("aten.topk", "aten.max", "aten.min", "aten.argmax", "aten.argmin"):
        state.points[node.outputs[-1]] = dims[across[0]]
    if node.op == "aten.topk":
        kept = state.unifier.variable(least, frozen="it numbers what aten.topk has chosen")
        along = node.arguments["dim"] % len(dims)
        left = (*dims[:along], kept, *dims[along + 1 :])
    return [left] * len(node.outputs)


@rule("aten._softmax", "aten._safe_softmax", "aten._log_softmax")
def softmax(state: Inference, node: Node) -> Sequence[Dims]:
    """Attention scores, or a choice among experts."""
    dims = state.of(node.arguments["self"])
    along = node.arguments["dim"] % len(dims)
    state.takes("choice", [along], dims)
    # Among positions of the sequence, by a product of what stands there: not a gate for each channel.
    if state.unifier.is_frozen(dims[along]) and node.arguments["self"].tensor in state.products:
        state.scored += [dim for i, dim in enumerate(dims) if i != along]
    state.work("softmax", dims)
    return [dims]


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm", "aten.layer_norm")
def layer_norm(state: Inference, node: Node) -> Sequence[Dims]:
    """A norm over the last dimensions, with weights of their shape."""
    dims = state.of(node.arguments["input"])
    normed = dims[len(dims) - len(node.arguments["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if node.arguments.get(name) is not None:
            broadcast(state, [normed, state.of(node.arguments[name])])
    state.takes("statistic", range(len(dims) - len(normed), len(dims)), dims)
    state.work("norm", (Fixed(2), *dims))
    statistics = (*dims[: len(dims) - len(normed)], *[ONE for _ in normed])
    return [dims, *[statistics] * (len(node.outputs) - 1)]


@rule("aten.native_group_norm")
def group_norm(state: Inference, node: Node) -> Sequence[Dims]:
    """A norm over the channels of each group, (N, C, ...), with weights per channel."""
    dims = list(state.of(node.arguments["input"]))
    groups, inner = state.unifier.factor(dims[1], dims[1].size // node.arguments["group"])
    state.unifier.freeze(inner, "a group norm takes its statistics across it")
    dims[1] = product([groups, inner])
    for name in ("weight", "bias"):
        if node.arguments.get(name) is not None:
            state.unifier.unify(dims[1], state.of(node.arguments[name])[0])
    state.work("norm", (Fixed(2), *dims))
    resolved = tuple(state.unifier.resolve(dim) for dim in dims)
    return [resolved, *[(resolved[0], groups)] * (len(node.outputs) - 1)]


# --- products of matrices ---------------------------------------------------------------------------------------


@rule("aten.mm", "aten.bmm")
def matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """(…, M, K) times (…, K, N): the contracted dimensions agree, and so do the batches."""
    return [_contract(state, state.of(node.arguments["self"]), state.of(node.arguments["mat2"]))]


def _contract(state: Inference, left: Dims, right: Dims) -> Dims:
    batch = len(right) - 2 if len(right) > 2 else 0
    state.mixed += left[:batch]
    for a, b in zip(left[:batch], right[:batch], strict=True):
        state.unifier.unify(a, b)
    state.unifier.unify(left[-1], right[batch])
    state.work("matmul", (*left, *right[batch + 1 :]))
    return tuple(state.unifier.resolve(dim) for dim in (*left[:-1], *right[batch + 1 :]))


@rule("aten.mv", "aten.dot")
def matrix_vector(state: Inference, node: Node) -> Sequence[Dims]:
    """(M, K) or (K) times (K)."""
    left = state.of(node.arguments["self"])
    (right,) = state.of(node.arguments["vec" if "vec" in node.arguments else "tensor"])
    state.unifier.unify(left[-1], right)
    state.work("matmul", left)
    return [tuple(state.unifier.resolve(dim) for dim in left[:-1])]


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """Rows (S, K) sorted by expert times one (K, N) of each expert (E, K, N); `offs` (E) says where each ends."""
    tokens, inner = state.of(node.arguments["self" if "self" in node.arguments else "input"])
    experts, contracted, outer = state.of(node.arguments["mat2" if "mat2" in node.arguments else "weight"])
    state.unifier.unify(inner, contracted)
    state.unifier.unify(experts, state.of(node.arguments["offs"])[0])
    state.picked.append(experts)
    state.work("matmul", (tokens, inner, outer))
    return [(tokens, state.unifier.resolve(outer))]


@rule("aten.convolution")
def convolution(state: Inference, node: Node) -> Sequence[Dims]:
    """Input (B, C, ...) with weight (O, C / groups, ...): groups of channels read groups of channels."""
    if node.arguments["transposed"]:
        return no_rule(state, node)
    batch, channels, *_ = state.of(node.arguments["input"])
    weight = state.of(node.arguments["weight"])
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
    state.mixed.append(channels)
    out = product([written, outer])
    if node.arguments["bias"] is not None:
        state.unifier.unify(out, state.of(node.arguments["bias"])[0])
    shape = state.shape(node)
    space = [state.unifier.variable(size, frozen="a convolution runs along it") for size in shape[2:]]
    state.work("matmul", (batch, *space, *weight))
    return [(batch, state.unifier.resolve(product([written, outer])), *space)]


@rule("aten.linalg_solve_triangular")
def solve_triangular(state: Inference, node: Node) -> Sequence[Dims]:
    """A triangular system (..., N, N) solved for (..., N, K)."""
    matrix, right = state.of(node.arguments["self"]), state.of(node.arguments["B"])
    batch = broadcast(state, [matrix[:-2], right[:-2]])
    if not node.arguments["left"]:
        return no_rule(state, node)
    for dim in (*matrix[-2:], right[-2]):
        state.unifier.freeze(dim, "a triangular system orders its positions")
    state.work("matmul", (*batch, matrix[-2], *right[-2:]))
    return [(*batch, *right[-2:])]


@rule("aten.addmm", "aten.baddbmm")
def add_matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """A matrix product plus a bias that broadcasts."""
    left, right = ("mat1", "mat2") if "mat1" in node.arguments else ("batch1", "batch2")
    result = _contract(state, state.of(node.arguments[left]), state.of(node.arguments[right]))
    return [broadcast(state, [result, state.of(node.arguments["self"])])]


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
def attention(state: Inference, node: Node) -> Sequence[Dims]:
    """Fused attention of query (B, H, T, D), key (B, H, S, D) and value (B, H, S, E)."""
    query, key, value = (state.of(node.arguments[name]) for name in ("query", "key", "value"))
    kv, queries = state.unifier.factor(query[1], query[1].size // key[1].size)  # several heads may read the same keys
    for a, b in [(query[0], key[0]), (kv, key[1]), (query[3], key[3]), *zip(key[:3], value[:3], strict=True)]:
        state.unifier.unify(a, b)
    mask = node.arguments.get("attn_mask", node.arguments.get("attn_bias"))
    if mask is not None:
        broadcast(state, [(*query[:3], key[2]), state.of(mask)])
    state.unifier.freeze(key[2], ACROSS_SOFTMAX)
    state.expanded += [queries, queries]  # by the keys, and by the values
    state.scored += query[:2]
    state.work("matmul", (*query, key[2]))
    state.work("matmul", (*query[:3], *value[2:]))
    state.work("softmax", (*query[:3], key[2]))
    reason = f"it is a by-product of {node.op}"
    others = [state.fresh(state.graph.shapes[number], frozen=reason) for number in node.outputs[1:]]
    return [(*query[:3], value[3]), *others]


PADDED = "the code pads it"
WINDOWS = "the code takes windows of it"
ACROSS_SOFTMAX = "a softmax runs across it"
EVERY_STEP = "the code takes every other position of it"
AT_POSITION = "the code takes one position of it"
COMPUTED_WITH = "the code computes with the numbers of its positions"
LOOKED_UP = "its positions are looked up by number"


def infer(graph: Graph) -> Inference:
    """Give every tensor of the graph its dimensions.

    Batch and sequence are frozen as inputs, what the model returns as outputs, and buffers that the checkpoint does
    not hold as computed by the code.
    """
    state = Inference(graph)
    for number in graph.parameters.values():
        state.dims[number] = state.fresh(graph.shapes[number])
        state.from_weights.add(number)
    for name, number in graph.buffers.items():
        computed = f"the code computes the buffer {name}" if name in graph.computed_buffers else None
        state.dims[number] = state.fresh(graph.shapes[number], frozen=computed)
    for number in graph.constants:
        state.dims[number] = state.fresh(graph.shapes[number], frozen="it is a constant of the code")
    names = itertools.cycle(("batch", "sequence"))
    tokens = _tokens(graph)
    state.vocabulary = state.unifier.variable(tokens, prefix="vocabulary.") if tokens else ONE
    for number in graph.inputs.values():
        state.from_inputs.add(number)
        if tokens:
            state.points[number] = state.vocabulary
        state.dims[number] = tuple(
            state.unifier.variable(size, frozen="it is an input", prefix=f"{next(names)}.")
            for size in graph.shapes[number]
        )
    for state.node, node in enumerate(graph.nodes):
        apply(state, node)
    _freeze_what_is_compared(state)
    for number in graph.outputs:
        *dims, last = state.of(Ref(number))
        if last.size == tokens:  # the tokens that may come next
            state.unifier.unify(state.vocabulary, last)
        else:
            state.unifier.freeze(state.vocabulary, "the model takes other tokens than it returns")
            dims.append(last)
        for dim in dims:
            state.unifier.freeze(dim, "the model returns it")
    return state


def _tokens(graph: Graph) -> int:
    """Rows of the first table that the inputs are looked up in, 0 if there is none."""
    numbers = set(graph.inputs.values())
    rows = 0
    for node in graph.nodes:
        if node.op == "aten.embedding" and node.arguments["indices"].tensor in numbers:
            rows = graph.shapes[node.arguments["weight"].tensor][0]
            break
        if node.op in CARRYING and any(ref.tensor in numbers for ref in references(node.arguments.values())):
            numbers.update(node.outputs)
    return rows
