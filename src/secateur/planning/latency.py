"""What each size of each kind of group takes on one machine, measured once: a table, and the time of any cut by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from secateur.discovery.groups import Discovery


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Seconds of one forward pass, whole and by what groups of a kind save in it when they keep fewer units.

    >>> table = LatencyTable("cpu", 64, 1.0, {"mlp": ((0.25, 0.0375), (1.0, 0.0))})
    >>> [round(table.saved("mlp", kept, units=8), 6) for kept in (5, 8, 1)]
    [0.15, 0.0, 0.35]
    """

    device: str
    seq_len: int
    dense_seconds: float
    # Kind -> share of the units kept, ascending to 1, and the seconds that a group then saves, for each of its units.
    saved_per_unit: Mapping[str, tuple[tuple[float, float], ...]]

    def saved(self, kind: str, kept: int, *, units: int) -> float:
        """Seconds that a group of so many units saves; between and beyond the shares measured, on a straight line."""
        share = kept / units
        for (low, first), (high, last) in pairwise(self.saved_per_unit.get(kind, ())):  # none where nothing may go
            if share <= high:
                return units * (first + (last - first) * (share - low) / (high - low))
        return 0.0

    def seconds(self, discovery: Discovery, kept: Mapping[str, int]) -> float:
        """Seconds of one forward pass of a model of which the groups named keep so many units."""
        groups = {group.name: group for group in discovery.groups}
        saved = (self.saved(groups[name].kind, size, units=groups[name].units) for name, size in kept.items())
        return self.dense_seconds - sum(saved)
