"""What a score may look at: some rows of a weight, and what a pass has found about them.

A score gives every element of a weight a number, its salience, from this evidence alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from secateur.errors import ScoreError

MORE_PRECISE = "check the weights, or use dtype float32 or bfloat16"  # how errors about NaN and Inf end


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
        parts = {"weight": self.weight, "gradient of the weight": self._gradient}
        if self._moments is not None:
            parts["norm of the inputs of the weight"] = self._moments.norm
        for part, values in parts.items():
            if values is not None and not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).sum())
                return ScoreError(f"the {part} {name} has {bad} values that are NaN or Inf; {MORE_PRECISE}")
        return ScoreError(f"{score} of the weight {name} is too large for float32; {MORE_PRECISE}")


Salience = Callable[[Evidence], Tensor]  # one number for each element, shaped like the weight
