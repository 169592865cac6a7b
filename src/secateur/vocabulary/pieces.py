"""Tokenizer -> which tokens may go, and what a text is encoded into where one of them has gone.

The parts of a token are fewer and smaller tokens of the same text: for BPE the two of the merge that makes it, for
Unigram its best other segmentation, for WordPiece its longest pieces, and for a single character its bytes, where the
tokenizer falls back on them. Tokens that every text needs stay: bytes, characters that nothing else can spell, special
and added tokens, and those of the chat template.

A kept token's parts have to stay for BPE, which makes it of them. Then a text of kept tokens alone is encoded as
before: BPE's merges, Unigram's best path and WordPiece's longest match are still there, and nothing better is new.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.errors import PlanError

METASPACE = "▁"
KINDS = ("BPE", "Unigram", "WordPiece")
Parts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The tokens of a tokenizer, and how they hang together."""

    tokens: Mapping[int, str]
    """Token id -> token, as the tokenizer spells it."""
    parts: Mapping[int, Parts]
    """Token id -> what its text is encoded into without it; empty for a token that no text is encoded into."""
    needed: frozenset[int]
    """Ids of the tokens that stay whatever is asked for."""
    closed: bool
    """Whether the parts of a kept token have to stay."""


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The pieces of a fast tokenizer. Raises `PlanError` for any other, and for one of whole words.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> bpe = models.BPE({"a": 0, "b": 1, "ab": 2, "aba": 3}, [("a", "b"), ("ab", "a")])
    >>> pieces = pieces_of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe)))
    >>> pieces.parts, sorted(pieces.needed)
    ({2: (0, 1), 3: (2, 0)}, [0, 1])
    """
    data = tokenizer_json(tokenizer)
    model = data["model"]
    kind = model.get("type")
    if kind not in KINDS:
        raise PlanError(
            f"axes=vocabulary: the tokenizer is of type {kind}, whose tokens have no smaller parts. Expected one of "
            f"{', '.join(KINDS)}: cut other axes, for example axes=attention,mlp"
        )
    vocabulary = _vocabulary(model)
    added = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    # Strings of the normalizer and the decoder stand for others ("▁" for a space): their bytes would not.
    named = {text for key in ("normalizer", "pre_tokenizer", "decoder") for text in _strings(data.get(key))}
    whole = {vocabulary[text] for text in {METASPACE, *named} if text in vocabulary}
    parts, needed = {"BPE": _bpe, "Unigram": _unigram, "WordPiece": _wordpiece}[kind](model, vocabulary)
    needed |= whole | {*added.values()} | _in_use(tokenizer, data)
    for number in added.values():
        parts.pop(number, None)  # it is found in the text as it stands
    return Pieces(
        tokens={number: token for token, number in (vocabulary | added).items()},
        parts={number: of for number, of in parts.items() if number not in needed or kind == "BPE"},
        needed=frozenset(needed),
        closed=kind == "BPE",
    )


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `tokenizer.json` says of a fast tokenizer. Raises `PlanError` for one that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(
            f"axes=vocabulary: {type(tokenizer).__name__} is no fast tokenizer, and only a tokenizer.json can be "
            "rewritten. Convert it first (AutoTokenizer.from_pretrained(MODEL, use_fast=True)), or cut other axes"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    return data


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in reversed([*enumerate(model["vocab"])])}
    return dict(model["vocab"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _in_use(tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> set[int]:
    """Special tokens, those that the tokenizer puts around a text, and those of an empty chat."""
    model = data["model"]
    ids = {*tokenizer.all_special_ids, *tokenizer("").input_ids, model.get("unk_id")}
    if model["type"] != "Unigram":
        ids.add(model["vocab"].get(model.get("unk_token")))
    if tokenizer.chat_template:
        chat: Any = [{"role": role, "content": "."} for role in ("system", "user", "assistant")]
        for messages in (chat, chat[1:], chat[1:2]):
            with suppress(Exception):  # templates refuse what they do not expect, each in its own way
                text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
                ids |= {*tokenizer(text, add_special_tokens=False).input_ids}
    return {number for number in ids if number is not None}


def _byte_tokens(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """Byte -> the token that stands for it where a character has none."""
    return {byte: vocabulary[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary}


def _bytes_of(text: str, of_byte: Mapping[int, int]) -> Parts | None:
    """The byte tokens of a text; None where one is missing."""
    found = [of_byte.get(byte) for byte in text.encode("utf-8", errors="surrogatepass")]
    return tuple(number for number in found if number is not None) if None not in found else None


# --- BPE --------------------------------------------------------------------------------------------------------------


def _bpe(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[dict[int, Parts], set[int]]:
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    of_byte = _byte_tokens(vocabulary) if model.get("byte_fallback") else {}
    ranks: dict[tuple[int, int], tuple[int, int]] = {}  # the two tokens of a merge -> its rank, and what it makes
    made_by: dict[int, list[Parts]] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made = vocabulary[left + right.removeprefix(prefix)]
        ranks.setdefault((vocabulary[left], vocabulary[right]), (rank, made))
        made_by.setdefault(made, []).append((vocabulary[left], vocabulary[right]))
    parts: dict[int, Parts] = {}
    needed = {*of_byte.values()}
    for token, number in vocabulary.items():
        if number in needed:
            continue
        makers = made_by.get(number, [])
        if len(makers) == 1:
            parts[number] = makers[0]
            continue
        characters = _characters(token, prefix, suffix)
        if makers or len(characters) > 1:
            symbols: list[int] = []
            for character in characters:
                symbols += [vocabulary[character]] if character in vocabulary else _bytes_of(character, of_byte) or ()
            parts[number] = _merged(symbols, ranks, number)
        elif spelled := _bytes_of(token, of_byte):
            parts[number] = spelled
        else:
            needed.add(number)
    return parts, needed


def _characters(token: str, prefix: str, suffix: str) -> list[str]:
    """The symbols that BPE starts from: the characters, but for the first behind the prefix, the last with the suffix.

    >>> _characters("ab</w>", "", "</w>"), _characters("##ab", "##", "")
    (['a', 'b</w>'], ['##a', '##b'])
    """
    first = prefix if prefix and token.startswith(prefix) and len(token) > len(prefix) else ""
    end = suffix if suffix and token.endswith(suffix) and len(token) > len(suffix) else ""
    letters = token[len(first) : len(token) - len(end)]
    return [
        f"{first if place == 0 else prefix}{letter}{end if place == len(letters) - 1 else ''}"
        for place, letter in enumerate(letters)
    ]


def _merged(symbols: list[int], ranks: Mapping[tuple[int, int], tuple[int, int]], whole: int) -> Parts:
    """What BPE makes of the symbols, before a merge that makes the whole."""
    while len(symbols) > 1:
        found = [(*ranks[pair], place) for place, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not found:
            break
        _, made, place = min(found)
        if made == whole and len(symbols) == 2:
            break
        symbols = [*symbols[:place], made, *symbols[place + 2 :]]
    return tuple(symbols)


# --- Unigram ----------------------------------------------------------------------------------------------------------


def _unigram(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[dict[int, Parts], set[int]]:
    scores = dict(reversed(model["vocab"]))
    of_byte = _byte_tokens(vocabulary) if model.get("byte_fallback") else {}
    longest = max(map(len, scores), default=1)
    parts: dict[int, Parts] = {}
    needed = {*of_byte.values()}
    for piece, number in vocabulary.items():
        if number in needed:
            continue
        found = _best_path(piece, scores, longest) if len(piece) > 1 else None
        spelled: Sequence[int] | None = [vocabulary[part] for part in found] if found else _bytes_of(piece, of_byte)
        if spelled:
            parts[number] = tuple(spelled)
        else:
            needed.add(number)
    return parts, needed


def _best_path(text: str, scores: Mapping[str, float], longest: int) -> list[str] | None:
    """The pieces of the highest sum of scores that make a text, without the text itself; None where none do.

    >>> _best_path("abc", {"a": -1.0, "bc": -3.0, "ab": -2.0, "c": -1.0, "abc": 0.0}, 3)
    ['ab', 'c']
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(text) + 1):
        candidates = [
            (best[start][0] + scores[text[start:end]], start)
            for start in range(max(0, end - longest), end)
            if text[start:end] in scores and (start, end) != (0, len(text))
        ]
        best.append(max(candidates, default=(float("-inf"), -1)))
    if best[-1][1] < 0 or best[-1][0] == float("-inf"):
        return None
    pieces, end = list[str](), len(text)
    while end:
        start = best[end][1]
        pieces.append(text[start:end])
        end = start
    return pieces[::-1]


# --- WordPiece --------------------------------------------------------------------------------------------------------


def _wordpiece(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[dict[int, Parts], set[int]]:
    prefix: str = model["continuing_subword_prefix"]
    parts: dict[int, Parts] = {}
    needed: set[int] = set()
    for token, number in vocabulary.items():
        found = _longest_matches(token, prefix, vocabulary)
        if found is None:
            needed.add(number)
        else:
            parts[number] = found
    return parts, needed


def _longest_matches(token: str, prefix: str, vocabulary: Mapping[str, int]) -> Parts | None:
    """What WordPiece makes of a token's text without it; None where a character has no token of its own there."""
    first = prefix if prefix and token.startswith(prefix) and len(token) > len(prefix) else ""
    letters = token[len(first) :]
    alone = [f"{first if place == 0 else prefix}{letter}" for place, letter in enumerate(letters)]
    if len(letters) < 2 or any(character not in vocabulary for character in alone):
        return None
    found, start = list[int](), 0
    while start < len(letters):
        head = first if start == 0 else prefix
        end = next(
            end
            for end in range(len(letters), start, -1)
            if f"{head}{letters[start:end]}" in vocabulary and (start, end) != (0, len(letters))
        )
        found.append(vocabulary[f"{head}{letters[start:end]}"])
        start = end
    return tuple(found)
