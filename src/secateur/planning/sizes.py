"""Groups, options and measurements -> how many units each group keeps.

Without a ranking (scope `local`), every group gives the same share of its units. The budget `units` says that share;
any other budget is met by searching for it. Groups of few units (heads, layers) are coarse: they lose whole units of a
noticeable size, so they are rounded down and the wide groups (MLP channels, hidden width) settle the difference. With
the scope `global`, `allocation` decides instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from secateur.discovery.groups import Discovery, Group
from secateur.errors import PlanError
from secateur.planning.allocation import SizeRules, fewest_units, greedy_by_score
from secateur.planning.budget import Budget, Sizes, counter
from secateur.planning.engines import usual_multiple
from secateur.planning.latency import LatencyTable
from secateur.planning.options import TOKENS, CutOptions
from secateur.scoring.scores import Scores

WIDE_KINDS = ("mlp", "expert_mlp", "shared_mlp", "latent", "hidden")  # wide, however few units they have
MANY_UNITS = 64  # a group of so many units is wide, whatever its kind
EXPERT_KINDS = ("expert_mlp", "shared_mlp")  # of which many configs have one width: all experts share a setting
SPLIT_KINDS = ("attention", "query", "mlp", "expert_mlp", "shared_mlp")  # what engines split over GPUs


@dataclass(frozen=True)
class SizeSearch:
    """The groups that are cut, the options, and what was measured of the model: sizes are searched for these."""

    discovery: Discovery
    axes: Mapping[str, Sequence[Group]]
    options: CutOptions
    scores: Scores | None = None
    latency: LatencyTable | None = None

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of all axes."""
        return [group for groups in self.axes.values() for group in groups]

    @cached_property
    def count(self) -> Callable[[Sizes], int]:
        """What the budget counts."""
        return counter(self.options.of, self.discovery, item_bytes=self.options.item_bytes, latency=self.latency)

    @cached_property
    def dense(self) -> int:
        """The count of the dense model."""
        return self.count({})

    @cached_property
    def whole(self) -> Sizes:
        """The most that every group may keep."""
        return {group.name: self.most(group) for group in self.groups}

    @cached_property
    def least(self) -> int:
        """The count when every group keeps the fewest units that the model needs."""
        return self.count({group.name: group.least for group in self.groups})

    def fewest(self, group: Group) -> int:
        """The fewest units that a group may keep: what the model needs, and the share that always stays."""
        return fewest_units(group, self.options.min_keep)

    @cached_property
    def budget(self) -> Budget:
        """What may be left. Raises `PlanError` where the groups cannot give so much, or the target is above all."""
        options, dense = self.options, self.dense
        least = self.count({group.name: self.fewest(group) for group in self.groups})
        target = options.target if options.target is not None else round(dense * (1 - (options.ratio or 0)))
        if target > dense:
            raise PlanError(f"target={target:,} is more than the dense model's {dense:,} ({options.of})")
        if target < least:
            raise PlanError(
                f"{format_budget(options)} leaves {target:,} ({options.of}), but cutting {', '.join(self.axes)} down "
                f"to the fewest units leaves {least:,}: at most ratio={1 - least / dense:.4f}, or more axes or layers"
            )
        return Budget(self.count, target)

    @cached_property
    def _weights(self) -> Mapping[int, float]:
        if self.options.schedule is None:
            return {}
        layers = [group.layer or 0 for group in self.groups]
        first, (low, high) = min(layers), self.options.schedule
        depth = max(max(layers) - first, 1)
        by_layer = {layer: low + (high - low) * (layer - first) / depth for layer in layers}
        mean = sum(by_layer[layer] for layer in layers) / len(layers)
        if mean == 0:  # one layer, whose share is the first of the two
            return {}
        return {layer: weight / mean for layer, weight in by_layer.items()}

    def weight(self, group: Group) -> float:
        """The share of its units that a group gives, relative to the mean: 1, or by the schedule a line over layers."""
        return self._weights.get(group.layer or 0, 1.0)

    def without(self, group: Group, share: float) -> int:
        """Units that a group keeps when it gives a share of them, rounded down; never fewer than must stay."""
        times = self.times(group)
        exact = group.units // times * (share * self.weight(group))
        return max(self.fewest(group), group.units - times * math.floor(exact + 1e-9))

    @cached_property
    def _experts(self) -> dict[str, Group]:
        """The groups whose widths a config may say by one setting: those of experts, and MLPs as wide as one."""
        experts = [group for group in self.groups if group.kind in EXPERT_KINDS]
        width = min((group.units for group in experts), default=None)
        alike = [group for group in self.groups if group.kind == "mlp" and group.units == width]
        return {group.name: group for group in (*experts, *alike)} if self.options.shape == "uniform" else {}

    def times(self, group: Group) -> int:
        """How many times the width of one expert a group has, if the config may say that one alone; else 1."""
        if group.name not in self._experts:
            return 1
        width = min(each.units for each in self._experts.values())
        return 1 if group.units % width else group.units // width

    def multiple_of(self, group: Group) -> int:
        """What the sizes of a group are multiples of: as asked for, and as the kernels that read them need."""
        split = self.options.tensor_parallel if group.kind in SPLIT_KINDS else 1
        if not is_wide(group) or group.kind == "head_dim":  # the code around sees heads of the dense size
            return split
        asked = self.options.round_to
        usual = usual_multiple(group, self.options) if asked is None else asked
        if group.name in self._experts:
            times = {name: self.times(each) for name, each in self._experts.items()}
            needed = (each.multiple // math.gcd(each.multiple, times[name]) for name, each in self._experts.items())
            return times[group.name] * math.lcm(usual, split, *needed)
        return math.lcm(usual, group.multiple, split)

    def most(self, group: Group) -> int:
        """The most units that a group may keep: all, unless they cannot be split over the GPUs."""
        return most_units(group, self.options.tensor_parallel)

    def rounded(self, group: Group, kept: int) -> int:
        """The nearest size that is a multiple and leaves the units that must stay; all units where there is none.

        Raises `PlanError` where the multiple is more than all units, and where too few units are asked for.
        """
        multiple, most = self.multiple_of(group), self.most(group)
        if multiple > group.units and not is_wide(group):  # KV heads that each GPU has a copy of
            return group.units
        if multiple > group.units:
            raise PlanError(f"round_to={multiple} is more than the {group.units} units of {group.name}")
        if multiple > 1 and (kept < group.units or most < group.units):
            least = self.fewest(group) if kept >= self.fewest(group) else group.least
            fewest, largest = math.ceil(least / multiple) if kept >= least else 1, group.units // multiple
            if fewest > largest:
                return most
            kept = min(max(round(kept / multiple), fewest, 1), largest) * multiple
        if kept < group.least:
            leaves = "empty it" if group.least == 1 else f"leave fewer than the {group.least} that must stay"
            raise PlanError(
                f"{group.name}: removing {group.units - kept} of its {group.units} units would {leaves}; "
                f"ratio={(group.units - group.least) / group.units:.4f} is the most it can give"
            )
        return kept


def is_wide(group: Group) -> bool:
    """Whether a group is cut to a width, of which single units hardly count; others are coarse: heads, layers."""
    return group.units >= MANY_UNITS or group.kind in WIDE_KINDS


def most_units(group: Group, gpus: int) -> int:
    """The most units of a group, up to all, that can be split over so many GPUs; 0 where it has fewer than GPUs.

    KV heads may also be fewer, if the number of GPUs is a multiple of theirs: they are then repeated.

    >>> [most_units(Group("layers.0.attention", "attention", 0, 3, ()), gpus) for gpus in (2, 3, 4, 6)]
    [2, 3, 0, 3]
    """
    whole = group.kind not in SPLIT_KINDS or (group.kind == "attention" and gpus % group.units == 0)
    return group.units if whole else group.units // gpus * gpus


def check_split(search: SizeSearch) -> None:
    """Raise `PlanError` where a layer could not be split over the GPUs, or only if more went than the budget says."""
    gpus, cut = search.options.tensor_parallel, {group.name for group in search.groups}
    queries = {g.layer: g.units for g in search.discovery.groups if g.kind == "query"}
    shared = {g.layer for g in search.discovery.groups if g.kind == "attention"}  # of these layers, KV heads count

    def obstacle(number: int) -> Group | None:
        for group in search.discovery.groups:
            most, repeated = most_units(group, number), group.kind == "attention" and number > group.units
            uneven = repeated and group.units * queries.get(group.layer, 1) % number
            kept_whole = most == group.units or group.name in cut
            if not (group.kind == "query" and group.layer in shared) and (most == 0 or uneven or not kept_whole):
                return group
        return None

    group = obstacle(gpus)
    if group is not None:
        fewer = next(number for number in range(gpus - 1, 0, -1) if obstacle(number) is None)
        why = "too few" if group.units < gpus else "no multiple of it, and these axes do not cut them"
        raise PlanError(
            f"tensor_parallel={gpus}: {group.name} has {group.units} units ({group.kind}), {why}. The nearest that "
            f"can be is tensor_parallel={fewer}"
        )
    if search.options.of != "units" and (most := search.count(search.whole)) < search.budget.target:
        raise PlanError(
            f"tensor_parallel={gpus} alone removes more than {format_budget(search.options)} of {search.options.of}: "
            f"use ratio={math.ceil(1e4 * (1 - most / search.dense)) / 1e4:.4f} or more"
        )


def format_budget(options: CutOptions) -> str:
    """The size of a budget, as an option."""
    return f"target={options.target:,}" if options.target is not None else f"ratio={options.ratio:g}"


def removed_units(units: int, ratio: float) -> int:
    """Units that a share takes: rounded down for few (heads, layers), up for many (channels), as LLM-Pruner does.

    LLM-Pruner keeps int(C * (1 - ratio)) of C channels and then whole heads: 60 % of 32 heads is 19, of 11008
    channels 6605.

    >>> removed_units(32, 0.6), removed_units(11008, 0.6)
    (19, 6605)
    """
    exact = units * ratio
    return math.floor(exact + 1e-9) if units < MANY_UNITS else math.ceil(exact - 1e-9)


def candidate_sizes(search: SizeSearch) -> Iterator[Sizes]:
    """Units kept by group, the nearest to the budget first.

    The candidates after the first have other numbers of heads, for configs that refuse some. Raises `PlanError` when
    the budget cannot be met.
    """
    options = search.options
    if options.tensor_parallel > 1:
        check_split(search)
    if options.of == "units":
        yield _share_of_units(search)
        return
    budget = search.budget
    if options.scope != "local" and search.scores is not None:
        yield _allocated(search, search.scores)
        if options.shape == "per-layer":
            return
    coarse = [group for group in search.groups if not is_wide(group)]
    wide = [group for group in search.groups if is_wide(group)]
    # 1. All groups give the same share; the coarse ones are rounded down to whole units.
    steps = max((group.units for group in coarse), default=1)
    by_step = [
        search.whole | {group.name: search.rounded(group, search.without(group, step / steps)) for group in coarse}
        for step in range(steps)
    ]
    if not wide:
        yield budget.closest(by_step)
        return
    # 2. The wide groups settle the difference; from step to step, the coarse ones move further from their share.
    share = (search.dense - budget.target) / max(1, search.dense - search.least)
    usual = math.floor(steps * share + 1e-9)
    extremes, met = [], False  # nothing of the wide groups removed, or all that can be
    for step in sorted(range(steps), key=lambda step: (abs(step - usual), step)):
        fewest = {group.name: search.rounded(group, search.fewest(group)) for group in wide}
        most, least = by_step[step], by_step[step] | fewest
        extremes += [most, least]
        if budget.count(least) <= budget.target <= budget.count(most):
            met = True
            yield _settle_widths(search, wide, most)
    # 3. Where a head weighs more than all that the wide groups can give, the nearest will do.
    if not met:
        yield budget.closest(extremes)


def _share_of_units(search: SizeSearch) -> Sizes:
    """The same share of the units of every group."""
    options, sizes = search.options, {}
    for group in search.groups:
        times = search.times(group)
        kept = group.units - times * removed_units(group.units // times, (options.ratio or 0) * search.weight(group))
        if options.schedule is not None:  # a layer may be given more than all of its units
            kept = max(group.least, kept)
        if kept >= group.least:  # else it is refused
            kept = max(search.fewest(group), kept)
        sizes[group.name] = search.rounded(group, kept)
    return sizes


def _allocated(search: SizeSearch, scores: Scores) -> Sizes:
    """Sizes by one ranking of all units."""
    options, axes = search.options, [*search.axes.values()]
    rules = SizeRules(options.shape == "uniform", options.min_keep, search.multiple_of, search.most)
    return greedy_by_score(axes, scores.units, search.budget, rules, coarse=lambda group: not is_wide(group))


def _settle_widths(search: SizeSearch, wide: Sequence[Group], settled: Sizes) -> Sizes:
    """The one share of the units of all wide groups that comes nearest to the budget, beside the settled sizes."""
    widest = max(group.units for group in wide)
    lightest = min((weight for group in wide if (weight := search.weight(group)) > 0), default=1.0)

    def sizes_at(step: int) -> Sizes:
        share = step / widest
        return settled | {group.name: search.rounded(group, search.without(group, share)) for group in wide}

    return search.budget.bisect(sizes_at, math.ceil((widest - 1) / min(lightest, 1.0)))


def rounding_cost(search: SizeSearch, scores: Scores, kept: Mapping[str, int]) -> dict[str, Any]:
    """What widths that are multiples cost, beside any widths: as the share of all scores that goes.

    Empty where widths are not rounded.
    """
    any_widths = replace(search, options=replace(search.options, round_to=1))
    layers = [group for group in search.groups if group.kind != TOKENS]  # a few tokens more are no loss
    multiples = {(search.multiple_of(group), any_widths.multiple_of(group)) for group in layers}
    rounded = [multiple for multiple, needed in multiples if multiple != needed]
    if not rounded:
        return {}
    best = next(candidate_sizes(any_widths), {})
    lost = {"planned": _removed_scores(layers, scores, kept), "any_widths": _removed_scores(layers, scores, best)}
    return {"rounding": {"multiple": max(rounded), **lost}}


def _removed_scores(groups: Iterable[Group], scores: Scores, kept: Mapping[str, int]) -> float:
    """The share of the sum of all scores that goes when the lowest units of every group do."""
    whole = gone = 0.0
    for group in groups:
        scores_U = scores.units[group.name].double().abs()
        whole += float(scores_U.sum())
        gone += float(scores_U.sort().values[: group.units - kept.get(group.name, group.units)].sum())
    return gone / max(whole, 1e-30)
