"""How a run treats what is there already, and which cuts a sweep compares; `recipe.py` has what decides the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from secateur.errors import DataError, PlanError, check_installed
from secateur.progress import ProgressBars

MOST_RATIOS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run treats what is there, what it keeps and what it shows; none of it changes the weights."""

    overwrite: bool = False
    """Replace the output folder if it exists."""
    resume: bool = False
    """Continue a killed run from its last finished stage."""
    folder: Path | None = None
    """Run folder: keep statistics here, for other plans of the same model and text."""
    command: str | None = None
    """The command line, for the record in the folder."""
    bars: ProgressBars | None = None
    """What shows progress bars: stage -> context manager of a callback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """Which cuts to compare, and on how much text. Raises `PlanError` or `DataError`."""

    ratios: tuple[float, ...]
    """Shares to remove: A:B:STEP with both ends, or numbers with commas."""
    scores: tuple[str, ...] = ()
    """Scores to compare. Default: the preset's."""
    presets: tuple[str, ...] = ("best",)
    """Presets to compare."""
    protocols: tuple[str, ...] = ("served@128",)
    """Windows in which texts are read, as `evaluate` takes them."""
    max_tokens: int | None = None
    """Score only the first so many tokens of each text."""
    plot: bool | None = None
    """Draw the frontier. Default: where matplotlib is installed."""

    def __post_init__(self) -> None:
        if not self.presets:
            raise PlanError("presets is empty: name one, for example --presets best")
        _check_ratios(self.ratios)
        if self.plot:
            check_installed(DataError, "matplotlib", extra="plot", what="the picture of a sweep")


def ratios_in(text: str) -> tuple[float, ...]:
    """Read `first:last:step`, both ends among them, or numbers with commas between.

    Raises `PlanError` for anything else, and for ratios outside (0, 1).

    >>> ratios_in("0.1:0.6:0.1"), ratios_in("0.2,0.5")
    ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.2, 0.5))
    """
    try:
        if ":" in text:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if step <= 0 or not (last - first).is_finite() or (last - first) / step >= MOST_RATIOS:
                raise ValueError
            found = [float(first + i * step) for i in range(math.floor((last - first) / step) + 1)]
        else:
            found = [float(Decimal(part)) for part in text.split(",")]
    except (ValueError, InvalidOperation):
        raise PlanError(f"--ratios {text}: expected first:last:step or numbers, for example 0.1:0.6:0.1") from None
    _check_ratios(found)
    return tuple(found)


def _check_ratios(ratios: Sequence[float]) -> None:
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise PlanError(f"ratio={ratio:g} is outside (0, 1): it is the share to remove, for example 0.1:0.6:0.1")
    if not ratios:
        raise PlanError("there is no ratio: give some, for example --ratios 0.1:0.6:0.1")
