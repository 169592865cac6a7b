"""Inferred dimensions -> groups of axes that shrink together, with names and kinds; what is frozen and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Literal

from secateur.discovery.algebra import (
    Concat,
    Expression,
    Fixed,
    Product,
    Variable,
    size_after,
    substitute,
    variables_in,
)
from secateur.discovery.graph import Graph, Ref, references
from secateur.discovery.groups import BATCH, KINDS, SEQUENCE, Axis, Discovery, Frozen, Group, Operation, Weight
from secateur.discovery.kinds import Occurrences, classify
from secateur.discovery.layers import layer_lists, layer_of, residual_lists
from secateur.discovery.rules.registry import aten
from secateur.discovery.rules.state import Inference

# Grouped products of stacked matrices (experts) want rows of a multiple of 16 bytes: so many numbers of 16 bits.
STACKED_MULTIPLE = 8

Rename = Callable[[Expression], Expression]


def group_axes(state: Inference, model: str) -> Discovery:
    """Join the axes of all weights into groups by the variables they share."""
    graph = state.graph
    _freeze_what_cannot_be_grouped(state)
    lists = layer_lists(graph)
    weights = _weight_numbers(graph)
    occurrences = _occurrences(state, weights, lists)
    kinds = classify(state, occurrences)
    names = _group_names(occurrences, kinds)
    rename = _renaming(names)
    rename_operation = _renaming(names, also=(BATCH, SEQUENCE))
    return Discovery(
        model=model,
        groups=(*_groups(state, occurrences, kinds, names, rename), *_group_of_layers(graph)),
        frozen=tuple(_frozen(state, occurrences.dims)),
        weights=tuple(
            Weight(
                name=name,
                dims=tuple(rename(dim) for dim in dims),
                layer=layer_of(name, lists),
                embedding=_is_embedding(state, name, dims),
                parameter=name in graph.parameters,
            )
            for name, dims in occurrences.dims.items()
        ),
        operations=tuple(
            Operation(op.kind, tuple(rename_operation(state.unifier.resolve(dim)) for dim in op.dims), op.module)
            for op in state.operations
        ),
        layer_lists=lists,
        tied=dict(graph.tied),
    )


def _weight_numbers(graph: Graph) -> dict[str, int]:
    """Parameters and saved buffers by name."""
    saved = {name: number for name, number in graph.buffers.items() if name not in graph.computed_buffers}
    return graph.parameters | saved


# --- what cannot be grouped -------------------------------------------------------------------------------------


def _freeze_what_cannot_be_grouped(state: Inference) -> None:
    """Freeze weights that the logits do not depend on, and variables that meet themselves within one axis."""
    weights = _weight_numbers(state.graph)
    used = _used(state.graph)
    needed = {v.name for n in weights.values() if n in used for dim in state.dims_of(Ref(n)) for v in variables_in(dim)}
    for name, number in weights.items():
        for dim in state.dims_of(Ref(number)):
            for variable in variables_in(dim):
                if variable.name not in needed:
                    state.unifier.freeze(variable, "the logits do not depend on it")
            if any(variable.name.split(".")[0] in (BATCH, SEQUENCE) for variable in variables_in(dim)):
                state.unifier.freeze(dim, "the length of the text decides which of its positions are read")
            for variable in variables_in(dim):
                if _meets_itself(dim, variable.name):
                    state.unifier.freeze(variable, f"its units meet each other within one axis of {name}")


def _used(graph: Graph) -> set[int]:
    """The tensors that the outputs depend on; a tensor and its views, through any of which it is written, are one."""
    base: dict[int, int] = {}  # a view -> the tensor whose memory it has
    for node in graph.nodes:
        if node.op in VIEWS and isinstance(source := node.arguments.get("self"), Ref):
            base.update(dict.fromkeys(node.outputs, base.get(source.tensor, source.tensor)))
    used = {base.get(number, number) for number in graph.outputs}
    for node in reversed(graph.nodes):
        if any(base.get(number, number) in used for number in node.outputs):
            used |= {base.get(ref.tensor, ref.tensor) for ref in references(node.arguments.values())}
    return used


VIEWS = frozenset(
    aten("alias detach view _unsafe_view reshape t transpose permute unsqueeze squeeze expand slice select unbind")
    + aten("split split_with_sizes diagonal unfold lift_fresh view_as_complex view_as_real")
)


def _meets_itself(expression: Expression, name: str) -> bool:
    """Whether a variable is in two factors of one product: its unit i then lies beside its unit j."""
    match expression:
        case Product(factors=factors):
            holding = [f for f in factors if any(v.name == name for v in variables_in(f))]
            return len(holding) > 1 or any(_meets_itself(f, name) for f in holding)
        case Concat(parts=parts):
            return any(_meets_itself(part, name) for part in parts)
    return False


# --- groups -----------------------------------------------------------------------------------------------------


def _occurrences(state: Inference, weights: Mapping[str, int], lists: tuple[str, ...]) -> Occurrences:
    dims = {name: state.dims_of(Ref(number)) for name, number in weights.items()}
    axes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for weight, expressions in dims.items():
        for dim, expression in enumerate(expressions):
            for variable in dict.fromkeys(variables_in(expression)):
                if state.unifier.reason(variable) is None:
                    axes[variable.name].append((weight, dim))
    return Occurrences(dims, axes, {v: {layer_of(weight, lists) for weight, _ in at} for v, at in axes.items()})


def _group_names(occurrences: Occurrences, kinds: Mapping[str, str]) -> dict[str, str]:
    """Variable -> name of its group, layer by layer, then what runs through the model: "layers.0.head_dim.1"."""
    layers = {v: _only(layers) for v, layers in occurrences.layers.items()}
    order = sorted(layers, key=lambda v: (layers[v] is None, layers[v] or 0, KINDS.index(kinds[v])))
    base = {v: kinds[v] if layers[v] is None else f"layers.{layers[v]}.{kinds[v]}" for v in order}
    total, seen = Counter(base.values()), Counter[str]()
    names = {}
    for v in order:
        seen[base[v]] += 1
        names[v] = base[v] if total[base[v]] == 1 else f"{base[v]}.{seen[base[v]] - 1}"
    return names


def _only(layers: set[int | None]) -> int | None:
    return next(iter(layers)) if len(layers) == 1 else None


def _groups(
    state: Inference, occurrences: Occurrences, kinds: Mapping[str, str], names: Mapping[str, str], rename: Rename
) -> Iterator[Group]:
    dims, axes = occurrences.dims, occurrences.axes
    sizes = {v.name: v.size for expressions in dims.values() for dim in expressions for v in variables_in(dim)}
    normed = _reduced_variables(state, "statistic")
    chosen = _reduced_variables(state, "choice")
    # Matrices of experts in one tensor: what their kernels read row by row has a width that these demand.
    inside = [axes[v] for v in names if kinds[v] == "expert_mlp"]
    stacked = {weight for at in inside for weight, dim in at if dim > 0 and len(dims[weight]) == 3}
    for v, name in names.items():
        yield Group(
            name=name,
            kind=kinds[v],
            layer=_only(occurrences.layers[v]),
            units=sizes[v],
            axes=tuple(Axis(weight, dim, rename(dims[weight][dim])) for weight, dim in axes[v]),
            normed=v in normed,
            chosen=v in chosen,
            least=max(1, chosen.get(v, 1)),
            multiple=gcd(STACKED_MULTIPLE, sizes[v]) if any(w in stacked and dim > 0 for w, dim in axes[v]) else 1,
        )


def _group_of_layers(graph: Graph) -> Sequence[Group]:
    """Whole layers as units, where one list of residual blocks holds several."""
    residual = residual_lists(graph)
    layers = {layer_of(name, residual) for name in graph.item_calls} - {None}
    return [Group("layers", "layer", None, len(layers), ())] if len(residual) == 1 and len(layers) > 1 else []


def _reduced_variables(state: Inference, kind: Literal["statistic", "choice"]) -> dict[str, int]:
    """Variables that statistics, or choices, are taken across, and the fewest units that these need."""
    least: dict[str, int] = {}
    for reduction in state.reductions:
        if reduction.kind == kind:
            dim = state.unifier.resolve(reduction.dim)
            for variable in variables_in(dim):
                positions = dim.size - size_after(dim, {variable.name: 0})  # that hold a unit of the variable
                others = dim.size - positions
                per_unit = positions // variable.size
                needed = -(-max(0, reduction.least - others) // per_unit) if per_unit else 1
                least[variable.name] = max(least.get(variable.name, 1), needed)
    return least


def _renaming(names: Mapping[str, str], also: tuple[str, ...] = ()) -> Rename:
    """A function that writes group names for free variables and sizes for frozen ones, but for those of `also`."""

    def rename(variable: Variable) -> Expression:
        head = variable.name.split(".")[0]
        if variable.name in names or head in also:
            return Variable(names.get(variable.name, head), variable.size)
        return Fixed(variable.size)

    return lambda expression: substitute(expression, rename)


def _frozen(state: Inference, dims: Mapping[str, tuple[Expression, ...]]) -> Iterator[Frozen]:
    for weight, expressions in dims.items():
        for dim, expression in enumerate(expressions):
            for variable in dict.fromkeys(variables_in(expression)):
                reason = state.unifier.reason(variable)
                if reason is not None:
                    yield Frozen(weight, dim, variable.size, reason)


def _is_embedding(state: Inference, name: str, dims: tuple[Expression, ...]) -> bool:
    """A table that is looked up, or a weight with an axis that is the model's output."""
    logits = () if state.graph.returns_states else state.graph.outputs
    returned = {v.name for number in logits for v in variables_in(state.dims_of(Ref(number))[-1])}
    looked_up = state.graph.parameters.get(name) in state.embedding_tables
    return looked_up or any(v.name in returned for dim in dims for v in variables_in(dim))
