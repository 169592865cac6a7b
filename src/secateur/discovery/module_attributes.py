"""The module attributes that go with a cut which no config can say: a cut of some layers, or of some heads only.

An attribute that equals a dimension of its own weight in every module of its class (`out_features`) follows that
dimension. Any other (`num_key_value_groups`) takes the value that it has in the nearest twin, the model built from a
config that agrees wherever the cut changes something; where that twin differs elsewhere too, both values are tried.
A choice is right when discovery finds, in the model that has it, exactly the structure that the cut leaves.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.algebra import Expression, variables_in
from secateur.discovery.config_settings import has_structure, sizes_before_and_after, twins, with_settings
from secateur.discovery.groups import Discovery
from secateur.discovery.layers import layer_of
from secateur.discovery.sizes import PrunedSizes, Shapes, shapes_after, shapes_of, structure_after
from secateur.errors import DiscoveryError
from secateur.models.loading import skeleton
from secateur.models.modeling_per_layer import skip_in_place
from secateur.models.trust import runs_remote_code

logger = logging.getLogger(__name__)

MOST_TRIALS = 16  # combinations of values tried, of each sort
MOST_CHOICES = 4096  # combinations of values sorted


@dataclass(frozen=True, slots=True)
class Attribute:
    """A plain attribute of one module and the value it takes."""

    module: str
    name: str
    value: Any


def attributes_after(
    config: PreTrainedConfig,
    discovery: Discovery,
    pruned: PrunedSizes,
    *,
    skipped: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Attribute, ...]:
    """The module attributes to change so that the model runs with the shapes that `pruned` says.

    Layers are not dropped here (a config can always say how many there are). `skipped` lists sub-layers that the model
    to be cut has lost already, of which its config does not say (see `sublayers`). Raises `DiscoveryError` when no
    combination of values lets the model run.
    """
    dense = skeleton(config, trust_remote_code=trust_remote_code)
    skip_in_place(dense, skipped or {})
    laws = _laws(dense)
    wanted = structure_after(discovery, pruned)
    tried: set[str] = set()
    for attributes in _trials(config, dense, discovery, pruned, laws):
        tried |= {each.name for each in attributes}
        # Running is not enough: with a wrong head size a reshape may succeed and mix the heads.
        model = skeleton(config, trust_remote_code=trust_remote_code)
        skip_in_place(model, skipped or {})
        apply_shapes_and_attributes_in_place(model, discovery, pruned, attributes)
        if has_structure(model, wanted):
            return attributes
    first = ", ".join(f"{name}={kept}" for name, kept in itertools.islice(pruned.sizes.items(), 3))
    raise DiscoveryError(
        f"{type(dense).__name__}: the model does not run with {first}, "
        f"whatever values its module attributes take (tried: {', '.join(sorted(tried)) or 'none has such a size'})"
    )


def _trials(
    config: PreTrainedConfig,
    dense: PreTrainedModel,
    discovery: Discovery,
    pruned: PrunedSizes,
    laws: Mapping[tuple[type, str], tuple[str, int | None]],
) -> Iterator[tuple[Attribute, ...]]:
    """Attributes that may be right, the likeliest first."""
    settled, undecided, configs = _by_twins(config, dense, discovery, pruned, laws)
    keys = sorted({_key(path, name, discovery) for path, name in undecided})
    # A config of its own for a changed layer comes after: it is only for code that reads sizes from it in `forward`.
    combinations = itertools.product((False, True), itertools.product((True, False), repeat=len(keys)))
    for own_config, follows in itertools.islice(combinations, MOST_TRIALS):
        chosen = dict(zip(keys, follows, strict=True))
        values = {at: twin for at, twin in undecided.items() if chosen[_key(*at, discovery)]}
        attributes = _every_module(dense, discovery, pruned, laws, {**settled, **values})
        yield attributes + (_own_configs(config, dense, configs) if own_config else ())
    # Last, for sizes that no config gives: whatever has the size of something that the cut changes.
    options = _by_value(dense, discovery, pruned, laws)
    keys = sorted({_key(path, name, discovery) for path, name in options})
    most = {key: max(len(found) for at, found in options.items() if _key(*at, discovery) == key) for key in keys}
    choices = itertools.product(*(range(most[key] + 1) for key in keys))
    likeliest = sorted(itertools.islice(choices, MOST_CHOICES), key=lambda choice: sum(i != 0 for i in choice))
    for choice in likeliest[:MOST_TRIALS]:
        number = dict(zip(keys, choice, strict=True))
        values = {}
        for at, found in options.items():
            if number[_key(*at, discovery)] < len(found):  # the last number leaves it as it is
                values[at] = found[number[_key(*at, discovery)]]
        yield _every_module(dense, discovery, pruned, laws, values)


def _by_value(
    dense: PreTrainedModel, discovery: Discovery, pruned: PrunedSizes, laws: Mapping[tuple[type, str], Any]
) -> dict[tuple[str, str], list[int]]:
    """(module, attribute) -> the sizes after the cut of everything in its weights that had the attribute's value."""
    options: dict[tuple[str, str], list[int]] = {}
    numbers = _layer_numbers(dense, discovery)
    for part in _parts(discovery, pruned):
        pairs = sizes_before_and_after(discovery, part)
        for path in sorted(_modules_holding(discovery, part)):
            module = dense.get_submodule(path)
            for name, value in plain_attributes(module):
                found = [after for before, after in pairs if before == value]
                if found and (type(module), name) not in laws.keys() | numbers:
                    options[path, name] = found
    return options


def _layer_numbers(model: nn.Module, discovery: Discovery) -> set[tuple[type, str]]:
    """(class, attribute) that is the number of its layer in every module of the class that lies in one: no size."""
    found: dict[tuple[type, str], bool] = {}
    for path, module in model.named_modules():
        layer = layer_of(path, discovery.layer_lists)
        if layer is not None:
            for name, value in plain_attributes(module):
                found[type(module), name] = found.get((type(module), name), True) and value == layer
    return {key for key, equal in found.items() if equal}


Key = tuple[str, str]  # module path with the layer's number left out, attribute


def _laws(model: nn.Module) -> dict[tuple[type, str], tuple[str, int | None]]:
    """(class, attribute) -> (weight, dim) that it equals in every module of the class; dim None: the whole shape."""
    laws: dict[tuple[type, str], set[tuple[str, int | None]]] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, value in plain_attributes(module):
            equal: set[tuple[str, int | None]] = set()
            for weight, parameter in own.items():
                if isinstance(value, tuple) and value == tuple(parameter.shape):
                    equal.add((weight, None))
                equal |= {(weight, d) for d, size in enumerate(parameter.shape) if size == value}
            key = type(module), name
            laws[key] = laws[key] & equal if key in laws else equal
    return {key: min(found, key=str) for key, found in laws.items() if found and _agree(found)}


def _agree(found: set[tuple[str, int | None]]) -> bool:
    """Whether the dimensions that an attribute equals are one per weight, so that they say the same."""
    weights = [weight for weight, _ in found]
    return len(weights) == len(set(weights))


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and value of every attribute of a module that may be a size: a number, or a tuple of whole ones.

    >>> list(plain_attributes(nn.Linear(4, 3)))
    [('in_features', 4), ('out_features', 3)]
    """
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value)):
            yield name, value


def _by_twins(
    config: PreTrainedConfig,
    dense: PreTrainedModel,
    discovery: Discovery,
    pruned: PrunedSizes,
    laws: Mapping[tuple[type, str], Any],
) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, str], Any], dict[str, dict[str, Any]]]:
    """(module, attribute) -> its value in the nearest twin: settled where the twin fits exactly, else undecided.

    Also, module -> the settings of its nearest twins.
    """
    settled: dict[tuple[str, str], Any] = {}
    undecided: dict[tuple[str, str], Any] = {}
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    trusted = runs_remote_code(dense)
    shapes = shapes_of(skeleton(config, trust_remote_code=trusted))
    for part in _parts(discovery, pruned):
        changes, nearest, exact = _nearest(config, discovery, part, shapes, trust_remote_code=trusted)
        pairs = sizes_before_and_after(discovery, part)
        if nearest is None:
            continue
        for path in sorted(_modules_holding(discovery, part)):
            configs[path].update(changes)
            twin = dict(plain_attributes(nearest.get_submodule(path)))
            for name, value in plain_attributes(dense.get_submodule(path)):
                lawful = (type(dense.get_submodule(path)), name) in laws
                if lawful or twin.get(name, value) == value:
                    continue
                if exact:
                    settled[path, name] = twin[name]
                elif (value, twin[name]) in pairs:  # any other difference is not of this cut
                    undecided[path, name] = twin[name]
    return settled, undecided, configs


def _own_configs(
    config: PreTrainedConfig, dense: PreTrainedModel, configs: Mapping[str, Mapping[str, Any]]
) -> tuple[Attribute, ...]:
    """A config with the settings of its twins for every module named that keeps one."""
    found = []
    for path, changes in configs.items():
        if isinstance(getattr(dense.get_submodule(path), "config", None), PreTrainedConfig):
            try:
                own = with_settings(config, changes)
            except Exception as error:  # a config may refuse a value in any way it likes
                logger.debug("no config of its own for %s: %s", path, error)
                continue
            own._attn_implementation = dense.config._attn_implementation
            found.append(Attribute(path, "config", own))
    return tuple(found)


def _parts(discovery: Discovery, pruned: PrunedSizes) -> list[PrunedSizes]:
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
        parts[frozenset((_family(name), changed[name]) for name in cluster)].update({n: changed[n] for n in cluster})
    return [PrunedSizes(names) for names in parts.values()]


def _nearest(
    config: PreTrainedConfig, discovery: Discovery, part: PrunedSizes, dense: Shapes, *, trust_remote_code: bool
) -> tuple[dict[str, Any], PreTrainedModel | None, bool]:
    """The twin that has the wanted sizes wherever the part changes one, with the fewest other differences.

    Its settings, the twin, and whether there are no other differences.
    """
    touched = {(w.name, d) for w in discovery.weights for d, e in enumerate(w.dims) if _touches(e, part)}
    everywhere = _spread(discovery, part)
    wanted = shapes_after(discovery, everywhere)
    best: tuple[int, dict[str, Any], PreTrainedModel] | None = None
    for changes, twin in twins(config, discovery, everywhere, [], dense=dense, trust_remote_code=trust_remote_code):
        shapes = shapes_of(twin)
        if not shapes.keys() >= wanted.keys() or any(shapes[w][d] != wanted[w][d] for w, d in touched):
            continue
        misses = sum(shapes[name] != wanted[name] for name in wanted)
        if misses == 0:
            return changes, twin, True
        if best is None or misses < best[0]:
            best = misses, changes, twin
    return (best[1], best[2], False) if best else ({}, None, False)


def _touches(expression: Expression, part: PrunedSizes) -> bool:
    return any(variable.name in part.sizes for variable in variables_in(expression))


def _spread(discovery: Discovery, part: PrunedSizes) -> PrunedSizes:
    """The same change in every layer, since a stock config has one size for all."""
    kept = part.sizes
    changes = {(discovery.group(name).kind, _family(name)): size for name, size in kept.items()}
    return PrunedSizes(
        {
            group.name: changes[group.kind, _family(group.name)]
            for group in discovery.groups
            if (group.kind, _family(group.name)) in changes
        }
    )


def _family(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if not piece.isdigit())


def _modules_holding(discovery: Discovery, part: PrunedSizes) -> set[str]:
    """Paths of the modules that own a weight the part changes, and of the modules around them inside a layer."""
    paths: set[str] = set()
    for weight in discovery.weights:
        if not any(_touches(dim, part) for dim in weight.dims):
            continue
        path = weight.name.rpartition(".")[0]
        while path and (weight.layer is None or layer_of(path, discovery.layer_lists) is not None):
            paths.add(path)
            path = path.rpartition(".")[0]
    return paths


def _key(path: str, name: str, discovery: Discovery) -> Key:
    layer = layer_of(path, discovery.layer_lists)
    return (path if layer is None else path.replace(f".{layer}", ".*", 1), name)


def _every_module(
    dense: nn.Module,
    discovery: Discovery,
    pruned: PrunedSizes,
    laws: Mapping[tuple[type, str], tuple[str, int | None]],
    values: Mapping[tuple[str, str], Any],
) -> tuple[Attribute, ...]:
    shapes = shapes_after(discovery, replace(pruned, dropped_layers=frozenset()))
    canonical = discovery.tied
    found = []
    for path, module in dense.named_modules():
        for name, value in plain_attributes(module):
            law = laws.get((type(module), name))
            new = value
            if law is not None:
                weight = f"{path}.{law[0]}" if path else law[0]
                shape = shapes.get(canonical.get(weight, weight))
                if shape is not None:
                    new = shape if law[1] is None else shape[law[1]]
            elif (path, name) in values:
                new = values[path, name]
            if new != value:
                found.append(Attribute(path, name, new))
    return tuple(found)


def apply_shapes_and_attributes_in_place(
    model: nn.Module, discovery: Discovery, pruned: PrunedSizes, attributes: Iterable[Attribute]
) -> None:
    """Give a model on `meta` the shapes that the cut leaves, and the attributes that go with them."""
    shapes = shapes_after(discovery, pruned)
    parameters = {
        name: nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False) for name, shape in shapes.items()
    }
    for path, module in model.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            setattr(module, name, parameters[discovery.tied.get(full, full)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            shape = shapes.get(f"{path}.{name}" if path else name)
            if shape is not None and shape != buffer.shape:
                setattr(module, name, torch.empty(shape, dtype=buffer.dtype, device="meta"))
    set_attributes_in_place(model, attributes)


def set_attributes_in_place(model: nn.Module, attributes: Iterable[Attribute]) -> None:
    """Set the plain attributes of the modules named."""
    for attribute in attributes:
        setattr(model.get_submodule(attribute.module), attribute.name, attribute.value)
