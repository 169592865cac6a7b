"""What each size of each kind of group takes on one machine, measured once: a table, and the time of any cut by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from secateur.discovery.groups import Discovery


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Seconds of one forward pass, whole and by what groups of a kind save in it when they keep fewer units.

    >>> table = LatencyTable("cpu", 64, 1.0, {"mlp": ((2, 0.3), (8, 0.0))})
    >>> table.saved("mlp", 5), table.saved("mlp", 8), table.saved("mlp", 1)
    (0.15, 0.0, 0.35)
    """

    device: str
    seq_len: int
    dense_seconds: float
    # Kind -> units kept, ascending to all, and the seconds that one group of the kind then saves.
    savings: Mapping[str, tuple[tuple[int, float], ...]]

    def saved(self, kind: str, kept: int) -> float:
        """Seconds that one group saves; between and beyond the sizes measured, on a straight line."""
        points = self.savings[kind]
        for (low, first), (high, last) in pairwise(points):
            if kept <= high:
                return first + (last - first) * (kept - low) / (high - low)
        return 0.0

    def seconds(self, discovery: Discovery, kept: Mapping[str, int]) -> float:
        """Seconds of one forward pass of a model of which the groups named keep so many units."""
        kinds = {group.name: group.kind for group in discovery.groups}
        return self.dense_seconds - sum(self.saved(kinds[name], units) for name, units in kept.items())
