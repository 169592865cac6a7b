"""Statistics -> one score per unit of each group.

Saliences are there as sums by channel (one index of a dimension of a weight). Discovery says which unit each channel
belongs to; an axis of a group adds up the channels of each unit, and the group's axes are reduced. Axes: N spans of
tokens, S channels, U units.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from secateur.discovery.algebra import Expression, units_along, variables_in
from secateur.discovery.groups import Discovery, Group
from secateur.errors import ScoreError
from secateur.scoring.registry import REDUCTIONS, SCORES
from secateur.scoring.statistics import Statistics


def unit_scores(
    discovery: Discovery,
    statistics: Statistics,
    *,
    groups: Sequence[Group] | None = None,
    name: str,
    reduce: str = "sum",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores by group: float32, one per unit. A layer's axes are all of its weights, whole.

    By default, those groups are scored of which the statistics say something. Raises `ScoreError` for a weight that the
    statistics lack, and for a group in `groups` of which they say nothing.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> unit_scores(discover(config), Statistics({}), name="random")["layers.0.mlp"].shape
    torch.Size([24])
    """
    scored = discovery.groups if groups is None else groups
    if name == "random":
        return {group.name: _random(group, seed) for group in scored}
    if groups is not None:
        check_kinds(name, groups)
    if SCORES[name].needs == "masks":
        axes = _mask_axes(discovery, statistics, scored)
    elif SCORES[name].salience is None:
        by_group = statistics.units.get(name, {})
        axes = {group.name: [*by_group.get(group.name, {}).values()] for group in scored}
    else:
        axes = _salience_axes(discovery, statistics, scored, name, reduce)
    for group in groups or ():
        if not axes.get(group.name):
            raise ScoreError(
                f"score {name} knows nothing of {group.name}: no product with a weight that we follow reads its units. "
                "Use a score of gradients, for example --score param_second"
            )
    return {group.name: REDUCTIONS[reduce](torch.stack(axes[group.name])) for group in scored if axes.get(group.name)}


def check_kinds(name: str, groups: Iterable[Group]) -> None:
    """Raise `ScoreError` where a score says nothing about groups of such kinds."""
    needs = SCORES[name].needs
    for group in groups:
        if needs in ("layers", "losses") and group.kind != "layer":
            raise ScoreError(f"score {name} compares whole layers, not {group.kind}: cut layers, with --axes layers")
        if needs == "experts" and group.kind != "expert":
            raise ScoreError(f"score {name} compares whole experts, not {group.kind}: cut experts, with --axes experts")
        if needs in ("grams", "masks") and group.kind == "layer":
            raise ScoreError(f"score {name} is not for whole layers: use --score block_influence, or cut other axes")


def units_reached(expression: Expression, groups: Collection[str]) -> dict[str, Tensor]:
    """Which units a dimension of a weight holds: group -> for each channel its unit, -1 for none (int64)."""
    names = dict.fromkeys(variable.name for variable in variables_in(expression) if variable.name in groups)
    return {name: torch.tensor(units_along(expression, name)) for name in names}


def _sum_channels(channels: Tensor, unit_of_S: Tensor, units: int) -> Tensor:
    """Add up the channels (last dimension) of each unit."""
    mine = unit_of_S >= 0
    total = torch.zeros(*channels.shape[:-1], units)
    return total.index_add_(-1, unit_of_S[mine], channels[..., mine])


def _salience_axes(
    discovery: Discovery, statistics: Statistics, groups: Sequence[Group], name: str, reduce: str
) -> dict[str, list[Tensor]]:
    """Group -> for each of its axes, one number for each unit."""
    units = {group.name: group.units for group in groups}
    sums, how = statistics.sums.get(name, {}), SCORES[name]
    axes: dict[str, list[Tensor]] = defaultdict(list)
    layers: dict[int, list[Tensor]] = defaultdict(list)
    for weight in discovery.weights:
        if not weight.parameter:
            continue
        if weight.name not in sums:
            if how.needs != "inputs" and any(units_reached(dim, units) for dim in weight.dims):
                raise ScoreError(f"there is no gradient for the weight {weight.name}: the loss does not depend on it")
            continue  # a weight that no cut touches may have none
        for dim, expression in enumerate(weight.dims):
            counts_experts = dim == 0 and len(weight.dims) > 2
            if how.needs == "inputs" and not counts_experts and dim != statistics.reads[weight.name]:
                continue  # scores of inputs count the axes that read the units alone
            channels_S = sums[weight.name][dim].abs() if how.signed else sums[weight.name][dim]
            for group, unit_of_S in units_reached(expression, units).items():
                axes[group].append(_sum_channels(channels_S, unit_of_S, units[group]))
        if weight.layer is not None:
            layers[weight.layer].append(sums[weight.name][0].sum().abs())
    for each in groups:
        if each.kind == "layer" and layers:
            whole = [REDUCTIONS[reduce](torch.stack(layers[i])[:, None]) for i in range(each.units)]
            axes[each.name] = [torch.cat(whole)]
    return axes


def _mask_axes(discovery: Discovery, statistics: Statistics, groups: Sequence[Group]) -> dict[str, list[Tensor]]:
    """The Fisher information of a mask over all that reads a unit at a span, in nats per token: one axis per group."""
    derivatives_NU: dict[str, Tensor] = {}
    units = {group.name: group.units for group in groups}
    for weight in discovery.weights:
        for dim, channels_NS in statistics.masks.get(weight.name, {}).items():
            for group, unit_of_S in units_reached(weight.dims[dim], units).items():
                new_NU = _sum_channels(channels_NS, unit_of_S, units[group])
                derivatives_NU[group] = derivatives_NU.get(group, 0) + new_NU
    # A span's derivative by the summed loss is `tokens` times that by the mean loss; per token, one factor of `tokens`
    # remains, and the half is of the second-order term.
    return {group: [statistics.tokens / 2 * each_NU.square().sum(0)] for group, each_NU in derivatives_NU.items()}


def _random(group: Group, seed: int) -> Tensor:
    """Uniform scores that depend on the seed and the group's name alone, not on the order of groups."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{group.name}".encode()).digest()[:8], "little") >> 1
    return torch.rand(group.units, generator=torch.Generator().manual_seed(key))


def weights_scored(discovery: Discovery, groups: Sequence[Group]) -> set[str]:
    """The parameters that scores of these groups depend on; of layers, all of theirs."""
    names = {axis.weight for group in groups for axis in group.axes}
    if any(group.kind == "layer" for group in groups):
        names |= {weight.name for weight in discovery.weights if weight.layer is not None}
    return names & {weight.name for weight in discovery.weights if weight.parameter}


def covers(statistics: Statistics, name: str, discovery: Discovery, groups: Sequence[Group]) -> bool:
    """Whether statistics have all that a score needs for some groups; of the user's own scores, none ever do.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> discovery = discover(AutoConfig.for_model("opt", num_hidden_layers=1))
    >>> [covers(Statistics({}), name, discovery, discovery.groups) for name in ("random", "l1")]
    [True, False]
    """
    how = SCORES[name]
    if how.own or name == "random":
        return name == "random"
    if how.needs == "masks":
        return all(any(axis.weight in statistics.masks for axis in group.axes) for group in groups)
    if how.salience is None:
        return all(group.name in statistics.units.get(name, {}) for group in groups)
    sums = statistics.sums.get(name, {})
    if how.needs == "inputs":
        partly = (any(axis.weight in sums for axis in group.axes) for group in groups if group.kind != "layer")
        return bool(sums) and all(partly)
    return all(weight in sums for weight in weights_scored(discovery, groups))
