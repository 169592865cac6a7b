"""Scores or measured damage, and a budget -> how many units each group keeps.

By one ranking (`cheapest`), a unit's price is its score divided by what goes with it (parameters, MACs, bytes or time,
as the budget counts). The cheapest go first wherever they are, so heads, channels and experts of all layers compete,
and layers that matter keep their units without being named. With a uniform shape, the n-th cheapest units of all
layers go together.

By measured damage (`least_damage`), where each group was cut to a few sizes (see `sensitivity`), the sizes that do the
least damage together are found exactly, by dynamic programming over what they save.
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

Count = Callable[[dict[str, int]], int]  # units kept by group (all, where not named) -> what the budget counts
Curve = tuple[tuple[int, float], ...]  # units kept, ascending to all of them, and the damage: nats per token
BINS = 8192  # of what is to be saved: smaller budgets are solved exactly
SIZES = 64  # of a group, that the dynamic program chooses from


@dataclass(frozen=True, slots=True)
class Family:
    """Groups that keep equally many units."""

    groups: tuple[Group, ...]
    prices: Tensor  # float64, of removing one unit more from each: ascending
    least: int
    rounded: int  # to multiples of this

    def kept(self, removed: int) -> dict[str, int]:
        """Units kept when the `removed` cheapest of each group go."""
        units = self.groups[0].units
        kept = max(self.least, units - removed)
        if self.rounded > 1 and kept < units:
            down = kept // self.rounded * self.rounded
            up = min(down + self.rounded, units)
            kept = down if kept - down < up - kept and down >= self.least else up
        return dict.fromkeys([group.name for group in self.groups], kept)


def families(
    groups: Sequence[Sequence[Group]],
    units: Mapping[str, Tensor],
    count: Count,
    *,
    uniform: bool,
    at_least: float,
    round_to: Callable[[Group], int],
) -> list[Family]:
    """What keeps equally many units: every group by itself, or, of a uniform shape, all groups alike of one axis.

    `units` are the scores, one per unit, higher for what is worth keeping; `at_least` is the share of a group that
    stays whatever its units are worth. Raises `PlanError` for scores below zero, which cannot be priced.
    """
    found = []
    dense = count({})
    for axis in groups:
        for members in _alike(axis, uniform=uniform):
            first = members[0]
            scores = torch.stack([units[group.name].double().sort().values for group in members])
            if bool((scores < 0).any()):
                raise PlanError(f"the scores of {first.name} are below zero: they cannot be weighed against others")
            saved = dense - count({group.name: group.units - 1 for group in members})
            prices = scores.sum(0) / max(saved, 1)
            found.append(Family(tuple(members), prices, _fewest(members, at_least), round_to(first)))
    return found


def cheapest(found: Sequence[Family], count: Count, wanted: int, *, coarse: Callable[[Group], bool]) -> dict[str, int]:
    """Units kept by group: as many of the cheapest go as bring the count nearest to what is wanted.

    Groups whose single units are large (`coarse`: heads, experts) are settled first, by the same prices; the others
    then make up the difference.

    >>> groups = [Group("a", "mlp", 0, 4, ()), Group("b", "mlp", 1, 4, ())]
    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([3.5, 8.0, 8.0, 8.0])}
    >>> def count(kept):
    ...     return sum(kept.get(name, 4) for name in "ab")
    >>> found = families([groups], scores, count, uniform=False, at_least=0.0, round_to=lambda group: 1)
    >>> cheapest(found, count, 5, coarse=lambda group: False)
    {'a': 1, 'b': 4}
    """
    kept = _at(found, count, wanted, {})
    large = [family for family in found if coarse(family.groups[0])]
    if large and len(large) < len(found):
        settled = {group.name: kept[group.name] for family in large for group in family.groups}
        kept = _at([family for family in found if family not in large], count, wanted, settled)
    return kept


def _at(found: Sequence[Family], count: Count, wanted: int, settled: Mapping[str, int]) -> dict[str, int]:
    prices = torch.cat([family.prices[: family.groups[0].units - family.least] for family in found]).sort().values

    def kept_for(going: int) -> dict[str, int]:
        kept = dict(settled)
        limit = float(prices[going - 1]) if going else -math.inf
        for family in found:
            removed = int(torch.searchsorted(family.prices, torch.tensor(limit, dtype=torch.float64), right=True))
            kept |= family.kept(removed)
        return kept

    low, high = 0, len(prices)  # the fewest that leave no more than is wanted
    while low < high:
        middle = (low + high) // 2
        if count(kept_for(middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return min((kept_for(going) for going in (low, max(0, low - 1))), key=lambda kept: abs(count(kept) - wanted))


# --- by measured damage ----------------------------------------------------------------------------------------------


def damage_at(curve: Curve, kept: int) -> float:
    """The damage of keeping so many units: between the sizes measured, its root is on a straight line.

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
class _Choice:
    """Groups that keep equally many units, and the sizes that they can have."""

    groups: tuple[Group, ...]
    kept: tuple[int, ...]  # descending from all
    damage: tuple[float, ...]
    saved: tuple[int, ...]


def least_damage(
    groups: Sequence[Sequence[Group]],
    curves: Mapping[str, Curve],
    count: Count,
    wanted: int,
    *,
    uniform: bool,
    at_least: float,
    round_to: Callable[[Group], int],
) -> dict[str, int]:
    """Units kept by group: of all sizes that bring the count to what is wanted, those with the least damage in sum.

    A knapsack with one size for each group (or, of a uniform shape, for each axis), solved exactly up to `BINS` steps
    of what is saved and `SIZES` sizes a group; what is left of the budget goes, unit by unit, where it does most.

    >>> groups = [Group("a", "mlp", 0, 4, ()), Group("b", "mlp", 1, 4, ())]
    >>> curves = {"a": ((1, 0.9), (4, 0.0)), "b": ((1, 9.0), (4, 0.0))}
    >>> def count(kept):
    ...     return sum(kept.get(name, 4) for name in "ab")
    >>> least_damage([groups], curves, count, 5, uniform=False, at_least=0.0, round_to=lambda group: 1)
    {'a': 1, 'b': 4}
    """
    choices = [
        _choice(members, curves, count, at_least, round_to)
        for axis in groups
        for members in _alike(axis, uniform=uniform)
    ]
    needed = max(count({}) - wanted, 0)
    step = max(1, -(-needed // BINS))
    enough = -(-needed // step)  # bins; what saves more counts as just that
    best = torch.full((enough + 1,), math.inf, dtype=torch.float64)  # by bins that are saved
    best[0] = 0.0
    taken = []
    for choice in choices:
        new, which = torch.full_like(best, math.inf), torch.zeros(enough + 1, dtype=torch.int64)
        came = torch.zeros(enough + 1, dtype=torch.int64)
        for number, (damage, saved) in enumerate(zip(choice.damage, choice.saved, strict=True)):
            bins = min(saved // step, enough)
            moved = torch.full_like(best, math.inf)
            moved[bins:] = best[: enough + 1 - bins] + damage
            source = torch.arange(enough + 1) - bins
            lowest, at = best[enough - bins :].min(0)
            moved[enough], source[enough] = lowest + damage, enough - bins + int(at)
            better = moved < new
            new, which = torch.where(better, moved, new), torch.where(better, number, which)
            came = torch.where(better, source, came)
        best = new
        taken.append((which, came))
    place = int(torch.nonzero(torch.isfinite(best)).max())
    picked = [0] * len(choices)
    for number in range(len(choices) - 1, -1, -1):
        which, came = taken[number]
        picked[number], place = int(which[place]), int(came[place])
    kept = {g.name: c.kept[n] for c, n in zip(choices, picked, strict=True) for g in c.groups}
    return _settled(kept, choices, curves, count, wanted, at_least, round_to)


def _alike(axis: Sequence[Group], *, uniform: bool) -> list[list[Group]]:
    """Groups that keep equally many units."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in axis:
        found.setdefault((group.kind, str(group.units)) if uniform else (group.name,), []).append(group)
    return [*found.values()]


def _fewest(members: Sequence[Group], at_least: float) -> int:
    most = max(g.least for g in members)  # 0: all may go, and a share that stays is not asked for
    return min(max(most, math.ceil(at_least * members[0].units)), members[0].units) if most else 0


def _choice(
    members: Sequence[Group],
    curves: Mapping[str, Curve],
    count: Count,
    at_least: float,
    round_to: Callable[[Group], int],
) -> _Choice:
    first, multiple = members[0], round_to(members[0])
    least = _fewest(members, at_least)
    step = max(1, -(-first.units // SIZES)) if multiple == 1 else multiple
    top = first.units if multiple == 1 else (first.units - 1) // multiple * multiple
    sizes = [first.units, *(size for size in range(top, least - 1, -step) if size < first.units)]
    dense = count({})
    return _Choice(
        tuple(members),
        tuple(sizes),
        tuple(sum(damage_at(curves[g.name], size) for g in members) for size in sizes),
        tuple(dense - count({g.name: size for g in members}) for size in sizes),
    )


def _settled(
    kept: dict[str, int],
    choices: Sequence[_Choice],
    curves: Mapping[str, Curve],
    count: Count,
    wanted: int,
    at_least: float,
    round_to: Callable[[Group], int],
) -> dict[str, int]:
    """The same sizes, with single units added or taken as long as that brings the count nearer to what is wanted.

    A unit that would go past it comes last: what goes beyond is not made up for by another's damage.
    """
    while True:
        now = count(kept)
        gap = wanted - now  # above zero: units can come back
        candidates: list[tuple[bool, float, int, dict[str, int]]] = []
        for choice in choices:
            size = kept[choice.groups[0].name]
            multiple = round_to(choice.groups[0])
            other = min(size + multiple, choice.kept[0]) if gap > 0 else size - multiple
            if other == size or other < _fewest(choice.groups, at_least):
                continue
            if gap < 0 and size % multiple:
                other = size // multiple * multiple
            moved = kept | dict.fromkeys([g.name for g in choice.groups], other)
            change = count(moved) - now
            if change and abs(gap - change) < abs(gap):
                harm = sum(damage_at(curves[g.name], other) - damage_at(curves[g.name], size) for g in choice.groups)
                candidates.append((abs(change) > abs(gap), harm / abs(change), len(candidates), moved))
        if not candidates:
            return kept
        past, _, _, kept = min(candidates)
        if past:
            return kept
