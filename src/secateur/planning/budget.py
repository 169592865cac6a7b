"""Units kept by group -> what a budget counts: parameters, MACs, bytes or microseconds.

A new budget is one entry of `COUNTERS`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.planning.latency import LatencyTable

Sizes = dict[str, int]  # group -> units kept; groups that are not named keep all


@dataclass(frozen=True, slots=True)
class SizedModel:
    """A model whose groups keep some of their units, and what budgets count it by."""

    discovery: Discovery
    kept: Mapping[str, int]
    dropped_layers: frozenset[int] = frozenset()
    item_bytes: int = 2
    latency: LatencyTable | None = None

    def parameters(self, *, embeddings: bool = True) -> int:
        """Parameters, tied ones once."""
        return count_parameters(self.discovery, self.kept, dropped_layers=self.dropped_layers, embeddings=embeddings)

    def microseconds(self) -> int:
        """Time of one forward pass by the latency table. Raises `PlanError` where there is none."""
        if self.latency is None:
            raise PlanError("a budget of latency needs a latency table: see secateur.evaluation.latency.latency_table")
        return round(self.latency.seconds(self.discovery, self.kept) * 1e6)


COUNTERS: dict[str, Callable[[SizedModel], int]] = {
    "parameters": lambda model: model.parameters(),
    "non-embedding": lambda model: model.parameters(embeddings=False),
    "macs": lambda model: sum(count_macs(model.discovery, model.kept, dropped_layers=model.dropped_layers).values()),
    "memory": lambda model: model.item_bytes * model.parameters(),
    "latency": lambda model: model.microseconds(),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be left of a model."""

    count: Callable[[Sizes], int]
    target: int

    def closest(self, candidates: Iterable[Sizes]) -> Sizes:
        """The candidate whose count is nearest to the target; of equals the first."""
        return min(candidates, key=lambda kept: abs(self.count(kept) - self.target))

    def bisect(self, sizes_at: Callable[[int], Sizes], steps: int) -> Sizes:
        """The sizes nearest to the target, where each of the steps 0, 1, ... removes at least what the last one did.

        >>> Budget(lambda kept: kept["mlp"], 5).bisect(lambda step: {"mlp": 12 - 2 * step}, 6)
        {'mlp': 4}
        """
        enough = bisect_left(range(steps), True, key=lambda step: self.count(sizes_at(step)) <= self.target)
        return self.closest(sizes_at(step) for step in (enough, max(0, enough - 1)))


def counter(
    of: str, discovery: Discovery, *, item_bytes: int = 2, latency: LatencyTable | None = None
) -> Callable[[Sizes], int]:
    """The function that counts what the budget `of` counts.

    The group of layers says only how many stay: they are counted as if the last ones went.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> count = counter("non-embedding", discover(config))
    >>> count({}) - count({"layers.0.mlp": 23})  # a row, a bias and a column
    25
    """

    def count(kept: Sizes) -> int:
        widths = dict(kept)
        layers = widths.pop("layers", None)
        dropped = frozenset() if layers is None else frozenset(range(layers, discovery.depth))
        return COUNTERS[of](SizedModel(discovery, widths, dropped, item_bytes, latency))

    return count
