"""Scores and a budget -> how many units each group keeps.

One ranking of all units by their score per unit of budget (parameters, MACs, bytes or time). The lowest are removed
first wherever they are, so heads, channels and experts of all layers compete, and important layers keep their units
without being named.

Names of tensors end in their axes: U units, M groups that share a size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from secateur.discovery.groups import Group
from secateur.errors import PlanError
from secateur.planning.budget import Budget, Sizes


@dataclass(frozen=True, slots=True)
class SizeRules:
    """Which sizes groups may have."""

    uniform: bool
    """Whether groups of one kind and width keep equally many units, in all layers."""
    min_keep: float
    """The share of units that every group keeps."""
    multiple_of: Callable[[Group], int]
    """What the number of units that a group keeps is a multiple of."""
    most: Callable[[Group], int] = attrgetter("units")
    """The most units that a group keeps."""

    def sharing_size(self, axis: Sequence[Group]) -> list[list[Group]]:
        """The groups of an axis, those that keep equally many units together."""
        by_size: dict[tuple[str, ...], list[Group]] = {}
        for group in axis:
            by_size.setdefault((group.kind, str(group.units)) if self.uniform else (group.name,), []).append(group)
        return [*by_size.values()]

    def fewest(self, members: Sequence[Group]) -> int:
        """The fewest units that groups of one size may keep."""
        return max(fewest_units(group, self.min_keep) for group in members)


def fewest_units(group: Group, min_keep: float) -> int:
    """The fewest units that a group may keep: this share of them; where all may go, it does not hold them."""
    return min(max(group.least, math.ceil(min_keep * group.units - 1e-9)), group.units) if group.least else 0


@dataclass(frozen=True, slots=True)
class _RankedGroups:
    """Groups that keep equally many units, in the ranking of all."""

    groups: tuple[Group, ...]
    ratios_U: Tensor  # float64, ascending: score / budget of removing one more unit from each group
    fewest: int
    multiple: int
    most: int

    def kept(self, removed: int) -> Sizes:
        """Units kept when the `removed` lowest of each group go, rounded to the nearest multiple."""
        units = self.groups[0].units
        kept = min(max(self.fewest, units - removed), self.most)
        if self.multiple > 1 and kept < self.most:
            down = kept // self.multiple * self.multiple
            up = min(down + self.multiple, self.most)
            kept = down if kept - down < up - kept and down >= self.fewest else up
        return dict.fromkeys([group.name for group in self.groups], kept)


def greedy_by_score(
    axes: Sequence[Sequence[Group]],
    scores: Mapping[str, Tensor],
    budget: Budget,
    rules: SizeRules,
    *,
    coarse: Callable[[Group], bool],
) -> Sizes:
    """Units kept by group: as many of the lowest-ranked units go as bring the count nearest to the target.

    `scores` have one number for each unit of a group, higher for more important ones. Groups whose single units are
    large (`coarse`: heads, experts) are settled first; the others then make up the difference. Raises `PlanError` for
    scores below zero, which cannot be divided by what a unit takes.

    >>> groups = [Group("a", "mlp", 0, 4, ()), Group("b", "mlp", 1, 4, ())]
    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([3.5, 8.0, 8.0, 8.0])}
    >>> budget = Budget(lambda kept: sum(kept.get(name, 4) for name in "ab"), target=5)
    >>> rules = SizeRules(uniform=False, min_keep=0.0, multiple_of=lambda group: 1)
    >>> greedy_by_score([groups], scores, budget, rules, coarse=lambda group: False)
    {'a': 1, 'b': 4}
    """
    ranked = [_ranked(members, scores, budget, rules) for axis in axes for members in rules.sharing_size(axis)]
    kept = _cut_ranking(ranked, budget, {})
    large = [each for each in ranked if coarse(each.groups[0])]
    if large and len(large) < len(ranked):
        settled = {group.name: kept[group.name] for each in large for group in each.groups}
        kept = _cut_ranking([each for each in ranked if not coarse(each.groups[0])], budget, settled)
    return kept


def _ranked(members: Sequence[Group], scores: Mapping[str, Tensor], budget: Budget, rules: SizeRules) -> _RankedGroups:
    first = members[0]
    scores_MU = torch.stack([scores[group.name].double().sort().values for group in members])
    if bool((scores_MU < 0).any()):
        raise PlanError(f"the scores of {first.name} are below zero: they cannot be weighed against others")
    saved = budget.count({}) - budget.count({group.name: group.units - 1 for group in members})
    ratios_U = scores_MU.sum(0) / max(saved, 1)
    return _RankedGroups(tuple(members), ratios_U, rules.fewest(members), rules.multiple_of(first), rules.most(first))


def _cut_ranking(ranked: Sequence[_RankedGroups], budget: Budget, settled: Sizes) -> Sizes:
    """The sizes nearest to the target that one threshold for all groups gives; `settled` ones stay."""
    ratios_U = torch.cat([each.ratios_U[: each.groups[0].units - each.fewest] for each in ranked]).sort().values

    def sizes_at(removed: int) -> Sizes:
        kept = dict(settled)
        threshold = torch.tensor(float(ratios_U[removed - 1]) if removed else -math.inf, dtype=torch.float64)
        for each in ranked:
            kept |= each.kept(int(torch.searchsorted(each.ratios_U, threshold, right=True)))
        return kept

    return budget.bisect(sizes_at, len(ratios_U))
