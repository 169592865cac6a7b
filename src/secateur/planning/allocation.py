"""Scores or measured damage, and a budget -> how many units each group keeps.

Two methods, both of the knapsack problem:

- `greedy_by_score`: one ranking of all units by their score per unit of budget (parameters, MACs, bytes or time). The
  lowest are removed first wherever they are, so heads, channels and experts of all layers compete, and important layers
  keep their units without being named.
- `knapsack_by_damage`: each group was cut to a few sizes and the damage measured (see `pruning.sensitivity`). Dynamic
  programming finds the sizes with the least damage in sum (multiple-choice knapsack).

Names of tensors end in their axes: U units, M groups that share a size, B bins of budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from secateur.discovery.groups import Group
from secateur.errors import PlanError
from secateur.planning.budget import Budget, Sizes

DamageCurve = tuple[tuple[int, float], ...]  # units kept, ascending to all of them, and the damage in nats per token
MOST_BINS = 8192  # of the budget that is to be saved: smaller ones are solved exactly
MOST_SIZES = 64  # of a group, that the dynamic program chooses from


@dataclass(frozen=True, slots=True)
class SizeRules:
    """Which sizes groups may have."""

    uniform: bool
    """Whether groups of one kind and width keep equally many units, in all layers."""
    min_keep: float
    """The share of units that every group keeps."""
    multiple_of: Callable[[Group], int]
    """What the number of units that a group keeps is a multiple of."""

    def sharing_size(self, axis: Sequence[Group]) -> list[list[Group]]:
        """The groups of an axis, those that keep equally many units together."""
        by_size: dict[tuple[str, ...], list[Group]] = {}
        for group in axis:
            by_size.setdefault((group.kind, str(group.units)) if self.uniform else (group.name,), []).append(group)
        return [*by_size.values()]

    def fewest(self, members: Sequence[Group]) -> int:
        """The fewest units that groups of one size may keep; where all may go, `min_keep` does not hold them."""
        least = max(group.least for group in members)
        units = members[0].units
        return min(max(least, math.ceil(self.min_keep * units)), units) if least else 0


# --- by score ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _RankedGroups:
    """Groups that keep equally many units, in the ranking of all."""

    groups: tuple[Group, ...]
    ratios_U: Tensor  # float64, ascending: score / budget of removing one more unit from each group
    fewest: int
    multiple: int

    def kept(self, removed: int) -> Sizes:
        """Units kept when the `removed` lowest of each group go, rounded to the nearest multiple."""
        units = self.groups[0].units
        kept = max(self.fewest, units - removed)
        if self.multiple > 1 and kept < units:
            down = kept // self.multiple * self.multiple
            up = min(down + self.multiple, units)
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
    return _RankedGroups(tuple(members), ratios_U, rules.fewest(members), rules.multiple_of(first))


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


# --- by measured damage -----------------------------------------------------------------------------------------------


def damage_at(curve: DamageCurve, kept: int) -> float:
    """The damage of keeping so many units: between the sizes measured, its square root is interpolated linearly.

    Small cuts do damage in proportion to their square, as any loss does near its minimum.

    >>> curve = ((0, 1.0), (10, 0.0))
    >>> damage_at(curve, 5), damage_at(curve, 10)
    (0.25, 0.0)
    """
    for (low, first), (high, last) in pairwise(curve):
        if kept <= high:  # below the fewest that were measured, the line goes on
            share = (kept - low) / (high - low)
            return float(math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * share) ** 2
    return 0.0


@dataclass(frozen=True, slots=True)
class _SizeChoice:
    """Groups that keep equally many units, and the sizes that the dynamic program chooses from."""

    groups: tuple[Group, ...]
    kept: tuple[int, ...]  # descending from all
    damage: tuple[float, ...]
    saved: tuple[int, ...]  # of the budget

    def sizes(self, kept: int) -> Sizes:
        """All groups with so many units."""
        return dict.fromkeys([group.name for group in self.groups], kept)


def knapsack_by_damage(
    axes: Sequence[Sequence[Group]], curves: Mapping[str, DamageCurve], budget: Budget, rules: SizeRules
) -> Sizes:
    """Units kept by group: of all sizes that bring the count to the target, those with the least damage in sum.

    Exact up to `MOST_BINS` steps of what is saved and `MOST_SIZES` sizes of a group. What is then left of the budget
    is spent unit by unit where it lowers the damage most.

    >>> groups = [Group("a", "mlp", 0, 4, ()), Group("b", "mlp", 1, 4, ())]
    >>> curves = {"a": ((1, 0.9), (4, 0.0)), "b": ((1, 9.0), (4, 0.0))}
    >>> budget = Budget(lambda kept: sum(kept.get(name, 4) for name in "ab"), target=5)
    >>> knapsack_by_damage([groups], curves, budget, SizeRules(False, 0.0, lambda group: 1))
    {'a': 1, 'b': 4}
    """
    choices = [_size_choice(members, curves, budget, rules) for axis in axes for members in rules.sharing_size(axis)]
    needed = max(budget.count({}) - budget.target, 0)
    picked = _solve_knapsack(choices, needed)
    kept: Sizes = {}
    for choice, number in zip(choices, picked, strict=True):
        kept |= choice.sizes(choice.kept[number])
    return _spend_rest(kept, choices, curves, budget, rules)


def _size_choice(
    members: Sequence[Group], curves: Mapping[str, DamageCurve], budget: Budget, rules: SizeRules
) -> _SizeChoice:
    units, multiple = members[0].units, rules.multiple_of(members[0])
    step = max(1, -(-units // MOST_SIZES)) if multiple == 1 else multiple
    widest = units if multiple == 1 else (units - 1) // multiple * multiple
    sizes = [units, *(size for size in range(widest, rules.fewest(members) - 1, -step) if size < units)]
    dense = budget.count({})
    return _SizeChoice(
        tuple(members),
        tuple(sizes),
        tuple(sum(damage_at(curves[group.name], size) for group in members) for size in sizes),
        tuple(dense - budget.count({group.name: size for group in members}) for size in sizes),
    )


def _solve_knapsack(choices: Sequence[_SizeChoice], needed: int) -> list[int]:
    """One size of each choice, by its number, so that `needed` of the budget is saved at the least damage."""
    bin_width = max(1, -(-needed // MOST_BINS))
    last = -(-needed // bin_width)  # the bin of "enough": what saves more counts as just that
    best_B = torch.full((last + 1,), math.inf, dtype=torch.float64)  # the least damage that saves so many bins
    best_B[0] = 0.0
    taken = []  # of every choice: which size led to each bin, and from which bin
    for choice in choices:
        new_B, size_B = torch.full_like(best_B, math.inf), torch.zeros(last + 1, dtype=torch.int64)
        from_B = torch.zeros(last + 1, dtype=torch.int64)
        for number, (damage, saved) in enumerate(zip(choice.damage, choice.saved, strict=True)):
            bins = min(saved // bin_width, last)
            moved_B = torch.full_like(best_B, math.inf)
            moved_B[bins:] = best_B[: last + 1 - bins] + damage
            source_B = torch.arange(last + 1) - bins
            lowest, at = best_B[last - bins :].min(0)
            moved_B[last], source_B[last] = lowest + damage, last - bins + int(at)
            better_B = moved_B < new_B
            new_B, size_B = torch.where(better_B, moved_B, new_B), torch.where(better_B, number, size_B)
            from_B = torch.where(better_B, source_B, from_B)
        best_B = new_B
        taken.append((size_B, from_B))
    place = int(torch.nonzero(torch.isfinite(best_B)).max())
    picked = []
    for size_B, from_B in reversed(taken):
        picked.append(int(size_B[place]))
        place = int(from_B[place])
    return picked[::-1]


def _spend_rest(
    kept: Sizes,
    choices: Sequence[_SizeChoice],
    curves: Mapping[str, DamageCurve],
    budget: Budget,
    rules: SizeRules,
) -> Sizes:
    """The same sizes, with single units added or taken as long as that brings the count nearer to the target.

    A unit that would go past the target comes last: what goes beyond is not made up for by another's damage.
    """
    while True:
        now = budget.count(kept)
        gap = budget.target - now  # above zero: units can come back
        moves: list[tuple[bool, float, int, Sizes]] = []
        for choice in choices:
            size = kept[choice.groups[0].name]
            multiple = rules.multiple_of(choice.groups[0])
            other = min(size + multiple, choice.kept[0]) if gap > 0 else size - multiple
            if other == size or other < rules.fewest(choice.groups):
                continue
            if gap < 0 and size % multiple:
                other = size // multiple * multiple
            moved = kept | choice.sizes(other)
            change = budget.count(moved) - now
            if change and abs(gap - change) < abs(gap):
                harm = sum(damage_at(curves[g.name], other) - damage_at(curves[g.name], size) for g in choice.groups)
                moves.append((abs(change) > abs(gap), harm / abs(change), len(moves), moved))
        if not moves:
            return kept
        past, _, _, kept = min(moves)
        if past:
            return kept
