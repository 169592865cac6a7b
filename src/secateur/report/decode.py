"""JSON data -> dataclasses, with every value checked against its annotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def decode(kind: Any, data: Any) -> Any:
    """Decode JSON data as `kind`; raises `KeyError` for a missing key and `ValueError` for any other mismatch.

    A kind is str, int, float, Any, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]` or a dataclass with
    fields of these. Keys that a dataclass does not name are ignored, so data of later versions can be read.

    >>> decode(tuple[int, ...], [1, 2]), decode(Mapping[str, float | None], {"a": None, "b": 1})
    ((1, 2), {'a': None, 'b': 1.0})
    >>> decode(int, 1.5)
    Traceback (most recent call last):
    ValueError: expected int, found 1.5
    """
    arguments = get_args(kind)
    if kind is Any or (type(data) is kind and kind in (str, int)):
        return data
    if kind is float and type(data) in (int, float) and math.isfinite(data):
        return float(data)
    if type(None) in arguments:
        return None if data is None else decode(arguments[0], data)
    if get_origin(kind) is tuple and isinstance(data, list) and (arguments[-1] is ... or len(data) == len(arguments)):
        kinds = [arguments[0]] * len(data) if arguments[-1] is ... else arguments
        return tuple(decode(each, item) for each, item in zip(kinds, data, strict=True))
    if get_origin(kind) is Mapping and isinstance(data, dict):
        return {key: decode(arguments[1], value) for key, value in data.items()}
    if is_dataclass(kind) and isinstance(data, dict):
        hints = get_type_hints(kind)
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        names = [name for name in hints if name in data or name in required]
        make: Any = kind
        return make(**{name: decode(hints[name], data[name]) for name in names})
    raise ValueError(f"expected {getattr(kind, '__name__', kind)}, found {data!r:.60}")
