"""Options as text -> values; one clear error for what they cannot be."""

from __future__ import annotations

import runpy
from pathlib import Path

from secateur.errors import DataError, PlanError, ScoreError, SecateurError
from secateur.scoring.registry import SCORES


def comma_separated(text: str) -> tuple[str, ...]:
    """Names with commas between them.

    >>> comma_separated("attention, mlp,")
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


def numbers(text: str, *, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    >>> numbers("64,512", option="--seq-len")
    (64, 512)
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        expected = f"whole numbers, for example {option} 64 or {option} 64,512"
        raise DataError(f"{option} {text}: expected {expected}") from None


def layer_range(text: str) -> tuple[float, float]:
    """The first layer and the one after the last, as numbers or as shares of the depth.

    >>> layer_range("4:30"), layer_range("0.125:0.9375")
    ((4, 30), (0.125, 0.9375))
    """
    try:
        first, last = (float(part) if "." in part else int(part) for part in text.split(":"))
    except ValueError:
        expected = "first:last with the last left out, for example 4:30 or 0.125:0.9375"
        raise PlanError(f"--layers {text}: expected {expected}") from None
    return first, last


def proportion(text: str, *, option: str) -> tuple[float, float]:
    """Two numbers in proportion.

    >>> proportion("0.5:1.5", option="--schedule")
    (0.5, 1.5)
    """
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        raise PlanError(f"{option} {text}: expected two numbers, for example 0.5:1.5") from None


def run_score_file(file: Path | None) -> None:
    """Run a file of the user's, which registers scores."""
    if file is None:
        return
    if not file.is_file():
        raise ScoreError(f"--score-file {file}: no such file; it is to be a Python file that registers scores")
    before = set(SCORES)
    try:
        runpy.run_path(str(file))
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ScoreError(f"--score-file {file}: {type(error).__name__}: {error}") from error
    if set(SCORES) == before:
        raise ScoreError(f"--score-file {file}: it registers no score; decorate a function with register_score")
