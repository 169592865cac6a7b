"""Tokenizer and the ids that stay -> the tokenizer without the others, its ids numbered anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.vocabulary.pieces import tokenizer_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CARRIED = (  # what is put around a text says the post-processor
    *("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces"),
    "split_special_tokens",
)


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, keep: Sequence[int]) -> PreTrainedTokenizerFast:
    """A tokenizer of the tokens whose ids are in `keep` (ascending); token `keep[i]` gets the id i.

    What `pieces_of` calls needed has to stay, for BPE also the parts of every token that does. Raises `PlanError` for a
    tokenizer that is no fast one.

    >>> from tokenizers import models
    >>> bpe = models.BPE({"a": 0, "b": 1, "ab": 2, "aba": 3}, [("a", "b"), ("ab", "a")])
    >>> whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    >>> whole("abaab").input_ids, cut_tokenizer(whole, [0, 1, 2])("abaab").input_ids
    ([3, 2], [2, 0, 2])
    """
    data = cut_tokenizer_json(tokenizer_json(tokenizer), keep)
    options: dict[str, Any] = {name: str(token) for name in SPECIAL if (token := getattr(tokenizer, name, None))}
    options |= {name: value for name in CARRIED if (value := getattr(tokenizer, name, None)) is not None}
    if extra := getattr(tokenizer, "extra_special_tokens", None):
        options["extra_special_tokens"] = extra
    smaller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **options)
    smaller.chat_template = tokenizer.chat_template
    smaller.name_or_path = tokenizer.name_or_path
    return smaller


def cut_tokenizer_json(data: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """The content of a `tokenizer.json` without the other tokens."""
    new = {before: after for after, before in enumerate(keep)}
    model = dict(data["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[number] for token, number in model["vocab"].items() if number in new}
    if "merges" in model:
        prefix, vocabulary = model.get("continuing_subword_prefix") or "", model["vocab"]
        model["merges"] = [merge for merge in model["merges"] if _stays(merge, prefix, vocabulary)]
    added = [{**entry, "id": new[entry["id"]]} for entry in data["added_tokens"] if entry["id"] in new]
    return {
        **data,
        "model": model,
        "added_tokens": added,
        "truncation": None,
        "padding": None,
        "post_processor": _renumbered(data.get("post_processor"), new),
    }


def _stays(merge: Any, prefix: str, vocabulary: Mapping[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocabulary and right in vocabulary and left + right.removeprefix(prefix) in vocabulary


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with the ids of its tokens changed: `ids` of templates, and pairs of a token and its id."""
    if isinstance(processor, dict):
        return {
            key: [new[number] for number in value] if key == "ids" else _renumbered(value, new)
            for key, value in processor.items()
        }
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and isinstance(processor[1], int):
            return [processor[0], new[processor[1]]]
        return [_renumbered(item, new) for item in processor]
    return processor
