"""The graph of ATen operators that one forward pass runs: plain values, which `tracing` records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the graph, by number; `Graph.shapes[number]` is its shape."""

    tensor: int


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call: its arguments by their schema names, with tensors replaced by `Ref`."""

    op: str  # "aten.mm"; in-place variants end in "_"
    arguments: dict[str, Any]
    outputs: tuple[int, ...]  # tensors, in order
    module: str  # "model.layers.0.mlp", the innermost module whose forward ran it
    pointwise: bool = False
    in_place: str | None = None  # the argument it writes to


@dataclass(frozen=True, slots=True)
class Graph:
    """The operators of one forward pass in order, and which tensors are weights, inputs and outputs."""

    nodes: tuple[Node, ...]
    shapes: tuple[tuple[int, ...], ...]
    parameters: dict[str, int]  # canonical name -> tensor
    buffers: dict[str, int]
    constants: tuple[int, ...]  # tensors the code holds outside parameters and buffers
    literal_indices: dict[int, tuple[int, ...]]  # tensor -> indices that the code writes out: x[..., [-2, -1], :]
    inputs: dict[str, int]
    outputs: tuple[int, ...]
    tied: dict[str, str] = field(default_factory=dict)  # other name -> canonical name
    computed_buffers: frozenset[str] = frozenset()  # buffers that are not in the checkpoint
    item_calls: dict[str, tuple[int, int]] = field(default_factory=dict)  # item of a module list -> input, output
    returns_states: bool = False  # hidden states, as a model without a head does, instead of logits


def references(values: Iterable[Any]) -> Iterator[Ref]:
    """The tensors among the arguments, also inside lists.

    >>> list(references([Ref(1), 2, (Ref(3), None)]))
    [Ref(tensor=1), Ref(tensor=3)]
    """
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, tuple):
            yield from references(value)
