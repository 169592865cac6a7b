"""A discovery -> what a table shows: layers that are alike as one, with their groups, units and parameters."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from secateur.discovery.algebra import Expression, Variable, show, size_after, substitute
from secateur.discovery.counting import count_parameters
from secateur.discovery.coverage import Coverage, coverage_of, number_of_parameters
from secateur.discovery.descriptions import describe_unit, position_name
from secateur.discovery.groups import Discovery, Group
from secateur.discovery.weight_names import ShortNames, without_layer_number


@dataclass(frozen=True, slots=True)
class Slice:
    """What one unit is in some weights: `count` rows, columns or entries of each."""

    count: int
    what: str  # "row", "column", "entry", "matrix", "row of each matrix" and so on
    weights: tuple[str, ...]  # names as short as they can be told apart; "q_proj+bias" is both

    def __str__(self) -> str:
        """In words.

        >>> str(Slice(2, "row", ("q_proj", "k_proj")))
        '2 rows of q_proj, k_proj'
        """
        noun, of, rest = self.what.partition(" of ")
        plural = {"entry": "entries", "matrix": "matrices"}.get(noun, f"{noun}s")
        return f"{self.count:,} {noun if self.count == 1 else plural}{of}{rest} of {', '.join(self.weights)}"


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """The groups of one name in layers that are alike; or a group that runs through the model."""

    name: str  # without its layer: "attention"
    group: Group  # of the first such layer
    unit: str  # one of them in words: "KV head with its 3 query heads"
    slices: tuple[Slice, ...]  # of one unit, in one layer
    coverage: Coverage  # of the groups of all these layers


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """Layers that are alike."""

    layers: tuple[int, ...]  # none for what runs through the model
    groups: tuple[GroupSummary, ...]
    parameters: int  # of the layers together; of what lies in none
    share: float  # of the model's parameters


def summarize_layers(discovery: Discovery) -> tuple[LayerSummary, ...]:
    """Layers of the same weights, groups and frozen axes, once; at the end what runs through the model.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> layers, whole = summarize_layers(discover(AutoConfig.for_model("opt", num_hidden_layers=4, **sizes)))
    >>> layers.layers, layers.groups[-1].name, str(layers.groups[-1].slices[0]), [g.name for g in whole.groups]
    ((0, 1, 2, 3), 'mlp', '1 row of fc1+bias', ['hidden', 'vocabulary', 'layers'])
    """
    alike: dict[Any, list[int]] = {}
    for layer, structure in _structures(discovery).items():
        alike.setdefault(structure, []).append(layer)
    names = ShortNames(discovery)
    return tuple(_summary(discovery, tuple(layers), names) for layers in [*alike.values(), []])


def _structures(discovery: Discovery) -> dict[int, Any]:
    """Layer -> its weights, groups and frozen axes, without its number: equal for layers that are alike."""
    kinds = {group.name: (group.kind, group.layer) for group in discovery.groups}
    structures: dict[int, list[Any]] = defaultdict(list)

    def without_layer(variable: Variable) -> Expression:
        if variable.name not in kinds:  # the length of the sequence
            return variable
        kind, layer = kinds[variable.name]
        return Variable(kind if layer is None else variable.name.removeprefix(f"layers.{layer}."), variable.size)

    layers = {weight.name: weight.layer for weight in discovery.weights}
    for weight in discovery.weights:
        if weight.layer is not None:
            dims = tuple((show(substitute(dim, without_layer)), dim.size) for dim in weight.dims)
            structures[weight.layer].append((without_layer_number(weight.name, weight.layer), dims, weight.parameter))
    for group in discovery.groups:
        if group.layer is not None:
            structures[group.layer].append(
                (group.family, group.kind, group.units, group.normed, group.chosen, group.least)
            )
    for frozen in discovery.frozen:
        layer = layers[frozen.weight]
        if layer is not None:
            name, reason = without_layer_number(frozen.weight, layer), without_layer_number(frozen.reason, layer)
            structures[layer].append((name, frozen.dim, frozen.size, reason))
    return {layer: tuple(structures[layer]) for layer in sorted(structures)}


def _summary(discovery: Discovery, layers: tuple[int, ...], names: ShortNames) -> LayerSummary:
    inside = layers or (None,)
    members: dict[str, list[Group]] = defaultdict(list)
    for group in discovery.groups:
        if group.layer in inside:
            members[group.family].append(group)
    summaries = tuple(
        GroupSummary(
            name=name,
            group=groups[0],
            unit=describe_unit(groups[0], discovery),
            slices=_slices(groups[0], names),
            coverage=coverage_of(groups, discovery),
        )
        for name, groups in members.items()
    )
    parameters = number_of_parameters(weight for weight in discovery.weights if weight.layer in inside)
    return LayerSummary(layers, summaries, parameters, parameters / count_parameters(discovery))


def _slices(group: Group, names: ShortNames) -> tuple[Slice, ...]:
    """What one unit is in every weight; weights of which it is the same together, a bias with its weight."""
    counts = {
        (axis.weight, axis.dim): (axis.expression.size - size_after(axis.expression, {group.name: 0})) // group.units
        for axis in group.axes
    }
    by_weight = {weight: count for (weight, _), count in counts.items()}
    merged: dict[tuple[int, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (weight, dim), count in counts.items():
        base = weight.removesuffix(".bias") + ".weight"
        if weight.endswith(".bias") and by_weight.get(base) == count:
            continue
        bias = weight.removesuffix(".weight") + ".bias"
        with_bias = weight.endswith(".weight") and by_weight.get(bias) == count
        what = position_name(names.shapes[weight], dim)
        merged[count, what]["+bias" if with_bias else ""].append(weight)
    return tuple(
        Slice(count, what, tuple(f"{name}{suffix}" for suffix, found in by.items() for name in names.of(found)))
        for (count, what), by in merged.items()
    )
