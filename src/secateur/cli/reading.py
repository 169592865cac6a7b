"""Options as text -> values; one clear error for what they cannot be."""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import SecateurError

REGISTRIES = {  # option -> the registry that its file adds to, of what, and by what
    "--score-file": ("secateur.scoring.registry", "SCORES", "score", "register_score"),
    "--inputs": ("secateur.models.inputs", "INPUTS", "input", "register_inputs"),
}


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
    value = float(number) * factor
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return round(value)


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
        try:
            values[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{part} is no value as YAML has it; in quotes it is one: {name}='{value}'") from error
    return values


def run_file(option: str, file: Path | None) -> None:
    """Run a Python file of the user's, which registers what the option is for. Raises `SecateurError`."""
    if file is None:
        return
    module, name, what, decorator = REGISTRIES[option]
    registered: Mapping[str, Any] = getattr(importlib.import_module(module), name)
    if not file.is_file():
        raise SecateurError(f"{option} {file}: no such file; it is to be a Python file that registers {what}s")
    before = {**registered}
    try:
        runpy.run_path(str(file))
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise SecateurError(f"{option} {file}: {type(error).__name__}: {error}") from error
    if registered == before:
        raise SecateurError(f"{option} {file}: it registers no {what}; decorate a function with {decorator}")
