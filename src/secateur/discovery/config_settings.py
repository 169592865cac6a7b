"""A discovery and the sizes that a plan leaves -> the config settings that say them: found by building twins.

A twin is the same model built on `meta` from a changed config; it costs milliseconds and no memory. To write a cut
into `config.json` we look for the fewest settings whose change gives a twin with exactly the shapes that are wanted.
Candidates for the new value of a setting are the sizes, after the cut, of anything that has the setting's value
before it: a group, a product of groups, a whole axis. Settings that are unset, or that the model's code reads though
the config does not have them (`head_dim` in many), may be set too.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.algebra import Concat, Expression, Fixed, Product, concat, product, size_after, variables_in
from secateur.discovery.discover import discover_groups
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes, Shapes, shapes_after, shapes_of, structure_after
from secateur.discovery.tracing import FAKE_TENSORS
from secateur.errors import DiscoveryError, PlanError
from secateur.models.loading import skeleton
from secateur.models.silence import quiet, silence_logger

logger = logging.getLogger(__name__)

MOST_CHANGES = 2  # settings changed at once, besides those that surely are; every family needs fewer
MOST_TWINS = 200  # twins built at most in search of one
ENOUGH_SIZES = 3  # that a model accepts for a setting without changing a shape, to say that none does


@quiet()
@silence_logger("transformers")
def stock_settings(
    config: PreTrainedConfig, discovery: Discovery, pruned: PrunedSizes, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The settings of `config` to change so that the stock model has exactly the shapes that `pruned` says.

    With `trust_remote_code` the twins may run the custom code that the config names. Raises `PlanError` when the
    shapes differ from layer to layer, or when no setting, or no value that the config accepts, gives them.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover_groups
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> discovery = discover_groups(skeleton(config))
    >>> stock_settings(config, discovery, PrunedSizes({f"layers.{i}.mlp": 36 for i in range(12)}))
    {'ffn_dim': 36}
    """
    if pruned.emptied:
        raise PlanError(f"{pruned.emptied[0]} goes as a whole, which no stock config says")
    per_layer = _per_layer_sizes(discovery, pruned)
    if per_layer is not None:
        raise PlanError(per_layer)
    wanted = shapes_after(discovery, pruned)
    refusals: list[str] = []
    by_layer = pruned.dropped_layers or any(
        isinstance(value, list) for _, value in _changes_by_value(config, discovery, pruned)[1]
    )
    shallow = config if by_layer else _shallow(config, discovery, pruned, trust_remote_code=trust_remote_code)
    for changes, twin in twins(shallow, discovery, pruned, refusals, trust_remote_code=trust_remote_code):
        if any(wanted.get(name) != shape for name, shape in shapes_of(twin).items()):
            continue
        whole = skeleton(with_settings(config, changes), trust_remote_code=trust_remote_code)
        if shapes_of(whole) == wanted and has_structure(whole, discovery, pruned):
            return changes
    because = f"the config refuses: {refusals[0]}" if refusals else "no setting of the config gives these sizes"
    sizes = sorted({(discovery.group(n).kind, k, discovery.group(n).units) for n, k in pruned.sizes.items()})
    wanted_sizes = ", ".join(f"{kind} {k} of {units}" for kind, k, units in sizes) or "layers"
    raise PlanError(f"{type(config).__name__} cannot describe the cut ({wanted_sizes}): {because}")


def _shallow(
    config: PreTrainedConfig, discovery: Discovery, pruned: PrunedSizes, *, trust_remote_code: bool
) -> PreTrainedConfig:
    """The config with the first layers alone that hold something of every kind that is cut, for a faster search.

    As it is, where no setting leaves these.
    """
    first: dict[tuple[str, str], int] = {}  # kind and family -> the first layer that holds them
    for group in discovery.groups:
        if group.name in pruned.sizes and group.layer is not None:
            first.setdefault((group.kind, group.family), group.layer)
    layers, kept = discovery.depth, 1 + max(first.values(), default=0)
    if kept >= layers:
        return config
    wanted = shapes_after(discovery, PrunedSizes(dropped_layers=frozenset(range(kept, layers))))
    settings = dict(_settings(config.to_dict()))
    lists = {name: value[:kept] for name, value in settings.items() if isinstance(value, list) and len(value) == layers}
    for name, value in settings.items():
        if value == layers:
            twin = _build(config, {name: kept, **lists}, [], trust_remote_code=trust_remote_code)
            if twin is not None and shapes_of(twin) == wanted:
                return with_settings(config, {name: kept, **lists})
    return config


def _per_layer_sizes(discovery: Discovery, pruned: PrunedSizes) -> str | None:
    """Where sizes differ from layer to layer, or None."""
    by_kind: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for group in discovery.groups:
        if group.layer is not None and group.layer not in pruned.dropped_layers:
            by_kind[group.kind, group.family][group.name] = pruned.sizes.get(group.name, group.units)
    for (kind, _), sizes in by_kind.items():
        touched = {name: size for name, size in sizes.items() if size != discovery.group(name).units}
        if touched and len(set(sizes.values())) > 1:
            low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            return f"{kind} differs between layers: {low} keeps {sizes[low]} units and {high} keeps {sizes[high]}"
    return None


def has_structure(model: nn.Module, dense: Discovery, pruned: PrunedSizes) -> bool:
    """Whether discovery finds exactly what the cut leaves of the dense model; not, where it does not even run."""
    try:
        with silence_logger(FAKE_TENSORS):
            found = discover_groups(model, start_tokens=dense.start_tokens)
            return structure_after(found, PrunedSizes()) == structure_after(dense, pruned)
    except DiscoveryError as error:
        logger.debug("%s does not run: %s", type(model).__name__, error)
        return False


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
    config: PreTrainedConfig,
    discovery: Discovery,
    pruned: PrunedSizes,
    refusals: list[str],
    *,
    dense: Shapes | None = None,
    trust_remote_code: bool = False,
) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Models on `meta` with more and more settings changed; a config's reasons to refuse one are added to `refusals`.

    `dense` are the shapes of the config as it is, where they are known. A setting that alone changes only what is to
    change, as wanted, is always changed; one that alone changes only what is to stay is changed only beside an unset
    one, which may put that right (a head size that was derived).
    """
    lists, numbers = _changes_by_value(config, discovery, pruned)
    wanted = shapes_after(discovery, pruned)
    shapes = shapes_of(skeleton(config, trust_remote_code=trust_remote_code)) if dense is None else dense
    # Build a twin for each single change, and sort the changes by what they do to the shapes.
    built: dict[str, PreTrainedModel | None] = {}  # to be yielded once
    always: dict[str, Any] = {}  # changes only what is to change, as wanted
    maybe: Changes = []
    doubtful: Changes = []  # changes only what is to stay
    for name, value in numbers:
        twin = built[repr({name: value})] = _build(config, {name: value}, [], trust_remote_code=trust_remote_code)
        good, bad = _effect(shapes, shapes_of(twin), wanted) if twin is not None else (False, False)
        if good and not bad and name not in always:
            always[name] = value
        elif good or not bad:
            maybe.append((name, value))
        else:
            doubtful.append((name, value))
    # A list that is as long as there are layers may have another meaning: without one of them each, too.
    lists_cut = [lists, *([other for other in lists if other != each] for each in lists if len(lists) > 1)]
    candidates = (
        (always | dict([*subset, *([unset] if unset else []), *by_layer]), unset is None)
        for unset in _unset_values(config, discovery, pruned, trust_remote_code=trust_remote_code)
        for usable in [maybe if unset is None else [*maybe, *doubtful]]
        for count in range(min(len(usable), MOST_CHANGES) + 1)
        for subset in itertools.combinations(usable, count)
        if len({name for name, _ in subset}) == count
        for by_layer in lists_cut
    )
    for changes, certain in itertools.islice(candidates, MOST_TWINS):
        messages = refusals if certain else []  # what it says of values tried blindly helps nobody
        twin = built.pop(repr(changes), None)
        if twin is None and changes:
            twin = _build(config, changes, messages, trust_remote_code=trust_remote_code)
        if twin is not None:
            yield changes, twin


Changes = list[tuple[str, Any]]


def _changes_by_value(config: PreTrainedConfig, discovery: Discovery, pruned: PrunedSizes) -> tuple[Changes, Changes]:
    """Lists with one entry for each layer, without the layers dropped; and settings that have a size which changes."""
    pairs = sizes_before_and_after(discovery, pruned)
    lists: Changes = []
    numbers: Changes = []
    for name, value in _settings(config.to_dict()):
        if isinstance(value, list):
            if len(value) == discovery.depth and pruned.dropped_layers:
                lists.append((name, [item for i, item in enumerate(value) if i not in pruned.dropped_layers]))
            elif value and all(type(item) is int for item in value):
                numbers += [
                    (name, [after if item == before else item for item in value])
                    for before, after in pairs
                    if before in value
                ]
        elif value is not None:
            numbers += [(name, after) for before, after in pairs if before == value]
    return lists, numbers


def _effect(dense: Shapes, twin: Shapes, wanted: Shapes) -> tuple[bool, bool]:
    """Whether a twin differs from the dense model where it should, and whether it does where or as it should not."""
    good = bad = False
    for name in dense.keys() | twin.keys():
        for before, after, aim in itertools.zip_longest(*(shapes.get(name, ()) for shapes in (dense, twin, wanted))):
            if before != after:
                good |= aim != before  # even if not yet right: another setting may do the rest
                bad |= aim != after
    return good, bad


def _unset_values(
    config: PreTrainedConfig, discovery: Discovery, pruned: PrunedSizes, *, trust_remote_code: bool
) -> Iterator[tuple[str, int] | None]:
    """First None, then every value for every setting that may be set; first what the code derives for it."""
    yield None
    sizes = tuple(sorted(_all_sizes(discovery), reverse=True))
    values = sorted({after for _, after in sizes_before_and_after(discovery, pruned)} | set(sizes), reverse=True)
    key = type(config), config.to_json_string(use_diff=False), sizes, trust_remote_code
    if key not in _UNSET_SETTINGS:
        _UNSET_SETTINGS[key] = _unset_settings(config, sizes, trust_remote_code=trust_remote_code)
    settings = _UNSET_SETTINGS[key]
    likely = [(name, value) for name, derived in settings for value in derived]
    yield from likely
    yield from (pair for pair in itertools.product([name for name, _ in settings], values) if pair not in likely)


UnsetSettings = list[tuple[str, list[int]]]
_UNSET_SETTINGS: dict[tuple[Any, ...], UnsetSettings] = {}  # by a config's content: the search takes hundreds of twins


def _unset_settings(config: PreTrainedConfig, sizes: tuple[int, ...], *, trust_remote_code: bool) -> UnsetSettings:
    """Settings that are unset, or absent but read by the code, of which one of the sizes changes a shape.

    With each, the sizes that change none: a value that the code derives, such as the head size.
    """
    dense = skeleton(config, trust_remote_code=trust_remote_code)
    shapes = shapes_of(dense)
    found = []
    for name in [
        *(name for name, value in _settings(config.to_dict()) if value is None),
        *sorted(_settings_read(config, dense)),
    ]:
        twins_ = ((size, _build(config, {name: size}, [], trust_remote_code=trust_remote_code)) for size in sizes)
        accepted = ((size, shapes_of(twin) == shapes) for size, twin in twins_ if twin is not None)
        first = list(itertools.islice(accepted, ENOUGH_SIZES))
        if not all(same for _, same in first):
            found.append((name, [size for size, same in [*first, *accepted] if same]))
    return found


def _build(
    config: PreTrainedConfig, changes: Mapping[str, Any], refusals: list[str], *, trust_remote_code: bool
) -> PreTrainedModel | None:
    try:
        return skeleton(with_settings(config, changes), trust_remote_code=trust_remote_code)
    except Exception as error:  # a config may refuse a value in any way it likes
        text = " ".join(str(error).split())
        refusals.append(f"{', '.join(f'{k}={v}' for k, v in changes.items())}: {text.rpartition('Error: ')[2]}")
        return None


def _settings(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Integer, unset and list settings of a config as data, by dotted name."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        elif value is None or (isinstance(value, (int, list)) and not isinstance(value, bool)):
            yield f"{prefix}{key}", value


def _settings_read(config: PreTrainedConfig, model: PreTrainedModel) -> set[str]:
    """Names of settings that the model's code reads and the config does not have."""
    read: set[str] = set()
    known = type(config)

    def missing(self: Any, name: str) -> Any:
        if not name.startswith("_"):
            read.add(name)
        raise AttributeError(f"{known.__name__!r} object has no attribute {name!r}")

    probe = copy.deepcopy(config)
    probe.__class__ = type(known.__name__, (known,), {"__getattr__": missing})
    try:
        with torch.device("meta"):
            type(model)(probe)
    except Exception as error:
        logger.debug("probing %s for settings that its code reads failed: %s", known.__name__, error)
    return {name for name in read if name.isidentifier() and not hasattr(config, name)}


def sizes_before_and_after(discovery: Discovery, pruned: PrunedSizes) -> list[tuple[int, int]]:
    """Sizes, before and after, of everything within an axis that the cut changes."""
    changed = {name for name, kept in pruned.sizes.items() if kept != discovery.group(name).units}
    dims = dict.fromkeys(dim for weight in discovery.weights for dim in weight.dims)
    pairs: dict[tuple[int, int], None] = {}
    for axis in (dim for dim in dims if any(variable.name in changed for variable in variables_in(dim))):
        for part in _subexpressions(axis):
            after = size_after(part, pruned.sizes)
            if after != part.size:
                pairs[part.size, after] = None
    if pruned.dropped_layers:
        pairs[discovery.depth, discovery.depth - len(pruned.dropped_layers)] = None
    return list(pairs)


def _all_sizes(discovery: Discovery) -> set[int]:
    """The sizes of everything within any axis: a head size is one of them, whoever derives it from what."""
    axes = {dim for weight in discovery.weights for dim in weight.dims}
    return {part.size for axis in axes for part in _subexpressions(axis) if not isinstance(part, Concat)}


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
