"""Plain data of JSON or YAML -> the values that the fields of dataclasses declare, each checked against its type."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from secateur.errors import SecateurError, did_you_mean, unknown

T = TypeVar("T")
Section = Callable[[type[Any], Mapping[str, Any], str], Any]  # a mapping where a dataclass is expected -> its value


def build(kind: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The dataclass of these values, and of those within it.

    Raises `ValueError` for an unknown or missing key and a value of another type, and what the dataclass raises.

    >>> from secateur.evaluation.options import ProfileOptions
    >>> build(ProfileOptions, {"repeats": 3, "batch_sizes": [1, 4]}).grid
    ((64, 1), (64, 4))
    >>> build(ProfileOptions, {"repeats": "many"}, "profile")
    Traceback (most recent call last):
    ValueError: profile: repeats: 'many' is no int
    """
    return _made(kind, values_by_field(kind, data, where, build), where)


def build_known(kind: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """As `build`, but keys that no field has are left out: a later version may have written the data."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    known = {name: value for name, value in data.items() if name in names}
    return _made(kind, values_by_field(kind, known, where, build_known), where)


def check_fields(kind: type[Any], data: Mapping[str, Any], where: str = "") -> None:
    """Raise `ValueError` for a key that is no field of the dataclass `kind`."""
    known = [each.name for each in fields(kind)]
    for name in data:
        if name not in known:
            raise ValueError(
                f"{_at(where)}{name!r} is unknown. Known: {', '.join(known)}{did_you_mean(str(name), known)}"
            )


def values_by_field(
    kind: type[Any], data: Mapping[str, Any], where: str = "", section: Section | None = None
) -> dict[str, Any]:
    """Those values by field, none of which must be there; a `section` within is decoded by the same rule, or as told.

    Raises `ValueError` for an unknown key and a value of another type.
    """
    check_fields(kind, data, where)
    hints, section = get_type_hints(kind), section or values_by_field
    return {name: decode(hints[name], value, f"{_at(where)}{name}", section) for name, value in data.items()}


def decode(kind: Any, data: Any, where: str = "", section: Section = build) -> Any:
    """Data as a `kind`; raises `ValueError`, which says `where`, for any mismatch.

    A kind is str, int, float (finite, and whole numbers stay whole), bool, Path, Any, a `Literal`, `X | None`,
    `tuple[X, ...]`, `tuple[X, Y]`, `Sequence[X]` (also one X), `Mapping[str, X]` or a dataclass with fields of these.

    >>> decode(tuple[int, ...], [1, 2]), decode(Mapping[str, float | None], {"a": None, "b": 0.5})
    ((1, 2), {'a': None, 'b': 0.5})
    >>> decode(float, "many", "samples")
    Traceback (most recent call last):
    ValueError: samples: 'many' is no float
    """
    if kind is Any or (type(data) is kind and kind is not float):
        return data
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return decode(next(each for each in arguments if each is not type(None)), data, where, section)
    if origin is Literal and data in arguments:
        return data
    if kind is float and (number := _number(data)) is not None:
        return number
    if kind is Path and isinstance(data, (str, Path)):
        return Path(data)
    if origin in (tuple, Sequence) and isinstance(data, (list, tuple)):
        kinds = [arguments[0]] * len(data) if _any_number(kind) else arguments
        if len(kinds) == len(data):
            return tuple(decode(each, item, where, section) for each, item in zip(kinds, data, strict=True))
    if origin is Sequence and isinstance(data, str):
        return (data,)
    if origin is not None and origin is not tuple and isinstance(data, Mapping):
        return {name: decode(arguments[1], value, f"{_at(where)}{name}", section) for name, value in data.items()}
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(data, Mapping):
        return section(kind, data, where)
    choices = list(map(str, arguments)) if origin is Literal else []
    expected = " or ".join(choices) or getattr(kind, "__name__", str(kind))
    if origin in (tuple, Sequence):
        expected = "list" if _any_number(kind) else f"list of {len(arguments)}"
    raise ValueError(f"{_at(where)}{data!r:.60} is no {expected}{did_you_mean(str(data), choices)}")


def check_choices(options: Any, error: type[SecateurError]) -> None:
    """Raise an error for the first field of a dataclass that its `Literal` does not hold.

    >>> from secateur.planning.options import CutOptions
    >>> CutOptions(shape="unifrom")
    Traceback (most recent call last):
    secateur.errors.PlanError: shape='unifrom' is unknown. Expected auto, uniform or per-layer. Did you mean uniform?
    """
    for name, hint in get_type_hints(type(options)).items():
        choices, value = literals(hint), getattr(options, name)
        for each in value if isinstance(value, tuple) else [value]:
            if choices and each is not None and each not in choices:
                raise error(unknown(name, each, choices))


def literals(hint: Any) -> list[str]:
    """The choices of a `Literal`, of one that may be None, or of a tuple of them.

    >>> literals(tuple[Literal["a", "b"], ...] | None)
    ['a', 'b']
    """
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return [choice for part in get_args(hint) for choice in literals(part)]


def _any_number(kind: Any) -> bool:
    """Whether a tuple or sequence may have any length."""
    return get_origin(kind) is Sequence or get_args(kind)[-1] is ...


def _number(data: Any) -> float | None:
    """A finite number; YAML 1.1 reads 1e-4 as text."""
    try:
        number = float(data) if isinstance(data, str) else data
    except ValueError:
        return None
    return number if type(number) in (int, float) and math.isfinite(number) else None


def _made(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    for each in fields(kind):  # type: ignore[arg-type]  # a dataclass
        if each.name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{_at(where)}{each.name} is missing")
    return kind(**values)


def _at(where: str) -> str:
    return f"{where}: " if where else ""
