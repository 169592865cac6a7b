"""Options as text -> values; one clear error for what they cannot be."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import ScoreError, SecateurError
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
    return round(float(number) * factor)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    >>> whole_numbers("64,512")
    (64, 512)
    """
    return tuple(map(int, text.split(",")))


def two_numbers(text: str) -> tuple[float, float]:
    """Two numbers with a colon between them, of which whole ones stay whole.

    >>> two_numbers("4:30"), two_numbers("0.125:0.9375")
    ((4, 30), (0.125, 0.9375))
    """
    first, last = (int(part) if part.strip().isdigit() else float(part) for part in text.split(":"))
    return first, last


def named_values(text: str) -> dict[str, Any]:
    """Values by name, with commas between them; a value is read as YAML reads it.

    >>> named_values("minutes=20, method=full")
    {'minutes': 20, 'method': 'full'}
    """
    values = {}
    for part in comma_separated(text):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(part)
        values[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return values


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
