"""Channels within heads that go -> the matrices that keep the dense layout towards the code around them.

Most code has one head size for queries, keys and values, so values alone cannot be narrower in it. Where no config has
a setting for a cut of such channels, the matrices that make them are followed by zeros in the place of what is gone,
and those that read them leave these places out: the code around sees heads of the dense size, and the weights are
smaller.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.discovery.algebra import Concat, Expression, Product, Variable, size_after, variables_in
from secateur.discovery.config_settings import stock_settings
from secateur.discovery.groups import Discovery, Group
from secateur.discovery.module_attributes import Attribute, attributes_after, mirrored_attributes
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import DiscoveryError, PlanError
from secateur.models.loading import skeleton
from secateur.models.modeling_per_layer import padded_in

PADDED_KIND = "head_dim"
INPUT_DIM = {nn.Linear: 1, Conv1D: 0}  # class of a module -> the dimension of its weight that it reads with
FILLED_IN = ("architectures", "dtype")  # settings that a loaded model's config has besides, and no module follows
Parts = list[list[int]]  # runs, entries that stay at the start of each, all of each


@dataclass(frozen=True, slots=True)
class ModuleChanges:
    """What must change in the dense model's modules for them to run with smaller weights."""

    attributes: tuple[Attribute, ...]
    padded: Mapping[str, Mapping[str, Parts]]
    """As `pad_in_place` takes it."""


def module_changes(
    config: PreTrainedConfig,
    discovery: Discovery,
    pruned: PrunedSizes,
    *,
    skipped: Mapping[str, Any] | None = None,
    padded: Mapping[str, Mapping[str, Parts]] | None = None,
    trust_remote_code: bool = False,
) -> ModuleChanges:
    """The attributes and the padding with which the model runs in the sizes that `pruned` says; see `attributes_after`.

    `padded` is the padding that the model to be cut has already; by default, what its config says. The last answer is
    kept, because a run asks the same when it plans and at each cut. Raises `DiscoveryError` when no combination of
    values lets the model run.
    """
    dense = skeleton(config, trust_remote_code=trust_remote_code)
    before = padded_in(dense) if padded is None else padded
    content = type(config), {k: v for k, v in config.to_dict().items() if k not in FILLED_IN}, trust_remote_code
    question = content, discovery, pruned, skipped or {}, before
    if _LAST.get("question") != question:
        known: dict[str, Any] = {"skipped": skipped, "padded": before, "trust_remote_code": trust_remote_code}
        _LAST.update(question=question, answer=_changes(config, dense, discovery, pruned, known))
    answer: ModuleChanges = copy.deepcopy(_LAST["answer"])  # a config of its own is a module's to change
    return answer


_LAST: dict[str, Any] = {}  # the last question and its answer


def _changes(
    config: PreTrainedConfig, dense: PreTrainedModel, discovery: Discovery, pruned: PrunedSizes, known: dict[str, Any]
) -> ModuleChanges:
    before, trust_remote_code = known["padded"], known["trust_remote_code"]
    if not before and _whole_heads(discovery, pruned):
        with suppress(DiscoveryError):
            return ModuleChanges(attributes_after(config, discovery, pruned, **known), {})
    seen, after = padding_after(config, dense, discovery, pruned, padded=before, trust_remote_code=trust_remote_code)
    found = attributes_after(config, discovery, seen, **known)
    if after:
        kept = tuple(each for each in found if each.module not in after)
        mirrored = mirrored_attributes(dense, discovery, pruned)
        found = kept + tuple(each for each in mirrored if each.module in after)
    return ModuleChanges(found, after)


def padding_after(
    config: PreTrainedConfig,
    dense: PreTrainedModel,
    discovery: Discovery,
    pruned: PrunedSizes,
    *,
    padded: Mapping[str, Mapping[str, Parts]] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PrunedSizes, dict[str, dict[str, Parts]]]:
    """The sizes that the code around the weights sees, and the padding of matrices, as `pad_in_place` takes it.

    `dense` is the dense model, on `meta`. Groups that a config setting narrows are left to it, and so are those of
    which an axis is no input or output of a linear layer or of a norm. `padded` is the padding before the cut.
    Raises `DiscoveryError` where that cannot be told from what the cut leaves.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover_groups
    >>> sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1}
    >>> config = AutoConfig.for_model("granite", **sizes)
    >>> dense, cut = skeleton(config), PrunedSizes({"layers.0.head_dim": 5})
    >>> padding_after(config, dense, discover_groups(dense), cut)[1]["model.layers.0.self_attn.v_proj"]
    {'outputs': [[3, 5, 8]]}
    """
    by_family: dict[str, list[Group]] = defaultdict(list)
    for group in discovery.groups:
        if group.kind == PADDED_KIND and pruned.sizes.get(group.name, group.units) < group.units:
            by_family[group.family].append(group)
    narrower = {
        group.name: pruned.sizes[group.name]
        for groups in by_family.values()
        if not _has_setting(config, discovery, groups[0], trust_remote_code=trust_remote_code)
        for group in groups
        if _can_be_padded(dense, discovery, group)
    }
    seen = PrunedSizes({n: k for n, k in pruned.sizes.items() if n not in narrower}, pruned.dropped_layers)
    found: dict[str, dict[str, Parts]] = defaultdict(dict)
    for weight in discovery.weights:
        for dim, expression in enumerate(weight.dims) if weight.name.endswith(".weight") else ():
            parts = _joined(_parts(expression, seen.sizes, narrower))
            for path, module in _modules_with(dense, discovery, weight.name).items():
                for side in _sides(module, dim):
                    earlier = (padded or {}).get(path, {}).get(side)
                    if earlier is not None:
                        found[path][side] = _composed(path, earlier, parts, expression.size)
                    elif any(variable.name in narrower for variable in variables_in(expression)):
                        found[path][side] = parts
    return seen, dict(found)


def _whole_heads(discovery: Discovery, pruned: PrunedSizes) -> bool:
    """Whether equally many channels of queries, keys and values stay wherever some go, so that heads have one size."""
    by_layer: dict[int | None, list[int]] = defaultdict(list)
    for group in discovery.groups:
        if group.kind == PADDED_KIND:
            by_layer[group.layer].append(pruned.sizes.get(group.name, group.units))
    cut = {group.layer for group in discovery.groups if group.kind == PADDED_KIND and group.name in pruned.sizes}
    return bool(cut) and all(len(by_layer[layer]) > 1 and len(set(by_layer[layer])) == 1 for layer in cut)


def _has_setting(
    config: PreTrainedConfig, discovery: Discovery, group: Group, *, trust_remote_code: bool = False
) -> bool:
    """Whether a config can say that such groups of all layers are smaller."""
    sizes = {g.name: g.units // 2 for g in discovery.groups if g.family == group.family and g.units > 1}
    try:
        stock_settings(config, discovery, PrunedSizes(sizes), trust_remote_code=trust_remote_code)
    except PlanError:
        return False
    return True


def _modules_with(dense: nn.Module, discovery: Discovery, weight: str) -> dict[str, nn.Module]:
    """The modules that hold a weight, by path: several, where it is tied and they are not one."""
    names = [weight, *(other for other, name in discovery.tied.items() if name == weight)]
    modules = {id(dense.get_submodule(path)): path for path in reversed([name.rpartition(".")[0] for name in names])}
    return {path: dense.get_submodule(path) for path in modules.values()}


def _sides(module: nn.Module, dim: int) -> tuple[str, ...]:
    """Where a dimension of a module's weight meets the code around; empty where that is not known."""
    if type(module) in INPUT_DIM:
        return ("inputs",) if dim == INPUT_DIM[type(module)] else ("outputs",)
    is_norm = all(parameter.dim() == 1 for parameter in module.parameters()) and not [*module.children()]
    return ("inputs", "outputs") if is_norm and "weight" in dict(module.named_parameters()) else ()


def _can_be_padded(dense: nn.Module, discovery: Discovery, group: Group) -> bool:
    """Whether all that a group's units touch are inputs and outputs of linear layers, and of norms that count them."""
    seen_by_norm = False
    for axis in group.axes:
        sides = [_sides(module, axis.dim) for module in _modules_with(dense, discovery, axis.weight).values()]
        if axis.weight.rpartition(".")[2] not in ("weight", "bias") or not all(sides):
            return False
        seen_by_norm |= any(len(each) == 2 for each in sides)
    return seen_by_norm == group.normed and not group.chosen  # a norm without a weight is nowhere to be found


def _parts(expression: Expression, sizes: Mapping[str, int], padded: Mapping[str, int]) -> Parts:
    """The runs of a dimension after the cut, of which the code sees the padded groups whole."""
    match expression:
        case Variable(name=name, size=size) if name in padded:
            return [[1, padded[name], size]]
        case Concat(parts=pieces):
            return [part for piece in pieces for part in _parts(piece, sizes, padded)]
        case Product(factors=(first, *rest)):
            inner = _joined(_parts(Product(tuple(rest)) if len(rest) > 1 else rest[0], sizes, padded))
            if not any(variable.name in padded for variable in variables_in(first)):
                n = size_after(first, sizes)
                return [[n * inner[0][0], *inner[0][1:]]] if len(inner) == 1 else inner * n
            width = sum(n * whole for n, _, whole in inner)  # what varies fastest is whole: one group is cut once
            return [[n, kept * width, whole * width] for n, kept, whole in _parts(first, sizes, padded)]
    n = size_after(expression, sizes)
    return [[1, n, n]]


def _composed(path: str, earlier: Parts, parts: Parts, size: int) -> Parts:
    """The padding of a dimension that was padded, and has been cut again from a size to these parts."""
    if parts == [[1, size, size]]:
        return earlier
    (n, kept, whole), (_, before, dense) = parts[0], earlier[0]
    if len(parts) == len(earlier) == 1 and whole == before:
        return [[n, kept, dense]]
    if len(parts) == len(earlier) == 1 and kept == whole and kept % before == 0:  # whole heads
        return [[kept // before, before, dense]]
    raise DiscoveryError(f"{path} has channels of heads beside others and lost some before: cut them all at once")


def _joined(parts: Parts) -> Parts:
    """Neighbours that stay whole as one run."""
    joined: Parts = []
    for n, kept, whole in parts:
        if kept == whole:
            n, kept, whole = 1, n * whole, n * whole
            if joined and joined[-1][1] == joined[-1][2]:
                whole += joined.pop()[2]
                kept = whole
        joined.append([n, kept, whole])
    return joined
