"""A cut that no config can say -> the twins that come nearest to it, part by part.

A cut splits into parts that meet in no weight: the MLP of a layer, its attention. For each part there may be a config
that gives the wanted sizes wherever the part changes one, at the price of the same change in every layer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.algebra import Expression, variables_in
from secateur.discovery.config_settings import twins
from secateur.discovery.groups import Discovery
from secateur.discovery.layers import layer_of, path_and_parents
from secateur.discovery.sizes import PrunedSizes, Shapes, shapes_after, shapes_of
from secateur.discovery.weight_names import without_numbers
from secateur.models.silence import quiet, silence_logger


@dataclass(frozen=True, slots=True)
class NearestTwin:
    """A model on `meta` that has the sizes of one part of the cut, and the settings that make it."""

    model: PreTrainedModel
    settings: dict[str, Any]
    exact: bool  # whether it differs nowhere else from the dense model with this part cut in every layer


def parts_of(discovery: Discovery, pruned: PrunedSizes) -> list[PrunedSizes]:
    """The cut split into changes that meet in no weight; layers in which they are the same share a part."""
    changed = {name: kept for name, kept in pruned.sizes.items() if kept != discovery.group(name).units}
    clusters: list[set[str]] = []
    for weight in discovery.weights:
        here = {variable.name for dim in weight.dims for variable in variables_in(dim)} & changed.keys()
        if here:
            meeting = [cluster for cluster in clusters if cluster & here]
            clusters = [cluster for cluster in clusters if cluster not in meeting] + [here.union(*meeting)]
    parts: dict[frozenset[tuple[str, int]], dict[str, int]] = defaultdict(dict)
    for cluster in clusters:
        parts[frozenset((without_numbers(name), changed[name]) for name in cluster)].update(
            {n: changed[n] for n in cluster}
        )
    return [PrunedSizes(names) for names in parts.values()]


@quiet()
@silence_logger("transformers")
def nearest_twin(
    config: PreTrainedConfig, discovery: Discovery, part: PrunedSizes, dense: Shapes, *, trust_remote_code: bool
) -> NearestTwin | None:
    """The twin with the wanted sizes wherever the part changes one, and the fewest other differences; None: no such."""
    touched = {(w.name, d) for w in discovery.weights for d, dim in enumerate(w.dims) if _touches(dim, part)}
    everywhere = _in_every_layer(discovery, part)
    wanted = shapes_after(discovery, everywhere)
    fewest, best = len(wanted) + 1, None
    for settings, twin in twins(config, discovery, everywhere, [], dense=dense, trust_remote_code=trust_remote_code):
        shapes = shapes_of(twin)
        if not shapes.keys() >= wanted.keys() or any(shapes[w][d] != wanted[w][d] for w, d in touched):
            continue
        differences = sum(shapes[name] != wanted[name] for name in wanted)
        if differences < fewest:
            fewest, best = differences, NearestTwin(twin, settings, exact=differences == 0)
        if differences == 0:
            break
    return best


def _touches(dim: Expression, part: PrunedSizes) -> bool:
    return any(variable.name in part.sizes for variable in variables_in(dim))


def _in_every_layer(discovery: Discovery, part: PrunedSizes) -> PrunedSizes:
    """The same change in every layer, since a stock config has one size for all."""
    changes = {(discovery.group(name).kind, without_numbers(name)): size for name, size in part.sizes.items()}
    families = {group.name: (group.kind, without_numbers(group.name)) for group in discovery.groups}
    return PrunedSizes({name: changes[family] for name, family in families.items() if family in changes})


def modules_around(discovery: Discovery, part: PrunedSizes) -> list[str]:
    """Paths of the modules that own a weight the part changes, and of the modules around them inside a layer."""
    return sorted(
        {
            path
            for weight in discovery.weights
            if any(_touches(dim, part) for dim in weight.dims)
            for path in path_and_parents(weight.name)[1:]
            if weight.layer is None or layer_of(path, discovery.layer_lists) is not None
        }
    )
