"""A tokenizer -> the vocabulary of a GGUF file: tokens, merges, special tokens, how text is split, the chat template.

llama.cpp splits text into words by code of its own, which a file chooses by name (`pre`). The name is found by what the
tokenizer does, with the data in `tokenizers.json`: the expressions it splits by, in their order, where "bytes" is the
one of byte-level pairs and "digit" stands for one digit at a time.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from secateur.errors import ExportError

TABLE = Path(__file__).with_name("tokenizers.json")
BYTES, DIGIT, SENTENCEPIECE = "bytes", "digit", "sentencepiece"
SPACE = "\u2581"  # how sentencepiece writes a space
PROBE = "a"  # a text that every tokenizer knows


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about tokens."""

    kind: str  # of the tokenizer, by the file's name for it: byte-level pairs, or sentencepiece's pairs
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: Mapping[str, int]  # "bos", "eos", "eot", "unk", "pad" -> id
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str | None
    notes: tuple[str, ...]


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, *, pre: str | None = None, stops: Sequence[int] = ()
) -> Vocabulary:
    """Say a fast tokenizer as GGUF does, for a model whose embedding has so many rows.

    `pre` names the way to split words where it is not found; `stops` are the ids that end a generated text, the first
    of them the usual one. Raises `ExportError` for a tokenizer that llama.cpp would not follow.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    >>> from transformers import PreTrainedTokenizerFast
    >>> pairs = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> pairs.decoder = decoders.ByteLevel()
    >>> found = vocabulary(PreTrainedTokenizerFast(tokenizer_object=pairs), 4)
    >>> found.pre, found.tokens, found.merges
    ('gpt-2', ('a', 'b', 'ab', '[unused3]'), ('a b',))
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which is what a GGUF file's vocabulary "
            "is made from; save the fast tokenizer of the model's family beside it"
        )
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"a tokenizer of the kind {model['type']} cannot be written; byte-level pairs (BPE) and sentencepiece's "
            "pairs can"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ExportError("a tokenizer whose tokens carry a prefix or suffix within words cannot be written")
    tokens, types = _tokens(backend, spec, rows)
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    notes = [f"the {spec['normalizer']['type']} form of text is not taken"] if _composes(spec["normalizer"]) else []
    stripping = [token["content"] for token in spec["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripping:
        notes.append(f"space beside {', '.join(stripping[:3])} is kept as it is")
    special = _special(tokenizer, stops)
    add_bos, add_eos = _added(tokenizer, special)
    common: dict[str, Any] = {
        "tokens": tokens,
        "special": special,
        "add_bos": add_bos,
        "add_eos": add_eos,
        "chat_template": _template(tokenizer),
        "notes": tuple(notes),
    }
    if _is_byte_level(spec):
        kind, name = _kind(BYTES), pre or _pre_name(spec)
        return Vocabulary(kind, name, types=types, scores=None, merges=merges, add_space=False, **common)
    if model.get("byte_fallback") and _marks_spaces(spec):
        types = _with_bytes(tokens, types, model.get("unk_token"))
        scores = _scores(tokens, merges)
        kind, add_space = _kind(SENTENCEPIECE), _prepends(spec)
        return Vocabulary(kind, "default", types=types, scores=scores, merges=None, add_space=add_space, **common)
    raise ExportError(
        "the tokenizer is neither of byte-level pairs nor of sentencepiece's (byte_fallback, spaces as U+2581), and "
        "llama.cpp has no other kind of pairs"
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a decoder, of which a sequence holds several."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"], "pretokenizers"))


def _composes(normalizer: Mapping[str, Any] | None) -> bool:
    return normalizer is not None and normalizer["type"] == "NFC"


def _tokens(backend: Any, spec: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    ids = backend.get_vocab(with_added_tokens=True)
    last = max(ids.values())
    if last >= rows:
        raise ExportError(
            f"the tokenizer has tokens up to {last}, and the model's embedding {rows} rows; they do not belong together"
        )
    tokens = [f"[unused{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, index in ids.items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for added in spec["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tuple(tokens), tuple(types)


def _special(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> dict[str, int]:
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stops), None)
    others = [stop for stop in stops if stop != eos]
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        "eot": others[0] if others else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in found.items() if isinstance(index, int)}


def _added(tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether a text gets a token before it, and one after it."""
    plain = tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(PROBE).input_ids
    for bos in (False, True):
        for eos in (False, True):
            wrapped = [special.get("bos")] * bos + plain + [special.get("eos")] * eos
            if whole == wrapped:
                return bos, eos
    raise ExportError(
        f"the tokenizer makes {whole} of {PROBE!r}: other tokens around a text than its bos and eos, which a GGUF file "
        "has no word for"
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several, by name
        template = template.get("default")
    return template if isinstance(template, str) else None


# --- byte-level pairs -------------------------------------------------------------------------------------------


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def _kind(name: str) -> str:
    """What a file calls a kind of tokenizer."""
    return str(_table()["kinds"][name])


def _pre_tokenizers() -> dict[tuple[tuple[str, ...], bool], str]:
    return {(tuple(row["splits"]), row.get("ignore_merges", False)): row["pre"] for row in _table()["pre"]}


def known_pre_tokenizers() -> tuple[str, ...]:
    """The names of llama.cpp's ways to split words that are found by themselves.

    >>> known_pre_tokenizers()[:2]
    ('gpt-2', 'smollm')
    """
    return tuple(dict.fromkeys(_pre_tokenizers().values()))


def _pre_name(spec: Mapping[str, Any]) -> str:
    steps = [_split(step) for step in _steps(spec["pre_tokenizer"], "pretokenizers")]
    splits = tuple(step for step in steps if step)
    normal = spec["normalizer"] is None or _composes(spec["normalizer"])
    name = _pre_tokenizers().get((splits, bool(spec["model"].get("ignore_merges"))))
    if name is None or not normal:
        told = " then ".join(repr(each)[:60] for each in splits) or "nothing"
        first = "" if normal else f"normalises text ({spec['normalizer']['type']}), "
        raise ExportError(
            f"the tokenizer splits words in a way that we do not know: it {first}splits by {told}. Say which of "
            f"llama.cpp's it is with --pre NAME (pre=NAME); found by themselves are {', '.join(known_pre_tokenizers())}"
        )
    return name


def _split(step: Mapping[str, Any]) -> str | None:
    """What a step of a pre-tokenizer splits by; None where it does not split."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return "a space put before the text"
        case {"type": "ByteLevel", "use_regex": regex}:
            return BYTES if regex else None
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return str(regex)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            return str(regex)  # keeps what matches, which is everything
    return json.dumps(step)


# --- sentencepiece's pairs --------------------------------------------------------------------------------------


def _marks_spaces(spec: Mapping[str, Any]) -> bool:
    """Whether spaces become U+2581 and nothing else happens to a text before its pairs are merged."""
    marked = False
    for step in _steps(spec["normalizer"], "normalizers"):
        match step:
            case {"type": "Replace", "pattern": {"String": " "}, "content": content} if content == SPACE:
                marked = True
            case {"type": "Prepend", "prepend": prepend} if prepend == SPACE:
                pass
            case _:
                return False
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Metaspace", "replacement": mark, "split": False} if mark == SPACE:
                marked = True
            case {"type": "Split", "pattern": {"String": " "}} if marked:
                pass  # no space is left to split by
            case _:
                return False
    return marked


def _prepends(spec: Mapping[str, Any]) -> bool:
    before = any(step["type"] == "Prepend" for step in _steps(spec["normalizer"], "normalizers"))
    schemes = [step.get("prepend_scheme") for step in _steps(spec["pre_tokenizer"], "pretokenizers")]
    return before or "always" in schemes or "first" in schemes


def _with_bytes(tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> tuple[int, ...]:
    found = list(types)
    for index, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            found[index] = int(TokenType.BYTE)
        elif token == unknown:
            found[index] = int(TokenType.UNKNOWN)
    return tuple(found)


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> tuple[float, ...]:
    """The earlier a token comes out of a merge, the higher: llama.cpp merges the pair of the highest score first."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ")), index)
    return tuple(-float(rank.get(token, len(merges))) for token in tokens)
