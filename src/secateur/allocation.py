"""Scores and a budget -> how many units each group keeps: one ranking over all groups, by what a unit's removal saves.

A unit's price is its score divided by what goes with it (parameters, MACs, bytes or time, as the budget counts). The
cheapest go first wherever they are, so heads, channels and experts of all layers compete, and layers that matter keep
their units without being named. With a uniform shape, the n-th cheapest units of all layers go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.axes.groups import Group
from secateur.errors import PlanError

Count = Callable[[dict[str, int]], int]  # units kept by group (all, where not named) -> what the budget counts


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
        alike: dict[tuple[str, ...], list[Group]] = {}
        for group in axis:
            alike.setdefault((group.kind, str(group.units)) if uniform else (group.name,), []).append(group)
        for members in alike.values():
            first = members[0]
            scores = torch.stack([units[group.name].double().sort().values for group in members])
            if bool((scores < 0).any()):
                raise PlanError(f"the scores of {first.name} are below zero: they cannot be weighed against others")
            saved = dense - count({group.name: group.units - 1 for group in members})
            least = max(*(group.least for group in members), math.ceil(at_least * first.units), 1)
            prices = scores.sum(0) / max(saved, 1)
            found.append(Family(tuple(members), prices, min(least, first.units), round_to(first)))
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
