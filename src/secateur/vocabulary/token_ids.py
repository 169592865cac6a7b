"""Token ids in a config or a generation config -> the same tokens' ids after a cut of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SUFFIXES = ("_token_id", "_token_ids", "_tokens_ids", "_token_index", "_words_ids")
NAMES = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "sequence_bias")


def token_id_settings(settings: Mapping[str, Any], keep: Sequence[int], *, size: int | None = None) -> dict[str, Any]:
    """Dotted name -> new value, of every setting that names tokens and changes; `keep` are the ids that stay.

    A token that has gone is left out of a list; a setting of one token alone becomes None, and a sequence that holds it
    is left out whole: without the token it would be another. Ids that a vocabulary of
    `size` tokens does not have name none of them, and stay.

    >>> token_id_settings({"eos_token_id": [2, 7], "pad_token_id": 3, "text_config": {"bos_token_id": 0}}, [0, 2, 7])
    {'eos_token_id': [1, 2], 'pad_token_id': None}
    """
    new = {before: after for after, before in enumerate(keep)}
    return {name: changed for name, value in _named(settings) if (changed := _changed(name, value, new, size)) != value}


def _changed(name: str, value: Any, new: Mapping[int, int], size: int | None) -> Any:
    """The new value of a setting. A sequence of tokens of which one has gone would be another: it is left out whole."""
    if not value or not isinstance(value, list) or not all(isinstance(item, list) for item in value):
        return _renumbered(value, new, size)
    if name.endswith("forced_decoder_ids"):  # places and tokens
        pairs = [[place, _renumbered(token, new, size)] for place, token in value]
        return [pair for pair, before in zip(pairs, value, strict=True) if pair[1] is not None or before[1] is None]
    if name.endswith("sequence_bias"):
        pairs = [[_sequence(tokens, new, size), bias] for tokens, bias in value]
        return [pair for pair in pairs if pair[0] is not None] or None
    if name.endswith("_words_ids"):
        return [tokens for each in value if (tokens := _sequence(each, new, size)) is not None] or None
    return _renumbered(value, new, size)


def _sequence(tokens: list[int], new: Mapping[int, int], size: int | None) -> list[int] | None:
    found = _renumbered(tokens, new, size)
    return found if len(found) == len(tokens) else None


def _named(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and name not in NAMES:
            yield from _named(value, f"{prefix}{name}.")
        elif name in NAMES or str(name).endswith(SUFFIXES):
            yield f"{prefix}{name}", value


def _renumbered(value: Any, new: Mapping[int, int], size: int | None) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    if isinstance(value, int):
        return new.get(value) if value >= 0 and (size is None or value < size) else value
    found = [_renumbered(item, new, size) for item in value]
    return [item for item, before in zip(found, value, strict=True) if item is not None or before is None]
