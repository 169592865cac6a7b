"""Which config settings and module attributes follow the size of a group: found by building twins, not listed.

A twin is the same model built on `meta` from a changed config; it costs milliseconds and no memory. To write a cut
into `config.json` we look for the fewest settings whose change gives a twin with exactly the shapes that are wanted.
Candidates for the new value of a setting are the sizes, after the cut, of anything that has the setting's value
before it: a group, a product of groups, a whole axis. Settings that are unset, or that the model's code asks for
though the config does not have them (`head_dim` in many), may be set too.

Where no config can say the cut (heads of a model whose head size is the hidden size divided by the heads), the
module attributes are still found: an attribute that equals a dimension of its own weight in every module of its class
follows that dimension, and the others take the value they have in the nearest twin, if the model then runs.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.axes import discover_groups
from secateur.axes.algebra import (
    Concat,
    Expression,
    Fixed,
    Product,
    Variable,
    concat,
    product,
    show,
    size_after,
    variables_in,
)
from secateur.axes.groups import Discovery, layer_of
from secateur.errors import DiscoveryError, PlanError
from secateur.models import skeleton

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
MOST_CHANGES = 4  # settings changed at once; every family needs fewer
MOST_TRIALS = 64  # combinations of module attributes tried


@dataclass(frozen=True, slots=True)
class Cut:
    """The sizes that a cut leaves: units kept per group (all, where not named), and layers dropped."""

    kept: tuple[tuple[str, int], ...] = ()
    dropped_layers: frozenset[int] = frozenset()

    @property
    def sizes(self) -> dict[str, int]:
        """Units kept by group name."""
        return dict(self.kept)


def stock_settings(config: PreTrainedConfig, discovery: Discovery, cut: Cut) -> dict[str, Any]:
    """The settings of `config` to change so that the stock model has exactly the shapes that `cut` leaves.

    Raises `PlanError` when the shapes differ from layer to layer, or when no setting, or no value that the config
    accepts, gives them.

    >>> from transformers import AutoConfig
    >>> from secateur.axes import discover_groups
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> discovery = discover_groups(skeleton(config))
    >>> stock_settings(config, discovery, Cut(tuple((f"layers.{i}.mlp", 36) for i in range(12))))
    {'ffn_dim': 36}
    """
    uneven = _uneven(discovery, cut)
    if uneven is not None:
        raise PlanError(uneven)
    wanted = wanted_shapes(discovery, cut)
    refusals: list[str] = []
    shallow = config if cut.dropped_layers else _shallow(config, discovery)
    for changes, twin in twins(shallow, discovery, cut, refusals):
        shapes = _shapes(twin)
        if all(wanted.get(name) == shape for name, shape in shapes.items()) and (
            shallow is config or _shapes(skeleton(with_settings(config, changes))) == wanted
        ):
            return changes
    kinds = sorted({discovery.group(name).kind for name, _ in cut.kept} | ({"layers"} if cut.dropped_layers else set()))
    because = f"the config refuses: {refusals[0]}" if refusals else "no setting of the config gives these sizes"
    sizes = sorted({(discovery.group(n).kind, k, discovery.group(n).units) for n, k in cut.kept})
    asked = ", ".join(f"{kind} {k} of {units}" for kind, k, units in sizes) or ", ".join(kinds)
    raise PlanError(f"{type(config).__name__} cannot describe the cut ({asked}): {because}")


def _shallow(config: PreTrainedConfig, discovery: Discovery) -> PreTrainedConfig:
    """The config with one layer, for a faster search; as it is, where no setting leaves the first layer alone."""
    layers = _depth(discovery)
    wanted = wanted_shapes(discovery, Cut((), frozenset(range(1, layers))))
    settings = dict(_settings(config))
    lists = {name: value[:1] for name, value in settings.items() if isinstance(value, list) and len(value) == layers}
    for name, value in settings.items():
        if value == layers and layers > 1:
            twin = _build(config, {name: 1, **lists}, [])
            if twin is not None and _shapes(twin) == wanted:
                return with_settings(config, {name: 1, **lists})
    return config


def _uneven(discovery: Discovery, cut: Cut) -> str | None:
    """Why the cut is not the same in all layers, or None."""
    by_kind: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for group in discovery.groups:
        if group.layer is not None and group.layer not in cut.dropped_layers:
            family = group.name.replace(f"layers.{group.layer}.", "", 1)
            by_kind[group.kind, family][group.name] = cut.sizes.get(group.name, group.units)
    for (kind, _), sizes in by_kind.items():
        touched = {name: size for name, size in sizes.items() if size != discovery.group(name).units}
        if touched and len(set(sizes.values())) > 1:
            low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            return f"{kind} differs between layers: {low} keeps {sizes[low]} units and {high} keeps {sizes[high]}"
    return None


def wanted_shapes(discovery: Discovery, cut: Cut) -> Shapes:
    """The shape of every weight after the cut, under the name it has when the layers left are numbered anew."""
    return {
        renamed(weight.name, discovery, cut): tuple(size_after(dim, cut.sizes) for dim in weight.dims)
        for weight in discovery.weights
        if weight.layer not in cut.dropped_layers
    }


def renamed(name: str, discovery: Discovery, cut: Cut) -> str:
    """The name of a weight or module after dropped layers have left the numbering."""
    layer = layer_of(name, discovery.layer_lists)
    if layer is None:
        return name
    prefix = next(prefix for prefix in discovery.layer_lists if name.startswith(f"{prefix}."))
    after = layer - sum(dropped < layer for dropped in cut.dropped_layers)
    return f"{prefix}.{after}{name[len(f'{prefix}.{layer}') :]}"


def with_settings(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of the config with the settings changed; "text_config.hidden_size" reaches into a sub-config."""
    data = config.to_dict()
    for name, value in changes.items():
        *path, last = name.split(".")
        holder = data
        for key in path:
            holder = holder[key]
        holder[last] = value
    changed: PreTrainedConfig = type(config).from_dict(data)
    return changed


def twins(
    config: PreTrainedConfig, discovery: Discovery, cut: Cut, refusals: list[str]
) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Models on `meta` with ever more settings changed; what the config says of those it refuses goes to `refusals`."""
    pairs = _sizes_before_and_after(discovery, cut)
    settings = dict(_settings(config))
    certain: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, list):
            if len(value) == _depth(discovery) and cut.dropped_layers:
                left = [item for i, item in enumerate(value) if i not in cut.dropped_layers]
                certain.append((name, left))
        elif value is not None:
            certain += [(name, after) for before, after in pairs if before == value and after != before]
    lists = [change for change in certain if isinstance(change[1], list)]
    numbers = [change for change in certain if not isinstance(change[1], list)]
    values = sorted({after for _, after in pairs} | _all_sizes(discovery), reverse=True)
    for extra in _optional(config, values):
        said = refusals if extra is None else []  # what it says of values tried blindly helps nobody
        for count in range(min(len(numbers), MOST_CHANGES) + 1):
            for subset in itertools.combinations(numbers, count):
                if len({name for name, _ in subset}) < count or not (count or extra):
                    continue
                changes = dict([*subset, *([extra] if extra else []), *lists])
                twin = _build(config, changes, said)
                if twin is not None:
                    yield changes, twin


def _optional(config: PreTrainedConfig, values: Sequence[int]) -> Iterator[tuple[str, int] | None]:
    """First nothing, then every value for every setting that may be set."""
    yield None
    yield from itertools.product(_unset_settings(config, values), values)


def _unset_settings(config: PreTrainedConfig, values: Sequence[int]) -> list[str]:
    """Settings that are unset, or absent and asked for, and of which one of the values changes a shape."""
    dense = _shapes(skeleton(config))
    found = []
    for name in [*(name for name, value in _settings(config) if value is None), *sorted(_asked_for(config))]:
        tried = (_build(config, {name: value}, []) for value in values)
        if any(twin is not None and _shapes(twin) != dense for twin in tried):
            found.append(name)
    return found


def _build(config: PreTrainedConfig, changes: Mapping[str, Any], refusals: list[str]) -> PreTrainedModel | None:
    try:
        with _quiet():
            return skeleton(with_settings(config, changes))
    except Exception as error:  # a config may refuse a value in any way it likes
        text = " ".join(str(error).split())
        refusals.append(f"{', '.join(f'{k}={v}' for k, v in changes.items())}: {text.rpartition('Error: ')[2]}")
        return None


@contextmanager
def _quiet(name: str = "transformers") -> Iterator[None]:
    """Libraries log what they think of odd values; while searching that is noise."""
    source = logging.getLogger(name)
    level = source.level
    source.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        source.setLevel(level)


def _settings(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Integer, unset and list settings by dotted name."""

    def walk(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in data.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif value is None or (isinstance(value, (int, list)) and not isinstance(value, bool)):
                yield f"{prefix}{key}", value

    return walk(config.to_dict(), "")


def _asked_for(config: PreTrainedConfig) -> set[str]:
    """Names of settings that the model's code asks for and the config does not have."""
    asked: set[str] = set()
    known = type(config)

    def missing(self: Any, name: str) -> Any:
        if not name.startswith("_"):
            asked.add(name)
        raise AttributeError(f"{known.__name__!r} object has no attribute {name!r}")

    probe = copy.deepcopy(config)
    probe.__class__ = type(known.__name__, (known,), {"__getattr__": missing})
    model_class = type(skeleton(config))
    try:
        with _quiet(), torch.device("meta"):
            model_class(probe)
    except Exception as error:
        logger.debug("probing %s for settings it asks for failed: %s", known.__name__, error)
    return {name for name in asked if name.isidentifier() and not hasattr(config, name)}


def _depth(discovery: Discovery) -> int:
    return next((group.units for group in discovery.groups if group.kind == "layer"), 0)


def _sizes_before_and_after(discovery: Discovery, cut: Cut) -> list[tuple[int, int]]:
    """Sizes, before and after, of everything within an axis that the cut changes."""
    pairs: dict[tuple[int, int], None] = {}
    for axis in _changed_axes(discovery, cut):
        for part in _subexpressions(axis):
            after = size_after(part, cut.sizes)
            if after != part.size:
                pairs[part.size, after] = None
    if cut.dropped_layers:
        depth = _depth(discovery)
        pairs[depth, depth - len(cut.dropped_layers)] = None
    return list(pairs)


def _all_sizes(discovery: Discovery) -> set[int]:
    """The sizes of everything within any axis: a head size is one of them, whoever derives it from what."""
    axes = {dim for weight in discovery.weights for dim in weight.dims}
    return {part.size for axis in axes for part in _subexpressions(axis) if not isinstance(part, Concat)}


def _changed_axes(discovery: Discovery, cut: Cut) -> list[Expression]:
    changed = {name for name, kept in cut.kept if kept != discovery.group(name).units}
    found = {
        dim: None
        for weight in discovery.weights
        for dim in weight.dims
        if any(variable.name in changed for variable in variables_in(dim))
    }
    return list(found)


def _subexpressions(expression: Expression) -> Iterator[Expression]:
    """The expression, its runs of neighbouring factors or parts, and theirs."""
    yield expression
    match expression:
        case Product(factors=items):
            build: Callable[[Sequence[Expression]], Expression] = product
        case Concat(parts=items):
            build = concat
        case _:
            return
    for length in range(1, len(items)):
        for start in range(len(items) - length + 1):
            run = items[start : start + length]
            yield build(run)
            if length == 1 and not isinstance(run[0], Fixed):
                yield from _subexpressions(run[0])
    if isinstance(expression, Product) and isinstance(items[0], Fixed):
        yield build([*items[1:]])


def _shapes(model: nn.Module) -> Shapes:
    persistent = model.state_dict().keys()
    tensors = itertools.chain(
        model.named_parameters(), ((name, b) for name, b in model.named_buffers() if name in persistent)
    )
    return {name: tuple(tensor.shape) for name, tensor in tensors}


# --- module attributes of a cut that no config can say ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attribute:
    """A plain attribute of one module and the value it takes."""

    module: str
    name: str
    value: Any


def attributes_after(config: PreTrainedConfig, discovery: Discovery, cut: Cut) -> tuple[Attribute, ...]:
    """The module attributes to change so that the model runs with the shapes that `cut` leaves.

    Layers are not dropped here (a config can always say how many there are). Raises `DiscoveryError` when no
    combination of values lets the model run.
    """
    dense = skeleton(config)
    laws = _laws(dense)
    settled, undecided, configs = _by_twins(config, dense, discovery, cut, laws)
    keys = sorted({_key(path, name, discovery) for path, name in undecided})
    wanted = _structure(discovery, cut)
    # A config of its own for a changed layer comes last: it is only for code that reads sizes from it in `forward`.
    combinations = itertools.product((False, True), itertools.product((True, False), repeat=len(keys)))
    for own_config, follows in itertools.islice(combinations, MOST_TRIALS):
        chosen = dict(zip(keys, follows, strict=True))
        values = {at: twin for at, twin in undecided.items() if chosen[_key(*at, discovery)]}
        attributes = _every_module(dense, discovery, cut, laws, {**settled, **values})
        if own_config:
            attributes += _own_configs(config, dense, configs)
        if _cut_structure(config, discovery, cut, attributes) == wanted:
            return attributes
    names = [name for _, name in keys]
    raise DiscoveryError(
        f"{type(dense).__name__}: the model does not run with {', '.join(f'{n}={k}' for n, k in cut.kept[:3])}, "
        f"whatever values its module attributes take (tried: {', '.join(names) or 'none depends on these sizes'})"
    )


Key = tuple[str, str]  # module path with the layer's number left out, attribute


def _laws(model: nn.Module) -> dict[tuple[type, str], tuple[str, int | None]]:
    """(class, attribute) -> (weight, dim) that it equals in every module of the class; dim None: the whole shape."""
    laws: dict[tuple[type, str], set[tuple[str, int | None]]] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, value in _plain_attributes(module):
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


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value)):
            yield name, value


def _by_twins(
    config: PreTrainedConfig,
    dense: PreTrainedModel,
    discovery: Discovery,
    cut: Cut,
    laws: Mapping[tuple[type, str], Any],
) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, str], Any], dict[str, dict[str, Any]]]:
    """(module, attribute) -> its value in the nearest twin: settled where the twin fits exactly, else undecided.

    Also, module -> the settings of its nearest twins.
    """
    settled: dict[tuple[str, str], Any] = {}
    undecided: dict[tuple[str, str], Any] = {}
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for part in _parts(discovery, cut):
        changes, nearest, exact = _nearest(config, discovery, part)
        pairs = _sizes_before_and_after(discovery, part)
        if nearest is None:
            continue
        for path in sorted(_modules_holding(discovery, part)):
            configs[path].update(changes)
            twin = dict(_plain_attributes(nearest.get_submodule(path)))
            for name, value in _plain_attributes(dense.get_submodule(path)):
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
            own = with_settings(config, changes)
            own._attn_implementation = dense.config._attn_implementation
            found.append(Attribute(path, "config", own))
    return tuple(found)


def _parts(discovery: Discovery, cut: Cut) -> list[Cut]:
    """The cut split by kind and size, so that each part changes one thing wherever it is changed."""
    by_change: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for name, kept in cut.kept:
        group = discovery.group(name)
        if kept != group.units:
            by_change[group.kind, kept].append((name, kept))
    return [Cut(tuple(changes)) for changes in by_change.values()]


def _nearest(
    config: PreTrainedConfig, discovery: Discovery, part: Cut
) -> tuple[dict[str, Any], PreTrainedModel | None, bool]:
    """The twin that has the wanted sizes wherever the part changes one, with the fewest other differences.

    Its settings, the twin, and whether there are no other differences.
    """
    touched = {(w.name, d) for w in discovery.weights for d, e in enumerate(w.dims) if _touches(e, part)}
    everywhere = _spread(discovery, part)
    wanted = wanted_shapes(discovery, everywhere)
    best: tuple[int, dict[str, Any], PreTrainedModel] | None = None
    for changes, twin in twins(config, discovery, everywhere, []):
        shapes = _shapes(twin)
        if shapes.keys() != wanted.keys() or any(shapes[w][d] != wanted[w][d] for w, d in touched):
            continue
        misses = sum(shapes[name] != wanted[name] for name in wanted)
        if misses == 0:
            return changes, twin, True
        if best is None or misses < best[0]:
            best = misses, changes, twin
    return (best[1], best[2], False) if best else ({}, None, False)


def _touches(expression: Expression, part: Cut) -> bool:
    return any(variable.name in part.sizes for variable in variables_in(expression))


def _spread(discovery: Discovery, part: Cut) -> Cut:
    """The same change in every layer, since a stock config has one size for all."""
    kept = part.sizes
    changes = {(discovery.group(name).kind, _family(name)): size for name, size in kept.items()}
    return Cut(
        tuple(
            (group.name, changes[group.kind, _family(group.name)])
            for group in discovery.groups
            if (group.kind, _family(group.name)) in changes
        )
    )


def _family(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if not piece.isdigit())


def _modules_holding(discovery: Discovery, part: Cut) -> set[str]:
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
    cut: Cut,
    laws: Mapping[tuple[type, str], tuple[str, int | None]],
    values: Mapping[tuple[str, str], Any],
) -> tuple[Attribute, ...]:
    shapes = wanted_shapes(discovery, replace(cut, dropped_layers=frozenset()))
    canonical = discovery.tied
    found = []
    for path, module in dense.named_modules():
        for name, value in _plain_attributes(module):
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


def _structure(discovery: Discovery, cut: Cut) -> dict[str, list[str]]:
    """How each axis is made of units after the cut, by size: "2·3·(64)" for 2 KV heads of 3 query heads of 64."""
    return {w.name: [_by_size(dim, cut.sizes) for dim in w.dims] for w in discovery.weights}


def _by_size(expression: Expression, sizes: Mapping[str, int]) -> str:
    def rename(part: Expression) -> Expression:
        match part:
            case Variable(name=name, size=size):
                after = sizes.get(name, size)
                return Variable(str(after), after)
            case Product(factors=factors):
                return product([rename(factor) for factor in factors])
            case Concat(parts=parts):
                return concat([rename(item) for item in parts])
            case Fixed():
                return part

    return show(rename(expression))


def _cut_structure(
    config: PreTrainedConfig, discovery: Discovery, cut: Cut, attributes: Iterable[Attribute]
) -> dict[str, list[str]] | None:
    """The structure that discovery finds in the model with these shapes and attributes; None if it does not run.

    Running is not enough: with a wrong head size a reshape may succeed and mix the heads.
    """
    model = skeleton(config)
    apply_shapes_and_attributes_in_place(model, discovery, cut, attributes)
    try:
        with _quiet("torch._subclasses.fake_tensor"):
            return _structure(discover_groups(model), Cut())
    except DiscoveryError as error:
        logger.debug("attributes %s: %s", attributes, error)
        return None


def apply_shapes_and_attributes_in_place(
    model: nn.Module, discovery: Discovery, cut: Cut, attributes: Iterable[Attribute]
) -> None:
    """Give a model on `meta` the shapes that the cut leaves, and the attributes that go with them."""
    parameters = {
        name: nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        for name, shape in wanted_shapes(discovery, cut).items()
    }
    for path, module in model.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            setattr(module, name, parameters[discovery.tied.get(full, full)])
    set_attributes_in_place(model, attributes)


def set_attributes_in_place(model: nn.Module, attributes: Iterable[Attribute]) -> None:
    """Set the plain attributes of the modules named."""
    for attribute in attributes:
        setattr(model.get_submodule(attribute.module), attribute.name, attribute.value)
