"""Inferred dimensions -> groups of axes that must shrink together, named and classed; what is frozen and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from secateur.discovery.algebra import (
    Concat,
    Expression,
    Fixed,
    Product,
    Variable,
    parse,
    show,
    size_after,
    substitute,
    variables_in,
)
from secateur.discovery.graph import Graph, Ref
from secateur.discovery.layers import layer_of
from secateur.discovery.rules import Inference, Operation

# Grouped products of stacked matrices (experts) want rows of a multiple of 16 bytes: so many numbers of 16 bits.
STACKED_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of one weight; its expression names the groups whose units it holds."""

    weight: str  # "model.layers.0.mlp.down_proj.weight"
    dim: int
    expression: Expression


@dataclass(frozen=True, slots=True)
class Group:
    """Axes that must shrink together: removing unit i removes its slice of every one of them."""

    name: str  # "layers.3.mlp"
    kind: str  # one of KINDS
    layer: int | None
    units: int
    axes: tuple[Axis, ...]
    normed: bool = False  # a norm takes its mean or variance across it: cutting it changes the statistic
    chosen: bool = False  # the model chooses among its units (a router does): the choice is then among those that stay
    least: int = 1  # units that the model's code needs
    multiple: int = 1  # of which its widths are: kernels that read it run on no others


@dataclass(frozen=True, slots=True)
class Frozen:
    """An axis, or a factor of one, that cannot be cut."""

    weight: str
    dim: int
    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or a saved buffer: its dimensions as expressions over groups."""

    name: str
    dims: tuple[Expression, ...]
    layer: int | None
    embedding: bool = False  # a token or position table, or the output head
    parameter: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes before any cut."""
        return tuple(dim.size for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Discovery:
    """What can be cut in a model, and everything needed to count what a cut leaves.

    `weights` and `operations` are written over the groups, so sizes after a cut are arithmetic, not another model.
    """

    model: str
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    weights: tuple[Weight, ...]
    operations: tuple[Operation, ...]
    layer_lists: tuple[str, ...] = ()  # "model.layers": the module lists whose items are residual blocks
    tied: dict[str, str] = field(default_factory=dict)  # other name -> the name in `weights`

    def group(self, name: str) -> Group:
        """The group of that name; KeyError when there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    @property
    def names(self) -> frozenset[str]:
        """The names of all groups."""
        return frozenset(group.name for group in self.groups)

    @property
    def depth(self) -> int:
        """The number of layers, whether or not they can be dropped; 1 where none can be told apart."""
        return 1 + max((weight.layer for weight in self.weights if weight.layer is not None), default=0)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur discover --json` writes it."""
        return {
            "model": self.model,
            "groups": [
                {
                    "name": group.name,
                    "kind": group.kind,
                    "layer": group.layer,
                    "units": group.units,
                    "normed": group.normed,
                    "chosen": group.chosen,
                    "least": group.least,
                    "multiple": group.multiple,
                    "axes": [{"weight": a.weight, "dim": a.dim, "expression": show(a.expression)} for a in group.axes],
                }
                for group in self.groups
            ],
            "frozen": [{"weight": f.weight, "dim": f.dim, "size": f.size, "reason": f.reason} for f in self.frozen],
            "weights": [
                {
                    "name": weight.name,
                    "dims": [show(dim) for dim in weight.dims],
                    "layer": weight.layer,
                    "embedding": weight.embedding,
                    "parameter": weight.parameter,
                }
                for weight in self.weights
            ],
            "operations": [
                {"kind": work.kind, "dims": [show(dim) for dim in work.dims], "module": work.module}
                for work in self.operations
            ],
            "layer_lists": list(self.layer_lists),
            "tied": dict(self.tied),
        }


def from_json(data: Mapping[str, Any]) -> Discovery:
    """Read back what `Discovery.to_json` wrote."""
    sizes = {group["name"]: group["units"] for group in data["groups"]} | {BATCH: 2, SEQUENCE: 2}

    def read(text: str) -> Expression:
        return parse(text, sizes)

    return Discovery(
        model=data["model"],
        groups=tuple(
            Group(
                name=group["name"],
                kind=group["kind"],
                layer=group["layer"],
                units=group["units"],
                normed=group["normed"],
                chosen=group["chosen"],
                least=group["least"],
                multiple=group.get("multiple", 1),
                axes=tuple(Axis(a["weight"], a["dim"], read(a["expression"])) for a in group["axes"]),
            )
            for group in data["groups"]
        ),
        frozen=tuple(Frozen(**item) for item in data["frozen"]),
        weights=tuple(
            Weight(**{**weight, "dims": tuple(read(dim) for dim in weight["dims"])}) for weight in data["weights"]
        ),
        operations=tuple(
            Operation(work["kind"], tuple(read(dim) for dim in work["dims"]), work["module"])
            for work in data["operations"]
        ),
        layer_lists=tuple(data["layer_lists"]),
        tied=dict(data["tied"]),
    )


BATCH, SEQUENCE = "batch", "sequence"


# --- from the inference to groups -------------------------------------------------------------------------------


def group_axes(state: Inference, model: str) -> Discovery:
    """Join the axes of all weights into groups by the variables they share."""
    graph = state.graph
    _freeze_what_cannot_be_grouped(state)
    lists = layer_lists(graph)
    residual = residual_lists(graph)
    numbers = {**graph.parameters, **{n: t for n, t in graph.buffers.items() if n not in graph.computed_buffers}}
    found = {name: state.of(Ref(number)) for name, number in numbers.items()}
    where: dict[str, list[tuple[str, int]]] = defaultdict(list)  # variable -> (weight, dim)
    sizes: dict[str, int] = {}
    for weight, dims in found.items():
        for dim, expression in enumerate(dims):
            for variable in dict.fromkeys(variables_in(expression)):
                if state.unifier.reason(variable) is None:
                    where[variable.name].append((weight, dim))
                    sizes[variable.name] = variable.size
    kinds = _kinds(state, where, found, lists)
    layers = {v: _only({layer_of(weight, lists) for weight, _ in at}) for v, at in where.items()}
    order = sorted(where, key=lambda v: (layers[v] is None, layers[v] or 0, KINDS.index(kinds[v])))
    names = _names(order, kinds, layers)
    rename = _renaming(names)
    rename_work = _renaming(names, also=(BATCH, SEQUENCE))
    normed = _across(state, "statistic")
    chosen = _across(state, "choice")
    inside = [at for v, at in where.items() if kinds[v] == "expert_mlp"]
    stacks = {weight for at in inside for weight, dim in at if dim > 0 and len(found[weight]) == 3}
    groups = [
        Group(
            name=names[v],
            kind=kinds[v],
            layer=layers[v],
            units=sizes[v],
            axes=tuple(Axis(weight, dim, rename(found[weight][dim])) for weight, dim in where[v]),
            normed=v in normed,
            chosen=v in chosen,
            least=max(1, chosen.get(v, 1)),
            multiple=gcd(STACKED_MULTIPLE, sizes[v]) if stacks & {w for w, dim in where[v] if dim > 0} else 1,
        )
        for v in order
    ]
    if len(residual) == 1:
        depth = len({layer_of(name, residual) for name in graph.calls} - {None})
        if depth > 1:
            groups.append(Group("layers", "layer", None, depth, ()))
    return Discovery(
        model=model,
        groups=tuple(groups),
        frozen=tuple(_frozen(state, found)),
        weights=tuple(
            Weight(
                name=name,
                dims=tuple(rename(dim) for dim in dims),
                layer=layer_of(name, lists),
                embedding=_is_embedding(state, name, dims),
                parameter=name in graph.parameters,
            )
            for name, dims in found.items()
        ),
        operations=tuple(
            Operation(work.kind, tuple(rename_work(state.unifier.resolve(dim)) for dim in work.dims), work.module)
            for work in state.operations
        ),
        layer_lists=lists,
        tied=dict(graph.tied),
    )


def layer_lists(graph: Graph) -> tuple[str, ...]:
    """The module lists whose items are the layers: those of residual blocks, or else all that lie in no other."""
    return residual_lists(graph) or _outermost({name.rpartition(".")[0] for name in graph.calls})


def residual_lists(graph: Graph) -> tuple[str, ...]:
    """Module lists whose every item adds to its input, so that removing the item leaves an identity."""
    producers = {number: node for node in graph.nodes for number in node.outputs}
    lists: dict[str, bool] = {}
    for name, (enters, leaves) in graph.calls.items():
        prefix = name.rpartition(".")[0]
        lists[prefix] = lists.get(prefix, True) and _adds_to(enters, leaves, producers)
    outermost = _outermost(lists)
    return tuple(prefix for prefix in outermost if lists[prefix])


def _outermost(lists: Iterable[str]) -> tuple[str, ...]:
    lists = sorted(lists)
    return tuple(prefix for prefix in lists if not any(prefix.startswith(f"{other}.") for other in lists))


def _across(state: Inference, what: str) -> dict[str, int]:
    """Variables that statistics, or choices, are taken across, and the units that these need."""
    found: dict[str, int] = {}
    for across in state.across:
        if across.what == what:
            dim = state.unifier.resolve(across.dim)
            for variable in variables_in(dim):
                rest = dim.size - size_after(dim, {variable.name: 0})  # positions that the variable's units hold
                others = dim.size - rest
                per_unit = rest // variable.size
                needed = -(-max(0, across.least - others) // per_unit) if per_unit else 1
                found[variable.name] = max(found.get(variable.name, 1), needed)
    return found


def _adds_to(enters: int, leaves: int, producers: Mapping[int, Any]) -> bool:
    """Whether the tensor that leaves is the one that enters plus something, through additions and copies alone."""
    waiting, seen = [leaves], set()
    while waiting:
        number = waiting.pop()
        if number == enters:
            return leaves != enters
        node = producers.get(number)
        if number in seen or node is None or node.op not in ADDITIONS:
            continue
        seen.add(number)
        waiting += [value.tensor for value in node.arguments.values() if isinstance(value, Ref)]
    return False


ADDITIONS = frozenset(
    {"aten.add", "aten.add_", "aten.clone", "aten.alias", "aten.detach", "aten._to_copy", "aten.view"}
    | {"aten._unsafe_view"}
)


def _freeze_what_cannot_be_grouped(state: Inference) -> None:
    """Freeze weights that the logits do not depend on, and variables that meet themselves within one axis."""
    graph = state.graph
    used = _used(graph)
    saved = {name: number for name, number in graph.buffers.items() if name not in graph.computed_buffers}
    weights = graph.parameters | saved
    needed = {v.name for n in weights.values() if n in used for dim in state.of(Ref(n)) for v in variables_in(dim)}
    for name, number in weights.items():
        for dim in state.of(Ref(number)):
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
    whole: dict[int, int] = {}  # a view -> the tensor whose memory it has
    for node in graph.nodes:
        if node.op in VIEWS and isinstance(source := node.arguments.get("self"), Ref):
            whole.update(dict.fromkeys(node.outputs, whole.get(source.tensor, source.tensor)))
    used = {whole.get(number, number) for number in graph.outputs}
    for node in reversed(graph.nodes):
        if any(whole.get(number, number) in used for number in node.outputs):
            used |= {whole.get(ref.tensor, ref.tensor) for ref in _refs(node.arguments.values())}
    return used


VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "alias detach view _unsafe_view reshape t transpose permute unsqueeze squeeze expand slice select unbind split "
        "split_with_sizes diagonal unfold lift_fresh view_as_complex view_as_real"
    ).split()
)


def _refs(values: Iterable[Any]) -> Iterable[Ref]:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, tuple):
            yield from _refs(value)


def _meets_itself(expression: Expression, name: str) -> bool:
    match expression:
        case Product(factors=factors):
            holding = [f for f in factors if any(v.name == name for v in variables_in(f))]
            return len(holding) > 1 or any(_meets_itself(f, name) for f in holding)
        case Concat(parts=parts):
            return any(_meets_itself(part, name) for part in parts)
    return False


KINDS = (
    *("attention", "query", "head_dim", "latent", "state", "mlp", "expert", "expert_mlp", "shared_mlp", "other"),
    *("hidden", "vocabulary", "layer"),
)


def _kinds(
    state: Inference,
    where: Mapping[str, list[tuple[str, int]]],
    found: Mapping[str, tuple[Expression, ...]],
    lists: tuple[str, ...],
) -> dict[str, str]:
    """Class each variable by what the operators did with it; no name of a module is looked at."""
    expanded, scored, picked, mixed, tokens = (
        Counter(v.name for dim in dims for v in variables_in(state.unifier.resolve(dim)))
        for dims in (state.expanded, state.scored, state.picked, state.mixed, [state.vocabulary])
    )
    tables = {name for name, number in state.graph.parameters.items() if number in state.tables}
    kinds: dict[str, str] = {}
    for variable, at in where.items():
        layers = {layer_of(weight, lists) for weight, _ in at}
        if variable in tokens:
            kinds[variable] = "vocabulary"
        elif variable in scored:
            # Heads made by repeating both keys and values are query heads of a KV head.
            kinds[variable] = "query" if expanded[variable] > 1 else "attention"
        elif variable in picked:
            kinds[variable] = "expert"
        elif len(layers) > 1 and (len(layers - {None}) > 1 or any(weight in tables for weight, _ in at)):
            kinds[variable] = "hidden"
        elif variable in mixed and len({weight for weight, _ in at}) > 1:
            kinds[variable] = "state"
    routed = {layer_of(weight, lists) for v, kind in kinds.items() if kind == "expert" for weight, _ in where[v]}
    for variable, at in where.items():
        if variable not in kinds:
            layers = {layer_of(weight, lists) for weight, _ in at}
            beside = _others(variable, [found[weight][dim] for weight, dim in at])
            across = _others(variable, [e for weight, dim in at for i, e in enumerate(found[weight]) if i != dim])
            kinds[variable] = _kind_by_neighbours(
                {kinds.get(v, "attention") for v in beside if v in kinds or v in scored},
                {kinds.get(other, "other") for other in across if state.unifier.reason(Variable(other, 0)) is None},
                between=len(layers) == 1 and sum(len(found[weight]) > 1 for weight in {name for name, _ in at}) > 1,
                routed=bool(layers & routed),
            )
    return kinds


def _others(variable: str, dims: Iterable[Expression]) -> set[str]:
    return {v.name for dim in dims for v in variables_in(dim)} - {variable}


def _kind_by_neighbours(beside: set[str], across: set[str], *, between: bool, routed: bool) -> str:
    """The kind of a variable from the kinds within its own axes, and across from it in its weights.

    `between`: it joins two matrices, or a matrix and a table, of one layer.
    """
    if beside & {"attention", "query"}:
        return "head_dim"
    if "expert" in beside:
        return "expert_mlp"
    if "state" in beside | across and across <= {"state", "hidden", "other", "head_dim"}:
        return "state"
    if not between:
        return "other"
    if across <= {"hidden"}:
        return "shared_mlp" if routed else "mlp"
    return "expert_mlp" if across <= {"hidden", "expert"} else "latent"


def _names(order: list[str], kinds: Mapping[str, str], layers: Mapping[str, int | None]) -> dict[str, str]:
    base = {v: kinds[v] if layers[v] is None else f"layers.{layers[v]}.{kinds[v]}" for v in order}
    total, seen = Counter(base.values()), Counter[str]()
    names = {}
    for v in order:
        seen[base[v]] += 1
        names[v] = base[v] if total[base[v]] == 1 else f"{base[v]}.{seen[base[v]] - 1}"
    return names


def _renaming(names: Mapping[str, str], also: tuple[str, ...] = ()) -> Callable[[Expression], Expression]:
    """A function that writes group names for free variables and sizes for frozen ones, but for those of `also`."""

    def rename(variable: Variable) -> Expression:
        head = variable.name.split(".")[0]
        if variable.name in names or head in also:
            return Variable(names.get(variable.name, head), variable.size)
        return Fixed(variable.size)

    return lambda expression: substitute(expression, rename)


def _frozen(state: Inference, found: Mapping[str, tuple[Expression, ...]]) -> Iterable[Frozen]:
    for weight, dims in found.items():
        for dim, expression in enumerate(dims):
            for variable in dict.fromkeys(variables_in(expression)):
                reason = state.unifier.reason(variable)
                if reason is not None:
                    yield Frozen(weight, dim, variable.size, reason)


def _is_embedding(state: Inference, name: str, dims: tuple[Expression, ...]) -> bool:
    """A table that is looked up, or a weight with an axis that is the model's output."""
    returned = {v.name for number in state.graph.outputs for v in variables_in(state.of(Ref(number))[-1])}
    looked_up = state.graph.parameters.get(name) in state.tables
    return looked_up or any(v.name in returned for dim in dims for v in variables_in(dim))


def _only(values: set[int | None]) -> int | None:
    return next(iter(values)) if len(values) == 1 else None
