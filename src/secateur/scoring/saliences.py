"""What a score may look at of a weight -> a number for every element, its salience -> sums over each dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from secateur.errors import ScoreError
from secateur.scoring.passes.weight_gradients import row_blocks
from secateur.scoring.statistics import Statistics

MORE_PRECISE = "check the weights, or use dtype float32 or bfloat16"  # how errors about NaN and Inf end
ELEMENTS_AT_ONCE = 2**20  # whose saliences are formed at once, so that they stay in the processor's cache
WEIGHT_ELEMENTS = 2**24  # of a weight that are made float32 at once


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the features that a weight reads, over tokens: float32, shaped so that they multiply with the weight."""

    norm: Tensor
    """The square root of the sum of squares."""
    mean: Tensor
    variance: Tensor
    """Unbiased."""
    tokens: Tensor
    """How many: fewer for experts that not all are routed to."""

    def rows(self, rows: slice) -> Moments:
        """Those of some rows of the weight."""
        parts = (x[rows] if x.shape[0] > 1 else x for x in (self.norm, self.mean, self.variance, self.tokens))
        return Moments(*parts)


T = TypeVar("T", Tensor, Moments)


class Evidence:
    """Some rows of a weight and what is known of them: float32, to be left unchanged.

    Raises `ScoreError` where a score looks at a part that it has not declared in `needs`.

    >>> Evidence(torch.ones(2, 3)).gradient
    Traceback (most recent call last):
    secateur.errors.ScoreError: the score looks at the gradient, which it does not ask for: needs="gradient"
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        gradient: Tensor | None = None,
        squared: Tensor | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.weight = weight
        self._gradient, self._squared, self._moments = gradient, squared, moments

    def rows(self, rows: slice) -> Evidence:
        """The evidence on some of these rows."""
        return Evidence(
            self.weight[rows],
            gradient=None if self._gradient is None else self._gradient[rows],
            squared=None if self._squared is None else self._squared[rows],
            moments=None if self._moments is None else self._moments.rows(rows),
        )

    @property
    def gradient(self) -> Tensor:
        """G: the gradient of the mean loss over the samples, shaped like the weight."""
        return self._asked(self._gradient, "the gradient", "gradient")

    @property
    def squared(self) -> Tensor:
        """A: the mean over the samples of the square of each one's own gradient, shaped like the weight."""
        return self._asked(self._squared, "squared gradients", "second order")

    @property
    def inputs(self) -> Moments:
        """Norm, mean and variance of each feature that the weight reads, over all calibration tokens."""
        return self._asked(self._moments, "the inputs", "inputs")

    def _asked(self, value: T | None, part: str, needs: str) -> T:
        if value is None:
            raise ScoreError(f'the score looks at {part}, which it does not ask for: needs="{needs}"')
        return value

    @cached_property
    def first(self) -> Tensor:
        """W G, the first-order term of the change of the loss."""
        return self.weight * self.gradient

    @cached_property
    def second(self) -> Tensor:
        """W A W, twice the second-order term."""
        return self.weight * self.squared * self.weight

    def not_finite(self, name: str, score: str) -> ScoreError:
        """The error of a score whose sums are NaN or Inf: it names what is not finite in the first place."""
        norm = None if self._moments is None else self._moments.norm
        parts = {
            "weight": self.weight,
            "gradient of the weight": self._gradient,
            "norm of the inputs of the weight": norm,
        }
        for part, values in parts.items():
            if values is not None and (bad := int((~torch.isfinite(values)).sum())):
                return ScoreError(f"the {part} {name} has {bad} values that are NaN or Inf; {MORE_PRECISE}")
        return ScoreError(f"{score} of the weight {name} is too large for float32; {MORE_PRECISE}")


Salience = Callable[[Evidence], Tensor]  # one number for each element, shaped like the weight


class SalienceSums:
    """Sums of several scores' saliences, as evidence comes in."""

    def __init__(self, saliences: Mapping[str, Salience]) -> None:
        self.saliences = saliences
        self.sums: dict[str, dict[str, Tensor]] = {}
        """Weight -> `SCORE/DIMENSION` -> sums, as the layer cache saves and restores them."""

    def add(self, name: str, rows: slice, evidence: Evidence, shape: Sequence[int]) -> None:
        """Add the evidence on some rows of the weight `name`, which has this shape.

        Raises `ScoreError` for saliences that are not shaped like the weight, or whose sums are NaN or Inf.
        """
        for part in row_blocks(evidence.weight, ELEMENTS_AT_ONCE):
            self._add(name, slice(rows.start + part.start, rows.start + part.stop), evidence.rows(part), shape)

    def _add(self, name: str, rows: slice, evidence: Evidence, shape: Sequence[int]) -> None:
        for score, salience in self.saliences.items():
            s = salience(evidence)
            if s.shape != evidence.weight.shape:
                raise ScoreError(
                    f"the score {score} gives {tuple(s.shape)} for {tuple(evidence.weight.shape)} elements of the "
                    f"weight {name}; expected one number for each"
                )
            for dim, size in enumerate(shape):
                others = [other for other in range(s.dim()) if other != dim]
                part = s.sum(others) if others else s
                if dim == 0 and not torch.isfinite(part).all():
                    raise evidence.not_finite(name, score)
                key, sums = f"{score}/{dim}", self.sums.setdefault(name, {})
                if key not in sums:
                    sums[key] = torch.zeros(size, device=s.device)
                sums[key][rows if dim == 0 else slice(None)].add_(part)

    def finished(self) -> dict[str, dict[str, tuple[Tensor, ...]]]:
        """The sums on the CPU: score -> weight -> for each dimension."""
        return {
            score: {
                name: tuple(sums[f"{score}/{dim}"].cpu() for dim in range(len(sums) // len(self.saliences)))
                for name, sums in self.sums.items()
            }
            for score in self.saliences
        }


def weight_statistics(weights: Mapping[str, Tensor], saliences: Mapping[str, Salience]) -> Statistics:
    """Sums of saliences that the weights alone decide. Raises `ScoreError` for a weight that is not finite.

    >>> weights = {"w": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
    >>> statistics = weight_statistics(weights, {"l1": lambda evidence: evidence.weight.abs()})
    >>> [sums.tolist() for sums in statistics.sums["l1"]["w"]]
    [[3.0, 7.0], [4.0, 6.0]]
    """
    sums = SalienceSums(saliences)
    for name, weight in weights.items():
        for rows in row_blocks(weight, WEIGHT_ELEMENTS):
            sums.add(name, rows, Evidence(weight[rows].float()), weight.shape)
    return Statistics(sums.finished())
