"""Evidence on a weight, a few rows at a time -> sums of saliences over each of its dimensions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur.errors import ScoreError
from secateur.scoring.evidence import Evidence, Salience
from secateur.scoring.statistics import Statistics

ELEMENTS_AT_ONCE = 2**20  # whose saliences are formed at once, so that they stay in the processor's cache
WEIGHT_ELEMENTS = 2**24  # of a weight that are made float32 at once


class SalienceSums:
    """Sums of several scores' saliences, as evidence comes in. The layer cache saves and restores them by weight."""

    def __init__(self, saliences: Mapping[str, Salience]) -> None:
        self.saliences = saliences
        self.sums: dict[str, dict[str, tuple[Tensor, ...]]] = {score: {} for score in saliences}

    def add(self, name: str, rows: slice, evidence: Evidence, shape: Sequence[int]) -> None:
        """Add the evidence on some rows of the weight `name`, which has this shape.

        Raises `ScoreError` for saliences that are not shaped like the weight, or whose sums are NaN or Inf.
        """
        count = len(evidence.weight)
        at_once = max(1, ELEMENTS_AT_ONCE * count // max(1, evidence.weight.numel()))
        for first in range(0, count, at_once):
            part = slice(first, min(first + at_once, count))
            self._add(name, slice(rows.start + part.start, rows.start + part.stop), evidence.rows(part), shape)

    def _add(self, name: str, rows: slice, evidence: Evidence, shape: Sequence[int]) -> None:
        for score, salience in self.saliences.items():
            s = salience(evidence)
            if s.shape != evidence.weight.shape:
                raise ScoreError(
                    f"the score {score} gives {tuple(s.shape)} for {tuple(evidence.weight.shape)} elements of the "
                    f"weight {name}; expected one number for each"
                )
            if name not in self.sums[score]:
                self.sums[score][name] = tuple(torch.zeros(size, device=s.device) for size in shape)
            for dim, total in enumerate(self.sums[score][name]):
                others = [other for other in range(s.dim()) if other != dim]
                part = s.sum(others) if others else s
                if dim > 0:
                    total += part
                    continue
                if not torch.isfinite(part).all():
                    raise evidence.not_finite(name, score)
                total[rows] += part

    def finished(self) -> dict[str, dict[str, tuple[Tensor, ...]]]:
        """The sums on the CPU: score -> weight -> for each dimension."""
        return {
            score: {name: tuple(sums.cpu() for sums in dims) for name, dims in by_weight.items()}
            for score, by_weight in self.sums.items()
        }

    def by_weight(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> `SCORE/DIMENSION` -> sums, for the layer cache."""
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for score, by_weight in self.sums.items():
            for name, dims in by_weight.items():
                found[name] |= {f"{score}/{dim}": sums for dim, sums in enumerate(dims)}
        return found

    def restore(self, weight: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `by_weight` gave for a weight."""
        dims: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            score, _, dim = key.rpartition("/")
            dims[score][int(dim)] = tensor
        for score, by_dim in dims.items():
            self.sums[score][weight] = tuple(by_dim[i] for i in range(len(by_dim)))


def weight_rows(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight, so many at a time that their float32 copy is small; none of a scalar.

    >>> list(weight_rows(torch.zeros(3, 2)))
    [slice(0, 3, None)]
    """
    if weight.dim() == 0:
        return
    at_once = max(1, WEIGHT_ELEMENTS * weight.shape[0] // max(1, weight.numel()))
    for first in range(0, weight.shape[0], at_once):
        yield slice(first, min(first + at_once, weight.shape[0]))


def weight_statistics(weights: Mapping[str, Tensor], saliences: Mapping[str, Salience]) -> Statistics:
    """Sums of saliences that the weights alone decide. Raises `ScoreError` for a weight that is not finite.

    >>> weights = {"w": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
    >>> statistics = weight_statistics(weights, {"l1": lambda evidence: evidence.weight.abs()})
    >>> [sums.tolist() for sums in statistics.sums["l1"]["w"]]
    [[3.0, 7.0], [4.0, 6.0]]
    """
    sums = SalienceSums(saliences)
    for name, weight in weights.items():
        for rows in weight_rows(weight):
            sums.add(name, rows, Evidence(weight[rows].float()), weight.shape)
    return Statistics(sums.finished())
