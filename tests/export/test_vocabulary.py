"""Tokenizers in GGUF files: llama.cpp makes the tokenizer's own tokens of a text, or the tokenizer is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import assert_agrees, byte_level_tokenizer, fields, needs_llama_cpp
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from secateur import export_gguf
from secateur.data.text import demo_texts
from secateur.errors import ExportError
from secateur.export.options import GgufOptions
from secateur.export.vocabulary import known_pre_tokenizers, vocabulary
from tiny import tiny_model, tiny_tokenizer


def piece_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Sentencepiece's pairs, with bytes for what has no token, and a token before every text."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    words.train_from_iterator([demo_texts()[0][:40_000]], trainer)
    spec = json.loads(words.to_str())
    whole = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        whole.normalizer = normalizers.Sequence(steps)
    elif kind == "plain":
        whole.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    described = json.loads(whole.to_str())
    described["model"] |= {"vocab": spec["model"]["vocab"], "merges": spec["model"]["merges"]}
    complete = Tokenizer.from_str(json.dumps(described))
    complete.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    complete.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=complete, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def split_by(expression: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: Mapping[str, Any] = {
    "gpt-2": lambda: byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level_tokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "llama-bpe": lambda: byte_level_tokenizer(split_by(LLAMA3_WORDS), ignore_merges=True),
    "smaug-bpe": lambda: byte_level_tokenizer(split_by(LLAMA3_WORDS)),
    "qwen2": lambda: byte_level_tokenizer(split_by(QWEN2_WORDS)),
}


@needs_llama_cpp
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_pre_tokenizers_are_recognised_and_split_alike(name: str, tmp_path: Path) -> None:
    assert name in known_pre_tokenizers()
    model = tiny_model(vocab_size=410)
    options = GgufOptions("f32", check=True)
    written = export_gguf(model, PRE_TOKENIZERS[name](), tmp_path / "m.gguf", options)
    assert written.pre == fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name
    assert_agrees(written)


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "prefix"), [("prepend", True), ("plain", False), ("first", True)])
def test_sentencepiece_texts_are_split_alike(kind: str, prefix: bool, tmp_path: Path) -> None:
    model, options = tiny_model(vocab_size=640), GgufOptions("f32", check=True)
    checked = export_gguf(model, piece_tokenizer(kind), tmp_path / "m.gguf", options).checked
    assert checked is not None
    # A text that begins with a space gets no second one from the scheme "first", and from llama.cpp it does.
    assert all(text.startswith(" ") for text in checked.other_tokens)
    assert bool(checked.other_tokens) == (kind == "first")
    keys = fields(tmp_path / "m.gguf")
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_space_prefix"]) == (True, prefix)
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    kinds = keys["tokenizer.ggml.token_type"]
    assert (kinds[:4], kinds[-1]) == ([2, 3, 3, 6], 5)


def test_tokens_have_types_and_stop_tokens_ids() -> None:
    tokenizer = byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens(["<own>"])
    tokenizer.chat_template = "{{ messages }}"
    found = vocabulary(tokenizer, 405, stops=(0, 7))
    assert (found.tokens[0], found.tokens[400], found.tokens[404]) == ("<end>", "<own>", "[unused404]")
    assert (found.types[0], found.types[1], found.types[400], found.types[404]) == (3, 1, 4, 5)
    assert found.special == {"eos": 0, "eot": 7}
    assert (found.add_bos, found.add_eos, found.chat_template) == (False, False, "{{ messages }}")
    assert found.notes == ()


def test_what_a_file_cannot_describe_is_noted() -> None:
    tokenizer = byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<own>", rstrip=True)])
    notes = vocabulary(tokenizer, 410).notes
    assert notes == ("text is not normalised to NFC", "space beside <own> is not stripped")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: byte_level_tokenizer(split_by("own")),
            r"the pre-tokenizer is not recognised: it splits by 'own'\. Name llama\.cpp's with --pre NAME",
        ),
        (
            lambda: byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "it splits by 'a space put before the text'",
        ),
        (
            lambda: byte_level_tokenizer(pre_tokenizers.Whitespace()),
            "neither byte-level BPE nor SentencePiece BPE",
        ),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
            "a tokenizer of the kind WordLevel cannot be written",
        ),
        (
            lambda: PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>"))
            ),
            "whose tokens carry a prefix or suffix within words",
        ),
    ],
)
def test_other_tokenizers_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        vocabulary(make(), 400)


def test_pre_names_the_pre_tokenizer() -> None:
    assert vocabulary(byte_level_tokenizer(split_by("own")), 400, pre="qwen2").pre == "qwen2"


def test_a_lowercasing_tokenizer_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["normalizer"] = {"type": "Lowercase"}
    lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ExportError, match=r"it normalises text \(Lowercase\), splits by 'bytes'"):
        vocabulary(lower, 300)


def test_unusual_tokens_around_a_text_are_refused() -> None:
    tokenizer = piece_tokenizer("plain")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(ExportError, match=r"makes \[2, 1, \d+\] of 'a': other tokens around a text"):
        vocabulary(tokenizer, 600)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused() -> None:
    with pytest.raises(ExportError, match="tokens up to 299, and the model's embedding 200 rows; they do not belong"):
        vocabulary(tiny_tokenizer(), 200)


def test_a_tokenizer_without_a_json_is_refused() -> None:
    class Slow:
        pass

    with pytest.raises(ExportError, match=r"the tokenizer Slow has no tokenizer\.json"):
        vocabulary(Slow(), 10)  # type: ignore[arg-type]
