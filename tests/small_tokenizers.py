"""Small tokenizers of every kind that `tokenizer.json` knows, trained on made-up words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = "etaoinsrhldcumfpgwybvkxjqz"


def words(seed: int) -> list[str]:
    """Lines of words that repeat, some of them in other scripts, with digits and punctuation."""
    rng = random.Random(seed)

    def word() -> str:
        script = rng.choice([LETTERS] * 8 + ["абвгдежзик", "αβγδεζηθ", "日本語漢字仮名"])
        return "".join(rng.choice(script[: rng.randrange(3, len(script) + 1)]) for _ in range(rng.randrange(1, 9)))

    known = [word() for _ in range(200)]
    return [
        " ".join(rng.choice(known) + rng.choice(["", "", "", ",", ".", "'s", "7"]) for _ in range(20))
        for _ in range(60)
    ]


def byte_level(seed: int, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Of bytes, as GPT-2 has it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        words(seed), trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return _fast(tokenizer)


def whole_words_first(seed: int) -> PreTrainedTokenizerFast:
    """Of bytes, where a word in the vocabulary needs no merge."""
    return byte_level(seed, ignore_merges=True)


def metaspace(seed: int, *, every_merge: bool = False) -> PreTrainedTokenizerFast:
    """Of characters, with bytes for those that are unknown, as SentencePiece's BPE has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    lines = [line.replace(" ", "▁") for line in words(seed)]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES]))
    return _fast(tokenizer, _with_every_merge if every_merge else _bytes_as_tokens)


def every_merge(seed: int) -> PreTrainedTokenizerFast:
    """The same with a merge for every way to split a token, as converted tokenizers have them."""
    return metaspace(seed, every_merge=True)


def ends_of_words(seed: int) -> PreTrainedTokenizerFast:
    """Of characters without bytes, those at the end of a word apart, as CLIP has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    tokenizer.train_from_iterator(
        words(seed), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    )
    return _fast(tokenizer)


def unigram(seed: int, *, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """Unigram, as T5 has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(words(seed), trainer)
    return _fast(tokenizer, _with_bytes if byte_fallback else lambda data: data)


def unigram_with_bytes(seed: int) -> PreTrainedTokenizerFast:
    """Unigram with bytes for unknown characters, as Llama-like Unigram models have it."""
    return unigram(seed, byte_fallback=True)


def wordpiece(seed: int) -> PreTrainedTokenizerFast:
    """WordPiece, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(words(seed), trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return _fast(tokenizer)


TOKENIZERS: Mapping[str, Callable[[int], PreTrainedTokenizerFast]] = {
    make.__name__: make
    for make in (
        *(byte_level, whole_words_first, metaspace, every_merge, ends_of_words),
        *(unigram, unigram_with_bytes, wordpiece),
    )
}


def _fast(
    tokenizer: Tokenizer, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: data
) -> PreTrainedTokenizerFast:
    changed = Tokenizer.from_str(json.dumps(change(json.loads(tokenizer.to_str()))))
    return PreTrainedTokenizerFast(
        tokenizer_object=changed,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _bytes_as_tokens(data: dict[str, Any]) -> dict[str, Any]:
    """Bytes are ordinary tokens, which no text names."""
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] in SPECIAL]
    return data


def _with_every_merge(data: dict[str, Any]) -> dict[str, Any]:
    data = _bytes_as_tokens(data)
    vocabulary = data["model"]["vocab"]
    ranked = sorted(vocabulary.items(), key=lambda pair: pair[1])
    data["model"]["merges"] = [
        [token[:place], token[place:]]
        for token, _ in ranked
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary and token not in (*SPECIAL, *BYTES)
    ]
    return data


def _with_bytes(data: dict[str, Any]) -> dict[str, Any]:
    data["model"]["byte_fallback"] = True
    data["model"]["vocab"] += [[name, 0.0] for name in BYTES]
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Metaspace", **_METASPACE}]}
    return {**data, "decoder": decoder}


_METASPACE = {"replacement": "▁", "prepend_scheme": "always", "split": True}
