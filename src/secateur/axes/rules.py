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

from secateur.axes.algebra import ONE, Expression, Fixed, Unifier, concat, product
from secateur.graph import Graph, Node, Ref

logger = logging.getLogger(__name__)

Dims = tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """Work that one operator does: `product of the sizes of dims` multiply-accumulates, of one kind."""

    kind: str  # "matmul", "norm", "softmax", "activation" or "rotary"
    dims: Dims
    module: str = ""  # whose forward does it


@dataclass(slots=True)
class Inference:
    """The dimensions of every tensor seen so far, and what the operators told about them."""

    graph: Graph
    unifier: Unifier = field(default_factory=Unifier)
    dims: dict[int, Dims] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    expanded: list[Expression] = field(default_factory=list)  # made by repeating something of size 1
    averaged: list[Expression] = field(default_factory=list)  # a norm takes its statistics across these
    scored: list[Expression] = field(default_factory=list)  # number the attention scores that a softmax takes
    tables: list[int] = field(default_factory=list)  # weights whose rows are looked up
    from_weights: set[int] = field(default_factory=set)  # tensors that depend on a weight
    from_angles: set[int] = field(default_factory=set)  # tensors that depend on a sine or cosine
    module: str = ""  # whose forward the current node belongs to

    def of(self, value: Any) -> Dims:
        """The dimensions of a tensor argument, in normal form."""
        return tuple(self.unifier.resolve(d) for d in self.dims[value.tensor])

    def fresh(self, shape: Iterable[int], *, frozen: str | None = None) -> Dims:
        """New dimensions of the given sizes."""
        return tuple(self.unifier.variable(size, frozen=frozen) for size in shape)

    def shape(self, node: Node, output: int = 0) -> tuple[int, ...]:
        """The sizes of an output of the node."""
        return self.graph.shapes[node.outputs[output]]

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
    if name == "aten.mul" and weighty and angular:
        state.work("rotary", state.of(max(weighty, key=lambda ref: prod(state.graph.shapes[ref.tensor]))))
    if name in ACTIVATIONS and weighty:
        state.work("activation", state.of(node.arguments["self"]))


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


@rule("aten.copy", "aten.fill", "aten.masked_fill", "aten.zero")  # torch does not tag them where they write in place
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
        dims[along] = state.unifier.variable(state.shape(node)[along], frozen=EVERY_STEP)
    return [tuple(dims)]


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
    state.unifier.freeze(rows, "its rows are looked up by number (an embedding)")
    state.tables.append(node.arguments["weight"].tensor)
    return [(*state.of(node.arguments["indices"]), width)]


@rule("aten.index")
def index(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of some dimensions chosen by index tensors; the others stay."""
    dims = state.of(node.arguments["self"])
    indices = node.arguments["indices"]
    if len(state.shape(node)) != _indexed_rank(state, dims, indices):
        return no_rule(state, node)
    chosen = [i for i, ref in enumerate(indices) if ref is not None]
    for i in chosen:
        state.unifier.freeze(dims[i], LOOKED_UP)
    at = broadcast(state, [state.of(indices[i]) for i in chosen])
    others = [(i, dim) for i, dim in enumerate(dims) if i not in chosen]
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    before = [dim for i, dim in others if adjacent and i < chosen[0]]
    return [(*before, *at, *[dim for _, dim in others[len(before) :]])]


def _indexed_rank(state: Inference, dims: Dims, indices: Sequence[Any]) -> int:
    refs = [ref for ref in indices if ref is not None]
    return len(dims) - len(refs) + max((len(state.graph.shapes[ref.tensor]) for ref in refs), default=0)


@rule("aten.gather")
def gather(state: Inference, node: Node) -> Sequence[Dims]:
    """Positions of one dimension chosen element by element."""
    dims, at = state.of(node.arguments["self"]), state.of(node.arguments["index"])
    along = node.arguments["dim"] % len(dims)
    for i, (a, b) in enumerate(zip(dims, at, strict=True)):
        if i == along:
            state.unifier.freeze(a, LOOKED_UP)
        else:  # a shorter index reads the first positions
            state.unifier.unify(state.unifier.cut(a, [b.size, a.size - b.size])[0], b)
    return [at]


@rule("aten.cumsum", "aten.tril", "aten.triu", "aten.flip", "aten.roll", "aten.sort")
def in_order(state: Inference, node: Node) -> Sequence[Dims]:
    """Operators that depend on the order of positions along a dimension."""
    dims = state.of(node.arguments["self"])
    given = node.arguments.get("dim", node.arguments.get("dims", (-2, -1)))
    if given == ():  # `roll` runs through the flattened tensor
        given = tuple(range(len(dims)))
    for along in given if isinstance(given, tuple) else (given,):
        state.unifier.freeze(dims[along], f"{node.op} depends on the order of its positions")
    return [dims] * len(node.outputs)


# --- tensors made by the code -----------------------------------------------------------------------------------


@rule(
    *"aten.zeros aten.ones aten.full aten.empty aten.scalar_tensor aten.new_ones aten.new_zeros".split(),
    *"aten.new_full aten.new_empty".split(),
)
def constant(state: Inference, node: Node) -> Sequence[Dims]:
    """Tensors with one value everywhere; nothing ties their dimensions."""
    return [state.fresh(state.shape(node))]


@rule("aten.arange", "aten.linspace")
def counting(state: Inference, node: Node) -> Sequence[Dims]:
    """Tensors whose values differ from position to position."""
    return [state.fresh(state.shape(node), frozen="the code counts its positions (arange)")]


# --- sums across a dimension ------------------------------------------------------------------------------------


def reduced(dims: Dims, along: Any, *, keep: bool) -> tuple[Dims, Dims]:
    """The dimensions after a reduction over `along` (None: over all), and the ones reduced."""
    if along is None or along == ():
        along = tuple(range(len(dims)))
    which = {d % len(dims) for d in (along if isinstance(along, tuple) else (along,))} if dims else set()
    left = tuple(ONE if i in which else d for i, d in enumerate(dims) if keep or i not in which)
    return left, tuple(dims[i] for i in sorted(which))


@rule("aten.sum", "aten.mean", "aten.var", "aten.linalg_vector_norm")
def reduction(state: Inference, node: Node) -> Sequence[Dims]:
    """Sums; a mean or a variance is the statistic of a norm."""
    dims = state.of(node.arguments["self"])
    left, across = reduced(dims, node.arguments.get("dim"), keep=bool(node.arguments.get("keepdim")))
    if node.op != "aten.sum":
        state.averaged += across
        if node.arguments["self"].tensor in state.from_weights:
            state.work("norm", (Fixed(2), *dims))
    return [left]


@rule("aten.amax", "aten.amin", "aten.max", "aten.min", "aten.argmax", "aten.any", "aten.all", "aten.topk")
def extremum(state: Inference, node: Node) -> Sequence[Dims]:
    """A choice among the units of a dimension, which depends on which are there."""
    dims = state.of(node.arguments["self"])
    if node.arguments.get("other") is not None:
        return pointwise(state, node)
    reason = f"{node.op} chooses among its positions"
    left, across = reduced(dims, node.arguments.get("dim"), keep=bool(node.arguments.get("keepdim")))
    for dim in across:
        state.unifier.freeze(dim, reason)
    if node.op == "aten.topk":
        kept = state.unifier.variable(node.arguments["k"], frozen=reason)
        along = node.arguments["dim"] % len(dims)
        left = (*dims[:along], kept, *dims[along + 1 :])
    return [left] * len(node.outputs)


@rule("aten._softmax", "aten._safe_softmax", "aten._log_softmax")
def softmax(state: Inference, node: Node) -> Sequence[Dims]:
    """Attention scores, or a choice among experts: the dimension it runs across is frozen."""
    dims = state.of(node.arguments["self"])
    along = node.arguments["dim"] % len(dims)
    state.unifier.freeze(dims[along], ACROSS_SOFTMAX)
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
    state.averaged += normed
    state.work("norm", (Fixed(2), *dims))
    statistics = (*dims[: len(dims) - len(normed)], *[ONE for _ in normed])
    return [dims, *[statistics] * (len(node.outputs) - 1)]


# --- products of matrices ---------------------------------------------------------------------------------------


@rule("aten.mm", "aten.bmm")
def matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """(…, M, K) times (…, K, N): the contracted dimensions agree, and so do the batches."""
    return [_contract(state, state.of(node.arguments["self"]), state.of(node.arguments["mat2"]))]


def _contract(state: Inference, left: Dims, right: Dims) -> Dims:
    batch = len(right) - 2 if len(right) > 2 else 0
    for a, b in zip(left[:batch], right[:batch], strict=True):
        state.unifier.unify(a, b)
    state.unifier.unify(left[-1], right[batch])
    state.work("matmul", (*left, *right[batch + 1 :]))
    return tuple(state.unifier.resolve(dim) for dim in (*left[:-1], *right[batch + 1 :]))


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
    state.expanded.append(queries)
    state.scored += query[:2]
    state.work("matmul", (*query, key[2]))
    state.work("matmul", (*query[:3], *value[2:]))
    state.work("softmax", (*query[:3], key[2]))
    reason = f"it is a by-product of {node.op}"
    others = [state.fresh(state.graph.shapes[number], frozen=reason) for number in node.outputs[1:]]
    return [(*query[:3], value[3]), *others]


ACROSS_SOFTMAX = "a softmax runs across it"
EVERY_STEP = "the code takes every other position of it"
AT_POSITION = "the code takes one position of it"
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
    for number in graph.inputs.values():
        state.dims[number] = tuple(
            state.unifier.variable(size, frozen="it is an input", prefix=f"{next(names)}.")
            for size in graph.shapes[number]
        )
    for node in graph.nodes:
        apply(state, node)
    for number in graph.outputs:
        for dim in state.of(Ref(number)):
            state.unifier.freeze(dim, "the model returns it")
    return state
