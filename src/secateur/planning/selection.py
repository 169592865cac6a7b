"""Options -> the groups that are cut; scores and sizes -> the units that stay."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from secateur.discovery.groups import Discovery, Group
from secateur.discovery.sublayers import is_removable
from secateur.errors import PlanError, ScoreError
from secateur.planning.options import AXES, USUAL_AXES, CutOptions
from secateur.scoring.scores import Scores

SPARE = 0.5  # units that repair may cut instead of others, for each that goes or stays; measured in docs/research.md


def groups_to_cut(discovery: Discovery, options: CutOptions) -> dict[str, list[Group]]:
    """The groups that the options cut, by axis; in a layer range, those of its layers.

    The default axes are narrowed to those that the model has: some types have no MLP, or code that fixes the number of
    heads.
    Raises `PlanError` for a range outside the model, and for an axis without a group in it.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> discovery = discover(AutoConfig.for_model("opt", num_hidden_layers=2, **sizes))
    >>> [group.name for group in groups_to_cut(discovery, CutOptions(ratio=0.5, axes=("mlp",)))["mlp"]]
    ['layers.0.mlp', 'layers.1.mlp']
    """
    first, last = options.layer_range(discovery.depth)
    if options.layers is not None and "hidden" in options.axes:
        raise PlanError("hidden runs through every layer: leave layers out")
    if options.within is not None:
        _check_within(options.within, discovery)
    by_axis: dict[str, list[Group]] = {}
    missing: list[str] = []
    for axis in options.axes:
        groups = [group for group in discovery.groups if group.kind in AXES[axis]]
        if axis == "attention":
            # With one KV head there is nothing to choose from but its query heads.
            layers = {group.layer for group in groups}
            groups += [g for g in discovery.groups if g.kind == "query" and g.layer not in layers]
        if axis == "head_dim":
            groups = [group for group in groups if _is_of_values(group, discovery)]
        groups = [g for g in groups if g.layer is None or first <= g.layer < last]
        if options.within is not None:
            groups = [group for group in groups if _lies_in(group, options.within, discovery)]
        if options.sublayers:
            groups = [replace(g, least=0) if is_removable(discovery, g) else g for g in groups]
        if not groups:
            kinds = ", ".join(sorted({group.kind for group in discovery.groups}))
            where = f"in layers {first}:{last}" if options.within is None else f"within {options.within}"
            what = "of that kind" if axis != "head_dim" else "of values that are made and read by plain matrices alone"
            has = [name for name, cut in AXES.items() if any(g.kind in cut for g in discovery.groups)]
            other = next((name for name in (*USUAL_AXES, *AXES) if name in has and name != axis), None)
            advice = "" if other is None else f". Cut what it has, for example axes={other}"
            missing.append(f"axes={axis}: {discovery.model} has no group {what} {where}; it has: {kinds}{advice}")
        else:
            by_axis[axis] = groups
    if missing and (options.axes != USUAL_AXES or not by_axis):
        raise PlanError(missing[0])
    return by_axis


def columns_fitted(discovery: Discovery, options: CutOptions) -> int:
    """The columns of the widest matrix that reads units which may go; 0 where none does.

    A matrix that makes the units may hold several rows of each, so of a group's matrices the narrowest counts.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 40, "word_embed_proj_dim": 12}
    >>> columns_fitted(discover(AutoConfig.for_model("opt", num_hidden_layers=1, **sizes)), CutOptions())
    40
    """
    shapes = {weight.name: weight.shape for weight in discovery.weights if len(weight.dims) > 1}
    groups = [g for found in groups_to_cut(discovery, options).values() for g in found if g.kind != "vocabulary"]
    sizes = [[shapes[axis.weight][axis.dim] for axis in g.axes if axis.weight in shapes] for g in groups]
    return max((min(found) for found in sizes if found), default=0)


def _lies_in(group: Group, path: str, discovery: Discovery) -> bool:
    """Whether all weights that hold a group's units lie in a module; of whole layers, their list."""
    names = [axis.weight for axis in group.axes] or discovery.layer_lists
    return all(name.startswith(f"{path}.") for name in names)


def _check_within(path: str, discovery: Discovery) -> None:
    """Raise `PlanError` for a module without weights."""
    weights = [weight.name for weight in discovery.weights]
    if not any(name.startswith(f"{path}.") for name in weights):
        parts = {".".join(name.split(".")[:depth]) for name in weights for depth in (1, 2) if name.count(".") > depth}
        raise PlanError(
            f"within={path}: {discovery.model} has no weights there; it has them in {', '.join(sorted(parts)[:12])}"
        )


def _is_of_values(group: Group, discovery: Discovery) -> bool:
    """Whether one matrix makes the channels and another reads them, and no norm between counts them.

    Nothing reads channels of queries and keys but their product, so no score says what one is worth.
    """
    matrices = {weight.name for weight in discovery.weights if len(weight.dims) == 2}
    return not group.normed and {axis.dim for axis in group.axes if axis.weight in matrices} == {0, 1}


def units_to_keep(group: Group, kept: int, scores: Scores, options: CutOptions) -> dict[str, tuple[int, ...] | None]:
    """The best units of a group, as `keep`, and those of them that repair may cut instead of others, as `spare`.

    Repair does not see what a unit is worth to the loss, so it chooses among the cheapest by score alone: half as many
    more as go, and at most half of those that stay. Raises `ScoreError` for scores that are missing, too few or not
    finite, and `PlanError` where more layers would go than the options' range holds.
    """
    scores_U = _checked_scores(group, kept, scores, options)
    keep = top_units(scores_U, kept)
    if options.choose != "obs" or group.kind == "vocabulary":
        return {"keep": keep, "spare": None}
    n_spare = math.ceil(min(group.units - kept, kept) * SPARE)
    return {"keep": keep, "spare": tuple(sorted({*keep} - {*top_units(scores_U, kept - n_spare)}))}


def _checked_scores(group: Group, kept: int, scores: Scores, options: CutOptions) -> Tensor:
    """The scores of a group's units; those of layers outside of the options' range are infinite."""
    if group.name not in scores.units:
        raise ScoreError(f"there are no scores for {group.name}: score the model that is to be cut")
    scores_U = scores.units[group.name]
    if len(scores_U) != group.units:
        raise ScoreError(f"{group.name} has {group.units} units and {len(scores_U)} scores")
    if not torch.isfinite(scores_U).all():
        raise ScoreError(f"the scores of {group.name} hold NaN or Inf")
    if group.kind != "layer" or options.layers is None:
        return scores_U
    first, last = options.layer_range(group.units)
    protected_U = torch.ones(group.units, dtype=torch.bool)
    protected_U[first:last] = False
    if kept < int(protected_U.sum()):
        raise PlanError(
            f"layers={first}:{last} holds {last - first} layers, fewer than the {group.units - kept} to drop"
        )
    return scores_U.masked_fill(protected_U, math.inf)


def top_units(scores_U: Tensor, kept: int) -> tuple[int, ...]:
    """The indices of the `kept` highest scores, ascending; of equal scores the first stays.

    >>> top_units(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3)
    (0, 1, 3)
    """
    order_U = torch.sort(scores_U.double(), descending=True, stable=True).indices
    return tuple(sorted(order_U[:kept].tolist()))
