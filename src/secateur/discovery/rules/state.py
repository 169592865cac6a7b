"""What the rules have inferred so far: the dimensions of every tensor, and what operators do along them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from secateur.discovery.algebra import ONE, Expression
from secateur.discovery.graph import Graph, Node, Ref
from secateur.discovery.groups import Operation
from secateur.discovery.unification import Unifier

Dims = tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Reduction:
    """A sum, a statistic or a choice that an operator takes across one dimension of its first tensor.

    The dimension can be cut; the sum, the statistic or the choice is then over the units that stay.
    """

    node: int  # of the graph
    tensor_dim: int
    dim: Expression
    kind: Literal["sum", "statistic", "choice"]
    least: int = 1  # positions that the choice needs


@dataclass(slots=True)
class Inference:
    """The state that rules read and extend."""

    graph: Graph
    unifier: Unifier = field(default_factory=Unifier)
    dims: dict[int, Dims] = field(default_factory=dict)  # tensor -> its dimensions

    # What the model computes, for counting and for the contract "cut equals mask".
    operations: list[Operation] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)

    # Evidence for the kind of a group.
    repeated: list[Expression] = field(default_factory=list)  # made by repeating a dimension of size 1
    beside_softmax: list[Expression] = field(default_factory=list)  # of attention scores: batch, heads, queries
    selected: list[Expression] = field(default_factory=list)  # of weights, from which a choice of the model selects
    batched: list[Expression] = field(default_factory=list)  # batch dims of matrix products, channels of convolutions
    embedding_tables: list[int] = field(default_factory=list)  # weights whose rows are looked up

    # Tensors of indices -> the dimension that they index; comparisons of an index with a number of the code.
    index_targets: dict[int, Expression] = field(default_factory=dict)
    index_comparisons: list[tuple[Expression, int]] = field(default_factory=list)
    vocabulary: Expression = ONE  # the dimension that the input ids index

    # Tensors by what they depend on.
    from_weights: set[int] = field(default_factory=set)
    from_angles: set[int] = field(default_factory=set)  # on a sine or cosine: rotary tables
    from_inputs: set[int] = field(default_factory=set)
    input_products: set[int] = field(default_factory=set)  # on a product of two tensors that depend on the inputs

    # The current node: its number, and the module whose forward runs it.
    node: int = 0
    module: str = ""

    def dims_of(self, ref: Ref) -> Dims:
        """The dimensions of a tensor, in normal form."""
        return tuple(self.unifier.resolve(dim) for dim in self.dims[ref.tensor])

    def argument(self, node: Node, name: str = "self") -> Dims:
        """The dimensions of a tensor argument of the node."""
        return self.dims_of(node.arguments[name])

    def optional_argument(self, node: Node, name: str) -> Dims | None:
        """The dimensions of a tensor argument, None where the node does not give it."""
        ref = node.arguments.get(name)
        return None if ref is None else self.dims_of(ref)

    def output_shape(self, node: Node) -> tuple[int, ...]:
        """The sizes of the first output of the node."""
        return self.graph.shapes[node.outputs[0]]

    def depends_on_weights(self, node: Node) -> bool:
        """Whether the tensor that the node is called on is a weight or computed from one."""
        return node.arguments["self"].tensor in self.from_weights

    def new_dims(self, shape: Iterable[int], *, frozen: str | None = None) -> Dims:
        """New dimensions of the given sizes."""
        return tuple(self.unifier.variable(size, frozen=frozen) for size in shape)

    def broadcast(self, tensors: Sequence[Dims]) -> Dims:
        """Unify the dimensions of tensors aligned at the right; a dimension of size 1 agrees with any."""
        result: list[Expression] = []
        for position in range(max((len(dims) for dims in tensors), default=0), 0, -1):
            here = [dims[-position] for dims in tensors if len(dims) >= position and dims[-position].size != 1]
            for other in here[1:]:
                self.unifier.unify(here[0], other)
            result.append(here[0] if here else ONE)
        return tuple(result)

    def record_reduction(
        self, kind: Literal["sum", "statistic", "choice"], along: Iterable[int], dims: Dims, *, least: int = 1
    ) -> None:
        """Note that the current operator takes a sum, a statistic or a choice along some of these dimensions."""
        for dim in along:
            self.reductions.append(Reduction(self.node, dim % len(dims), dims[dim], kind, least))

    def record_operation(self, kind: str, dims: Iterable[Expression]) -> None:
        """Count multiply-accumulates of the current operator: the product of the sizes of `dims`."""
        self.operations.append(Operation(kind, tuple(dims), self.module))
