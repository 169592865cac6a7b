"""Options as text -> values; one clear error for what they cannot be."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from secateur.errors import DataError, PlanError, ScoreError, SecateurError
from secateur.scoring.scores import SCORES


def given(**options: Any) -> dict[str, Any]:
    """The options that were given.

    >>> given(rank=8, alpha=None)
    {'rank': 8}
    """
    return {name: value for name, value in options.items() if value is not None}


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them.

    >>> names("attention, mlp,")
    ('attention', 'mlp')
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


def count(text: str) -> int:
    """Read a number of parameters, MACs or bytes.

    >>> count("1.5B")
    1500000000
    """
    factors = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
    number, factor = text.strip().upper(), 1
    if number and number[-1] in factors:
        number, factor = number[:-1], factors[number[-1]]
    try:
        return round(float(number) * factor)
    except (ValueError, OverflowError):
        raise PlanError(f"--target {text}: expected a number such as 100M, 1.5B or 100000000") from None


def counts(text: str, *, option: str) -> list[int]:
    """Whole numbers with commas between them.

    >>> counts("64,512", option="--seq-len")
    [64, 512]
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise DataError(
            f"{option} {text}: expected whole numbers, for example {option} 64 or {option} 64,512"
        ) from None


def layer_range(text: str) -> tuple[int, int]:
    """The first layer, and that after the last.

    >>> layer_range("4:30")
    (4, 30)
    """
    first, colon, last = text.partition(":")
    if not colon or not first.strip().isdigit() or not last.strip().isdigit():
        raise PlanError(f"--layers {text}: expected first:last with the last left out, for example 4:30")
    return int(first), int(last)


def proportion(text: str) -> tuple[float, float]:
    """The shares of the first and the last layer, in proportion.

    >>> proportion("0.5:1.5")
    (0.5, 1.5)
    """
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        raise PlanError(f"--schedule {text}: expected two numbers, for example 0.5:1.5") from None


def run_own_scores(file: Path | None) -> None:
    """Run a file of the user's, which registers scores."""
    if file is None:
        return
    if not file.is_file():
        raise ScoreError(f"--own-scores {file}: no such file; it is to be a Python file that registers scores")
    before = set(SCORES)
    try:
        runpy.run_path(str(file))
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ScoreError(f"--own-scores {file}: {type(error).__name__}: {error}") from error
    if set(SCORES) == before:
        raise ScoreError(f"--own-scores {file}: it registers no score; decorate a function with register_score")
