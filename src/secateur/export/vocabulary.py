"""A BPE tokenizer -> the vocabulary of a GGUF file: tokens, merges, special tokens, pre-tokenizer, chat template.

llama.cpp has pre-tokenizers of its own, which a file chooses by name (`pre`). The name is looked up in
`tokenizers.json` by the expressions that the tokenizer splits by, in their order, where "bytes" is the one of
byte-level BPE and "digit" stands for one digit at a time.
"""

from __future__ import annotations

import functools
import itertools
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
SPACE = "\u2581"  # a space, as SentencePiece writes it
PROBE = "a"  # a text in every vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and how text becomes them, as a GGUF file stores it."""

    kind: str  # of the tokenizer, by the file's name for it: byte-level or SentencePiece BPE
    pre: str  # pre-tokenizer
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
    """Convert a fast tokenizer to GGUF's vocabulary, for a model whose embedding has so many rows.

    `pre` names the pre-tokenizer where it is not recognised; `stops` are the ids that end a generated text, the usual
    one first. Raises `ExportError` for a tokenizer that llama.cpp would not follow.
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
            f"a tokenizer of the kind {model['type']} cannot be written; byte-level BPE and SentencePiece BPE can"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ExportError("a tokenizer whose tokens carry a prefix or suffix within words cannot be written")
    tokens, types = _tokens(backend, spec, rows)
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    notes = [f"text is not normalised to {spec['normalizer']['type']}"] if _composes(spec["normalizer"]) else []
    stripping = [token["content"] for token in spec["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripping:
        notes.append(f"space beside {', '.join(stripping[:3])} is not stripped")
    special = _special(tokenizer, stops)
    add_bos, add_eos = _wrapping(tokenizer, special)
    common: dict[str, Any] = {"tokens": tokens, "special": special, "add_bos": add_bos, "add_eos": add_eos}
    common |= {"chat_template": _template(tokenizer), "notes": tuple(notes)}
    if any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"], "pretokenizers")):
        kind, name = _table()["kinds"][BYTES], pre or _pre_name(spec)
        return Vocabulary(kind, name, types=types, scores=None, merges=merges, add_space=False, **common)
    if model.get("byte_fallback") and _marks_spaces(spec):
        types = _with_bytes(tokens, types, model.get("unk_token"))
        scores = _scores(tokens, merges)
        kind, add_space = _table()["kinds"][SENTENCEPIECE], _prepends(spec)
        return Vocabulary(kind, "default", types=types, scores=scores, merges=None, add_space=add_space, **common)
    raise ExportError(
        "the tokenizer is neither byte-level BPE nor SentencePiece BPE (byte_fallback, spaces as U+2581), and "
        "llama.cpp has no other kind of BPE"
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a decoder, of which a sequence holds several."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


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
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        "eot": others[0] if others else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in ids.items() if isinstance(index, int)}


def _wrapping(tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text, and its eos after it."""
    plain = tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(PROBE).input_ids
    for bos, eos in itertools.product((False, True), repeat=2):
        if whole == [special.get("bos")] * bos + plain + [special.get("eos")] * eos:
            return bos, eos
    raise ExportError(
        f"the tokenizer makes {whole} of {PROBE!r}: other tokens around a text than its bos and eos, which a GGUF file "
        "has no key for"
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several, by name
        template = template.get("default")
    return template if isinstance(template, str) else None


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def _pre_tokenizers() -> dict[tuple[tuple[str, ...], bool], str]:
    return {(tuple(row["splits"]), row.get("ignore_merges", False)): row["pre"] for row in _table()["pre"]}


def known_pre_tokenizers() -> tuple[str, ...]:
    """Names of llama.cpp's pre-tokenizers that are recognised."""
    return tuple(dict.fromkeys(_pre_tokenizers().values()))


def _pre_name(spec: Mapping[str, Any]) -> str:
    steps = [_split(step) for step in _steps(spec["pre_tokenizer"], "pretokenizers")]
    splits = tuple(step for step in steps if step)
    normal = spec["normalizer"] is None or _composes(spec["normalizer"])
    name = _pre_tokenizers().get((splits, bool(spec["model"].get("ignore_merges"))))
    if name is None or not normal:
        how = " then ".join(repr(each)[:60] for each in splits) or "nothing"
        first = "" if normal else f"normalises text ({spec['normalizer']['type']}), "
        raise ExportError(
            f"the pre-tokenizer is not recognised: it {first}splits by {how}. Name llama.cpp's with --pre NAME "
            f"(pre=NAME); recognised are {', '.join(known_pre_tokenizers())}"
        )
    return name


def _split(step: Mapping[str, Any]) -> str | None:
    """The expression that a step of a pre-tokenizer splits by; None where it does not split."""
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
    def changed(token: str, kind: int) -> int:
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        return int(TokenType.BYTE if is_byte else TokenType.UNKNOWN if token == unknown else kind)

    return tuple(map(changed, tokens, types))


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> tuple[float, ...]:
    """Higher for tokens of earlier merges: llama.cpp merges the pair with the highest score first."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ")), index)
    return tuple(-float(rank.get(token, len(merges))) for token in tokens)
