"""Text -> calibration windows: int64 token ids, samples x length."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import CalibrationOptions
from secateur.data.text import MAX_CHARACTERS, read_calibration
from secateur.errors import DataError


def calibration_windows(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> Tensor:
    """Read the text that the options name and take their windows of it; returns int64 ids, samples x length.

    Raises `DataError` as `read_calibration` and `sample_windows` do.
    """
    text = read_calibration(options.text, column=options.column, chat=tokenizer if options.chat else None)
    return sample_windows(text, tokenizer, options)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The int64 ids that the tokenizer puts before a text, such as BOS; those behind a text do not count.

    >>> start_tokens(lambda text, **_: {"input_ids": [2, *map(ord, text)]})
    tensor([2])
    """
    alone, whole = (torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in ("", "a"))
    return alone if torch.equal(alone, whole[: len(alone)]) else alone[:0]


def held_out_windows(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> Tensor:
    """`options.held_out` more windows of the text, in its order, each behind the start tokens: as the model is served.

    Raises `DataError` where the text has no other places, and as `calibration_windows` does.
    """
    more = replace(options, samples=options.samples + options.held_out, shuffled=0.0)
    windows = calibration_windows(tokenizer, more)[options.samples :]
    return torch.cat([start_tokens(tokenizer).expand(len(windows), -1), windows], dim=1)


def sample_windows(
    text_or_documents: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> Tensor:
    """Take `options.samples` random windows of `options.length` tokens; returns int64 ids, samples x length.

    In one text every place is equally likely. Of documents, first a document that is long enough is drawn and then a
    place in it, and no document is drawn again before all were, as LLM-Pruner does (`get_c4`, `get_bookcorpus`). No
    window is drawn twice, no special tokens are added, and only the first `MAX_CHARACTERS` are looked at. The last
    `options.shuffled` of them are shuffled. Raises `DataError` when the text has fewer places than samples.

    >>> from types import SimpleNamespace
    >>> def letters(texts, **_):
    ...     return SimpleNamespace(input_ids=[[ord(letter) - ord("a") for letter in text] for text in texts])
    >>> sample_windows("abcdef", letters, CalibrationOptions(samples=3, length=4)).tolist()
    [[1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, 3]]
    """
    documents = [text_or_documents] if isinstance(text_or_documents, str) else text_or_documents
    encoded = _tokenize(_first_characters(documents), tokenizer)
    usable = [ids for ids in encoded if len(ids) >= options.length]
    if not usable:
        longest = max((len(ids) for ids in encoded), default=0)
        what = "the calibration text has" if len(documents) == 1 else "the longest calibration document has"
        raise DataError(
            f"{what} {longest} tokens, but one window needs {options.length}. Expected a longer text, or a shorter "
            f"window: CalibrationOptions(length={max(longest, 2)}, samples=1)."
        )
    places = _drawn_places([len(ids) for ids in usable], options)
    windows = [usable[document][start : start + options.length] for document, start in places]
    return shuffle_last(torch.tensor(windows, dtype=torch.int64), options)


def _drawn_places(sizes: Sequence[int], options: CalibrationOptions) -> list[tuple[int, int]]:
    """Document and start of each window, in the order drawn; `sizes` are the documents' numbers of tokens."""
    left = [size - options.length + 1 for size in sizes]  # places of each document that were not drawn
    if sum(left) < options.samples:
        raise DataError(
            f"tiny calibration text: {sum(sizes)} tokens hold {sum(left)} different windows of {options.length}, "
            f"but {options.samples} samples need as many. Expected a longer text, or fewer: "
            f"CalibrationOptions(samples={sum(left)})."
        )
    chooser = random.Random(options.seed)
    drawn: dict[tuple[int, int], None] = {}
    waiting: set[int] = set()  # documents that gave no window in this turn
    while len(drawn) < options.samples:
        waiting = waiting or {document for document, places in enumerate(left) if places}
        document = chooser.randrange(len(sizes))
        start = chooser.randrange(sizes[document] - options.length + 1)
        if document in waiting and (document, start) not in drawn:
            drawn[document, start] = None
            left[document] -= 1
            waiting.remove(document)
    return list(drawn)


def shuffle_last(windows: Tensor, options: CalibrationOptions) -> Tensor:
    """The same windows, the tokens of the last `options.shuffled` of them, together, in random order.

    >>> shuffle_last(torch.arange(6).view(3, 2), CalibrationOptions(shuffled=0.5)).tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    in_order = options.in_order(windows)
    tokens = windows[len(in_order) :].flatten()
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(options.seed))
    return torch.cat([in_order, tokens[order].view(-1, windows.shape[1])])


def digest(tokens: Tensor) -> str:
    """Hash tokens for the record of a run: SHA-256 of the shape and the values as little-endian int64, in hex.

    >>> digest(torch.tensor([[1, 2], [3, 4]]))[:16], digest(torch.tensor([[1, 2, 3, 4]]))[:16]
    ('1ae380e7c104b3c4', 'a8d237faea9beca4')
    """
    shape = torch.tensor(tokens.shape, dtype=torch.int64)
    hashed = hashlib.sha256()
    for part in (shape, tokens):
        hashed.update(part.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return hashed.hexdigest()


def _first_characters(documents: Sequence[str]) -> list[str]:
    """Return the documents up to `MAX_CHARACTERS` in all; the last one may be cut."""
    ends = itertools.accumulate(map(len, documents), initial=0)
    pairs = itertools.takewhile(lambda pair: pair[1] < MAX_CHARACTERS, zip(documents, ends, strict=False))
    return [document[: MAX_CHARACTERS - start] for document, start in pairs]


def _tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not documents:
        return []
    # verbose=False: a text longer than the model's context is what we want here, not a reason to warn.
    encoded: Any = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded.input_ids]
