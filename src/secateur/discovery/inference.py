"""Graph of operators -> the dimensions of every tensor: each operator's rule in turn, from inputs to logits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from math import prod

from secateur.discovery.algebra import units_along, variables_in
from secateur.discovery.graph import Graph, Node, Ref, references
from secateur.discovery.groups import BATCH, SEQUENCE
from secateur.discovery.rules import (
    attention,
    convolution,
    creation,
    elementwise,
    indexing,
    layout,
    matmul,
    normalization,
    reduction,
    slicing,
)
from secateur.discovery.rules.registry import RULES, Rule, aten, no_rule
from secateur.discovery.rules.state import Dims, Inference
from secateur.models.inputs import is_numbers

logger = logging.getLogger(__name__)

# The files of rules; to import one registers what it holds.
FAMILIES = (
    *(elementwise, creation, layout, slicing, indexing, reduction),
    *(normalization, matmul, convolution, attention),
)


ACTIVATIONS = frozenset(aten("silu gelu relu sigmoid tanh elu leaky_relu mish softplus hardswish hardsigmoid"))
COMPARISONS = frozenset(aten("eq ne lt le gt ge"))
MADE_LIKE = frozenset(
    aten("zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty")
)
# Indices that go through these are still indices of the same units.
KEEPS_INDICES = frozenset(
    aten("view _unsafe_view reshape alias detach clone _to_copy contiguous lift_fresh t transpose permute unsqueeze")
    + aten("squeeze expand repeat cat stack split split_with_sizes slice select unbind index index_select gather sort")
    + aten("where clamp masked_fill index_put flip")
)


def infer(graph: Graph) -> Inference:
    """Give every tensor of the graph its dimensions.

    Batch and sequence are frozen as inputs, what the model returns as outputs, and buffers that the checkpoint does
    not hold as computed by the code. The vocabulary can be cut where the model returns the tokens that it takes.
    """
    state = Inference(graph)
    vocabulary_size = _vocabulary_size(graph)
    _start(state, vocabulary_size)
    for state.node, node in enumerate(graph.nodes):
        apply_rule(state, node)
    _freeze_compared_units(state)
    for number in graph.outputs:
        *dims, last = state.dims_of(Ref(number))
        if last.size == vocabulary_size and not graph.returns_states:
            state.unifier.unify(state.vocabulary, last)
        else:
            state.unifier.freeze(state.vocabulary, "the model takes other tokens than it returns")
            dims.append(last)
        for dim in dims:
            state.unifier.freeze(dim, "the model returns it")
    return state


def _start(state: Inference, vocabulary_size: int) -> None:
    """Dimensions for weights, buffers, constants and inputs."""
    graph = state.graph
    for number in graph.parameters.values():
        state.dims[number] = state.new_dims(graph.shapes[number])
        state.from_weights.add(number)
    for name, number in graph.buffers.items():
        computed = f"the code computes the buffer {name}" if name in graph.computed_buffers else None
        state.dims[number] = state.new_dims(graph.shapes[number], frozen=computed)
    for number in graph.constants:
        state.dims[number] = state.new_dims(graph.shapes[number], frozen="it is a constant of the code")
    if vocabulary_size:
        state.vocabulary = state.unifier.variable(vocabulary_size, prefix="vocabulary.")
    for name, number in graph.inputs.items():
        numbers = is_numbers(name)
        state.from_inputs.add(number)
        if vocabulary_size and not numbers:
            state.index_targets[number] = state.vocabulary
        names = itertools.chain((BATCH, "input" if numbers else SEQUENCE), itertools.repeat("input"))
        state.dims[number] = tuple(
            state.unifier.variable(size, frozen="it is an input", prefix=f"{next(names)}.")
            for size in graph.shapes[number]
        )


def _vocabulary_size(graph: Graph) -> int:
    """Rows of the first table that the inputs are looked up in, 0 if there is none."""
    numbers = {number for name, number in graph.inputs.items() if not is_numbers(name)}
    for node in graph.nodes:
        if node.op == "aten.embedding" and node.arguments["indices"].tensor in numbers:
            table: Ref = node.arguments["weight"]
            return graph.shapes[table.tensor][0]
        if node.op in KEEPS_INDICES and any(ref.tensor in numbers for ref in references(node.arguments.values())):
            numbers.update(node.outputs)
    return 0


def apply_rule(state: Inference, node: Node) -> None:
    """Run the rule of one node and store the dimensions of its outputs."""
    operator = node.op.removesuffix("_") if node.in_place else node.op
    rule = RULES.get(operator) or (elementwise.pointwise if node.pointwise else no_rule)
    state.module = node.module
    _track_origins(state, node, operator)
    _track_indices(state, node, operator)
    for number, dims in zip(node.outputs, _output_dims(rule, state, node), strict=True):
        if number in state.dims:  # written in place
            for old, new in zip(state.dims_of(Ref(number)), dims, strict=True):
                state.unifier.unify(old, new)
        else:
            state.dims[number] = dims


def _output_dims(rule: Rule, state: Inference, node: Node) -> Sequence[Dims]:
    """The dimensions that the rule gives; where it does not cover this use of the operator, all is frozen instead."""
    wanted = [state.graph.shapes[number] for number in node.outputs]
    try:
        dims_of_outputs = rule(state, node)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        logger.debug("the rule of %s failed in %s: %s", node.op, node.module, error)
        return no_rule(state, node)
    if [tuple(dim.size for dim in dims) for dims in dims_of_outputs] != wanted:
        logger.debug("the rule of %s gives other sizes than %s in %s", node.op, wanted, node.module)
        return no_rule(state, node)
    return dims_of_outputs


def _track_origins(state: Inference, node: Node, operator: str) -> None:
    """Note what the outputs depend on (weights, rotary tables, inputs); count activations and rotary products."""
    refs = list(references(node.arguments.values()))
    weights = [ref for ref in refs if ref.tensor in state.from_weights]
    angles = [ref for ref in refs if ref.tensor in state.from_angles]
    inputs = [ref for ref in refs if ref.tensor in state.from_inputs]
    if weights:
        state.from_weights.update(node.outputs)
    elif angles or operator in ("aten.cos", "aten.sin", "aten.polar"):
        state.from_angles.update(node.outputs)
    if inputs:
        state.from_inputs.update(node.outputs)
    if operator in ("aten.bmm", "aten.baddbmm"):
        if len(inputs) >= 2:
            state.input_products.update(node.outputs)
    elif operator not in ("aten.mm", "aten.addmm") and any(ref.tensor in state.input_products for ref in refs):
        state.input_products.update(node.outputs)
    if operator == "aten.mul" and weights and angles:
        largest = max(weights, key=lambda ref: prod(state.graph.shapes[ref.tensor]))
        state.record_operation("rotary", state.dims_of(largest))
    if operator in ACTIVATIONS and weights:
        state.record_operation("activation", state.argument(node))


def _track_indices(state: Inference, node: Node, operator: str) -> None:
    """Indices of units stay such when they are copied, selected or put in another order.

    Comparing an index with a number of the code is allowed for now (see `_freeze_compared_units`); any other
    arithmetic with indices freezes the units, which could not be renumbered.
    """
    used = [value for name, value in node.arguments.items() if name not in ("index", "indices")]
    numbers = [ref.tensor for ref in references(used) if ref.tensor in state.index_targets]
    targets = [state.unifier.resolve(state.index_targets[number]) for number in numbers]
    if (
        operator == "aten.eq"  # whether two indices are of the same unit, as in `one_hot`
        and len(targets) == 2
        and not state.unifier.is_frozen(targets[0])
        and indexing.unify_indexed(state, *targets)
    ):
        return
    if targets and operator in KEEPS_INDICES:
        state.index_targets.update(dict.fromkeys(node.outputs, targets[0]))
    if operator in COMPARISONS and isinstance(number := node.arguments["other"], (int, float)):
        state.index_comparisons += [(units, int(number)) for units in targets]
    elif operator not in KEEPS_INDICES | MADE_LIKE or len(set(targets)) > 1:
        for units in targets:
            state.unifier.freeze(units, indexing.COMPUTED_WITH)


def _freeze_compared_units(state: Inference) -> None:
    """Freeze units of which one is compared with by number.

    Not frozen: a number beyond the last unit, which stands for "none of them"; and the vocabulary, since the token
    that the code compares with comes from the config and can follow a cut.
    """
    for units, number in state.index_comparisons:
        units = state.unifier.resolve(units)
        if 0 <= number < units.size and units != state.unifier.resolve(state.vocabulary):
            for variable in variables_in(units):
                if units_along(units, variable.name)[number] >= 0:
                    state.unifier.freeze(variable, indexing.COMPUTED_WITH)
