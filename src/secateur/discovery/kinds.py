"""Variables of the inference -> the kind of group that each becomes: by what operators do with it, never by a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.discovery.algebra import Expression, Variable, variables_in
from secateur.discovery.rules.state import Inference

WeightAxis = tuple[str, int]  # weight, dim


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Where the variables that can be cut occur among the weights."""

    dims: Mapping[str, tuple[Expression, ...]]  # weight -> its dimensions
    axes: Mapping[str, list[WeightAxis]]  # variable -> the axes that hold it
    layers: Mapping[str, set[int | None]]  # variable -> the layers of these weights; None for weights in no layer

    def beside(self, variable: str) -> set[str]:
        """The other variables in the axes of this one."""
        return _others(variable, [self.dims[weight][dim] for weight, dim in self.axes[variable]])

    def across(self, variable: str) -> set[str]:
        """The variables in the other dimensions of its weights."""
        return _others(
            variable, [e for weight, dim in self.axes[variable] for i, e in enumerate(self.dims[weight]) if i != dim]
        )


def _others(variable: str, dims: Iterable[Expression]) -> set[str]:
    return {v.name for dim in dims for v in variables_in(dim)} - {variable}


def classify(state: Inference, occurrences: Occurrences) -> dict[str, str]:
    """Variable -> kind, one of `groups.KINDS`."""
    repeated, heads, selected, batched, tokens = (
        Counter(v.name for dim in dims for v in variables_in(state.unifier.resolve(dim)))
        for dims in (state.repeated, state.beside_softmax, state.selected, state.batched, [state.vocabulary])
    )
    tables = {name for name, number in state.graph.parameters.items() if number in state.embedding_tables}
    # First what an operator tells of the variable itself.
    kinds: dict[str, str] = {}
    for variable, axes in occurrences.axes.items():
        layers = occurrences.layers[variable]
        weights = {weight for weight, _ in axes}
        if variable in tokens:
            kinds[variable] = "vocabulary"
        elif variable in heads:
            # Heads made by repeating both keys and values are query heads of a KV head.
            kinds[variable] = "query" if repeated[variable] > 1 else "attention"
        elif variable in selected:
            kinds[variable] = "expert"
        elif len(layers) > 1 and (len(layers - {None}) > 1 or weights & tables):
            kinds[variable] = "hidden"
        elif variable in batched and len(weights) > 1:
            kinds[variable] = "state"
    # Then the others, by what they lie beside and across from.
    layers_with_experts = {
        layer for variable, kind in kinds.items() if kind == "expert" for layer in occurrences.layers[variable]
    }
    for variable, axes in occurrences.axes.items():
        if variable not in kinds:
            layers = occurrences.layers[variable]
            matrices = {weight for weight, _ in axes if len(occurrences.dims[weight]) > 1}
            kinds[variable] = _kind_by_neighbours(
                {kinds.get(v, "attention") for v in occurrences.beside(variable) if v in kinds or v in heads},
                {
                    kinds.get(v, "other")
                    for v in occurrences.across(variable)
                    if state.unifier.reason(Variable(v, 0)) is None
                },
                joins_matrices=len(layers) == 1 and len(matrices) > 1,
                has_experts=bool(layers & layers_with_experts),
            )
    return kinds


def _kind_by_neighbours(beside: set[str], across: set[str], *, joins_matrices: bool, has_experts: bool) -> str:
    """The kind of a variable from the kinds within its own axes, and across from it in its weights.

    `joins_matrices`: it is in two matrices (or a matrix and a table) of one layer. `has_experts`: its layer does.
    """
    if beside & {"attention", "query"}:
        return "head_dim"
    if "expert" in beside:
        return "expert_mlp"
    if "state" in beside | across and across <= {"state", "hidden", "other", "head_dim"}:
        return "state"
    if not joins_matrices:
        return "other"
    if across <= {"hidden"}:
        return "shared_mlp" if has_experts else "mlp"
    return "expert_mlp" if across <= {"hidden", "expert"} else "latent"
