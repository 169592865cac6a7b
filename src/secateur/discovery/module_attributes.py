"""The module attributes that go with a cut which no config can say: a cut of some layers, or of some heads only.

An attribute that equals a dimension of its own weight in every module of its class (`out_features`) follows that
dimension. Any other (`num_key_value_groups`) takes the value that it has in the nearest twin; where that twin differs
elsewhere too, both values are tried. A choice is right when discovery finds, in the model that has it, exactly the
structure that the cut leaves.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.config_settings import has_structure, sizes_before_and_after, with_settings
from secateur.discovery.groups import Discovery
from secateur.discovery.layers import layer_of
from secateur.discovery.nearest_twins import modules_around, nearest_twin, parts_of
from secateur.discovery.sizes import PrunedSizes, shapes_after, shapes_of
from secateur.errors import DiscoveryError
from secateur.models.loading import skeleton
from secateur.models.modeling_per_layer import pad_in_place, padded_in, skip_in_place
from secateur.models.trust import runs_remote_code

logger = logging.getLogger(__name__)

MOST_TRIALS = 16  # combinations of values tried, of each sort
MOST_CHOICES = 4096  # combinations of values sorted

Place = tuple[str, str]  # module path, attribute
Mirrors = dict[tuple[type, str], tuple[str, int | None]]  # (class, attribute) -> (weight, dim; None: the whole shape)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A plain attribute of one module and the value it takes."""

    module: str
    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class _Search:
    """What is cut, and the dense model on `meta` whose attributes are to change."""

    config: PreTrainedConfig
    dense: PreTrainedModel
    discovery: Discovery
    pruned: PrunedSizes
    mirrors: Mirrors

    def place_in_any_layer(self, place: Place) -> Place:
        """The place with a star for the number of its layer: such attributes are decided together."""
        path, name = place
        layer = layer_of(path, self.discovery.layer_lists)
        return (path if layer is None else path.replace(f".{layer}", ".*", 1), name)

    def is_mirror(self, path: str, name: str) -> bool:
        """Whether the attribute follows a dimension of its own weight."""
        return (type(self.dense.get_submodule(path)), name) in self.mirrors


def attributes_after(
    config: PreTrainedConfig,
    discovery: Discovery,
    pruned: PrunedSizes,
    *,
    skipped: Mapping[str, Any] | None = None,
    padded: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Attribute, ...]:
    """The module attributes to change so that the model runs with the shapes that `pruned` says.

    Layers are not dropped here (a config can always say how many there are). `skipped` lists sub-layers that the model
    to be cut has lost already, of which its config does not say (see `sublayers`), `padded` the matrices that keep the
    dense layout (see `padding`). Raises `DiscoveryError` when no combination of values lets the model run.
    """

    def as_it_is() -> PreTrainedModel:
        model = skeleton(config, trust_remote_code=trust_remote_code)
        padded_in(model, remove=True)
        pad_in_place(model, padded or {})
        skip_in_place(model, skipped or {})
        return model

    dense = as_it_is()
    tried: set[str] = set()
    for attributes in _trials(_Search(config, dense, discovery, pruned, _mirrors(dense))):
        tried |= {each.name for each in attributes}
        # Running is not enough: with a wrong head size a reshape may succeed and mix the heads.
        model = as_it_is()
        apply_shapes_and_attributes_in_place(model, discovery, pruned, attributes)
        if has_structure(model, discovery, pruned):
            return attributes
    first = ", ".join(f"{name}={kept}" for name, kept in itertools.islice(pruned.sizes.items(), 3))
    raise DiscoveryError(
        f"{type(dense).__name__}: the model does not run with {first}, "
        f"whatever values its module attributes take (tried: {', '.join(sorted(tried)) or 'none has such a size'})"
    )


def _trials(search: _Search) -> Iterator[tuple[Attribute, ...]]:
    """Attributes that may be right, the likeliest first."""
    settled, undecided, settings = _values_in_twins(search)
    places = sorted({search.place_in_any_layer(place) for place in undecided})
    # A config of its own for a changed layer comes after: it is only for code that reads sizes from it in `forward`.
    combinations = itertools.product((False, True), itertools.product((True, False), repeat=len(places)))
    for own_config, follows in itertools.islice(combinations, MOST_TRIALS):
        chosen = dict(zip(places, follows, strict=True))
        values = {place: value for place, value in undecided.items() if chosen[search.place_in_any_layer(place)]}
        attributes = _changed_attributes(search, {**settled, **values})
        yield attributes + (_own_configs(search, settings) if own_config else ())
    # Code that writes into its config, and reads it in `forward`: every number of units in a copy of what it has now.
    for written in filter(None, (_copied_configs(search), _copied_configs(search, derived=True))):
        yield _changed_attributes(search, {**settled, **undecided}) + written
        yield _changed_attributes(search, settled) + written
    # Last, for sizes that no config gives: whatever has the size of something that the cut changes.
    options: dict[Place, dict[Place, list[int]]] = defaultdict(dict)
    for place, sizes in _values_by_size(search).items():
        options[search.place_in_any_layer(place)][place] = sizes
    places = sorted(options)
    # Choice i takes the i-th size; one past the last leaves the attribute as it is.
    choices = itertools.product(*(range(max(map(len, options[place].values())) + 1) for place in places))
    likeliest = sorted(itertools.islice(choices, MOST_CHOICES), key=lambda choice: sum(i != 0 for i in choice))
    for choice in likeliest[:MOST_TRIALS]:
        yield _changed_attributes(
            search,
            {
                at: sizes[i]
                for place, i in zip(places, choice, strict=True)
                for at, sizes in options[place].items()
                if i < len(sizes)
            },
        )


def _values_in_twins(search: _Search) -> tuple[dict[Place, Any], dict[Place, Any], dict[str, dict[str, Any]]]:
    """The values that attributes have in the nearest twins: settled where the twin is exact, else undecided.

    Also, module -> the settings of its nearest twins.
    """
    settled: dict[Place, Any] = {}
    undecided: dict[Place, Any] = {}
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    config, dense, discovery = search.config, search.dense, search.discovery
    trusted = runs_remote_code(dense)
    shapes = shapes_of(skeleton(config, trust_remote_code=trusted))
    for part in parts_of(discovery, search.pruned):
        nearest = nearest_twin(config, discovery, part, shapes, trust_remote_code=trusted)
        if nearest is None:
            continue
        pairs = sizes_before_and_after(discovery, part)
        for path in modules_around(discovery, part):
            settings[path].update(nearest.settings)
            in_twin = dict(plain_attributes(nearest.model.get_submodule(path)))
            for name, value in plain_attributes(dense.get_submodule(path)):
                if search.is_mirror(path, name) or in_twin.get(name, value) == value:
                    continue
                if nearest.exact:
                    settled[path, name] = in_twin[name]
                elif (value, in_twin[name]) in pairs:  # any other difference is not of this cut
                    undecided[path, name] = in_twin[name]
    return settled, undecided, settings


def _values_by_size(search: _Search) -> dict[Place, list[int]]:
    """The sizes after the cut of everything in a module's weights that had the attribute's value before."""
    options: dict[Place, list[int]] = {}
    layer_numbers = _layer_numbers(search.dense, search.discovery)
    for part in parts_of(search.discovery, search.pruned):
        pairs = sizes_before_and_after(search.discovery, part)
        for path in modules_around(search.discovery, part):
            module = search.dense.get_submodule(path)
            for name, value in plain_attributes(module):
                sizes = [after for before, after in pairs if before == value]
                if sizes and not search.is_mirror(path, name) and (type(module), name) not in layer_numbers:
                    options[path, name] = sizes
    return options


def _layer_numbers(model: nn.Module, discovery: Discovery) -> set[tuple[type, str]]:
    """(class, attribute) that is the number of its layer in every module of the class that lies in one: no size."""
    equal: dict[tuple[type, str], bool] = {}
    for path, module in model.named_modules():
        layer = layer_of(path, discovery.layer_lists)
        if layer is not None:
            for name, value in plain_attributes(module):
                equal[type(module), name] = equal.get((type(module), name), True) and value == layer
    return {key for key, always in equal.items() if always}


def _mirrors(model: nn.Module) -> Mirrors:
    """Attributes that equal a dimension of their own weight in every module of the class."""
    mirrors: dict[tuple[type, str], set[tuple[str, int | None]]] = {}
    for module in model.modules():
        for name, value in plain_attributes(module):
            equal: set[tuple[str, int | None]] = set()
            for weight, parameter in module.named_parameters(recurse=False):
                if isinstance(value, tuple) and value == tuple(parameter.shape):
                    equal.add((weight, None))
                equal |= {(weight, d) for d, size in enumerate(parameter.shape) if size == value}
            key = type(module), name
            mirrors[key] = mirrors[key] & equal if key in mirrors else equal
    return {
        key: min(equal, key=str)
        for key, equal in mirrors.items()
        if equal and len(equal) == len({weight for weight, _ in equal})  # two of one weight could be cut apart
    }


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


def _own_configs(search: _Search, settings: Mapping[str, Mapping[str, Any]]) -> tuple[Attribute, ...]:
    """A config with the settings of its twins for every module named that keeps one."""
    attributes = []
    for path, changes in settings.items():
        if isinstance(getattr(search.dense.get_submodule(path), "config", None), PreTrainedConfig):
            try:
                own = with_settings(search.config, changes)
            except Exception as error:  # a config may refuse a value in any way it likes
                logger.debug("no config of its own for %s: %s", path, error)
                continue
            own._attn_implementation = search.dense.config._attn_implementation
            attributes.append(Attribute(path, "config", own))
    return tuple(attributes)


def _copied_configs(search: _Search, *, derived: bool = False) -> tuple[Attribute, ...]:
    """For every module that keeps a config, a copy of it in which numbers of units are those after the cut.

    With `derived`, so are those of all that the cut changes, such as the heads that share the units.
    """
    kept: dict[str, dict[int, int]] = defaultdict(dict)
    for part in parts_of(search.discovery, search.pruned):
        sizes = dict(sizes_before_and_after(search.discovery, part)) if derived else {}
        sizes |= {search.discovery.group(name).units: after for name, after in part.sizes.items()}
        for path in modules_around(search.discovery, part):
            kept[path].update(sizes)
    attributes = []
    for path, sizes in kept.items():
        config = getattr(search.dense.get_submodule(path), "config", None)
        if isinstance(config, PreTrainedConfig):
            own = copy.deepcopy(config)
            for name, value in vars(config).items():
                if type(value) is int and value in sizes:
                    setattr(own, name, sizes[value])
            attributes.append(Attribute(path, "config", own))
    return tuple(attributes)


def _changed_attributes(search: _Search, values: Mapping[Place, Any]) -> tuple[Attribute, ...]:
    """Every attribute that changes: the mirrors of dimensions, and those with a value in `values`."""
    mirrored = mirrored_attributes(search.dense, search.discovery, search.pruned, mirrors=search.mirrors)
    attributes = [
        Attribute(path, name, values[path, name])
        for path, module in search.dense.named_modules()
        for name, value in plain_attributes(module)
        if not search.is_mirror(path, name) and values.get((path, name), value) != value
    ]
    return (*mirrored, *attributes)


def mirrored_attributes(
    dense: PreTrainedModel, discovery: Discovery, pruned: PrunedSizes, *, mirrors: Mirrors | None = None
) -> tuple[Attribute, ...]:
    """The attributes that equal a dimension of their module's own weight, where the cut changes it."""
    shapes = shapes_after(discovery, replace(pruned, dropped_layers=frozenset()))
    mirrors = _mirrors(dense) if mirrors is None else mirrors
    attributes = []
    for path, module in dense.named_modules():
        for name, value in plain_attributes(module):
            if (type(module), name) not in mirrors:
                continue
            weight, dim = mirrors[type(module), name]
            full = f"{path}.{weight}" if path else weight
            shape = shapes.get(discovery.tied.get(full, full))
            new = value if shape is None else shape if dim is None else shape[dim]
            if new != value:
                attributes.append(Attribute(path, name, new))
    return tuple(attributes)


def apply_shapes_and_attributes_in_place(
    model: nn.Module, discovery: Discovery, pruned: PrunedSizes, attributes: Iterable[Attribute]
) -> None:
    """Give a model on `meta` the shapes that the cut leaves, and the attributes that go with them."""
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    after = {name: before[name].new_empty(shape) for name, shape in shapes_after(discovery, pruned).items()}
    replace_in_place(model, after, discovery.tied, attributes)


def replace_in_place(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], attributes: Iterable[Attribute]
) -> None:
    """Give a model other parameters, buffers of other shapes, and other attributes.

    Tensors are named; `tied` says of every other name of a tied parameter which one it has among them.
    """
    parameters = {name: nn.Parameter(tensors[name], p.requires_grad) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            setattr(module, name, parameters[tied.get(full, full)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            new = tensors.get(f"{path}.{name}" if path else name)
            if new is not None and new.shape != buffer.shape:
                setattr(module, name, new)
    for attribute in attributes:
        setattr(model.get_submodule(attribute.module), attribute.name, attribute.value)
