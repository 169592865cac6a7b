"""Text -> calibration windows: int64 token ids, samples x length."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from secateur.data.calibration import COLUMN, DEMO, CalibrationOptions
from secateur.data.documents import holds_documents, read_documents
from secateur.data.forms import FORMS
from secateur.data.pairs import shown_windows
from secateur.data.text import MAX_CHARACTERS, read_calibration
from secateur.errors import DataError
from secateur.models.media import shows

PRICE_WINDOWS, PRICE_TOKENS = 4, 64  # on which prices are measured
OTHER_SEED = 1_000_003  # between the seeds of two forms: the same number draws other places
Documents = list[NDArray[np.int32]]  # of one source, the token ids of each


class CalibrationTokens:
    """The texts of a calibration as token ids, of every form that is asked for: made once, for windows of all kinds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._found: dict[str | None, list[Documents]] = {}

    def of(self, form: str | None) -> list[Documents]:
        """The documents of each source, as they are or in one of `FORMS`."""
        if form not in self._found:
            change = FORMS[form] if form is not None else str
            self._found[form] = [_tokenize([*map(change, text)], self.tokenizer) for text in self._texts]
        return self._found[form]

    @functools.cached_property
    def _texts(self) -> list[list[str]]:
        return calibration_texts(self.tokenizer, self.options)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    options: CalibrationOptions,
    *,
    tokens: CalibrationTokens | None = None,
) -> Tensor:
    """Read the texts that the options name and take windows of them; returns int64 ids, samples x length.

    With a processor, the windows show images or sound (`pairs`), and what follows is of texts alone.

    The sources take turns by their weights. First come the windows that are as the texts have them, then those of each
    of `FORMS`, then those whose tokens are in random order. `tokens` are those of the texts, where they are known.

    In one text every place is equally likely. Of documents, first a document that is long enough is drawn and then a
    place in it, and no document is drawn again before all were, as LLM-Pruner does (`get_c4`, `get_bookcorpus`). No
    window is drawn twice, and only the first `MAX_CHARACTERS` of a text are looked at. Raises `DataError` as
    `read_calibration` does, and where the text has fewer places than windows.
    """
    if isinstance(tokenizer, ProcessorMixin):
        return shown_windows(tokenizer, options, skipped=0, count=options.samples)
    counts = options.counts(options.samples)
    return _windows(tokens or CalibrationTokens(tokenizer, options), options, [0] * len(counts), counts)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The int64 ids that the tokenizer puts before a text, such as BOS.

    Those behind a text do not count, unless they end with BOS: then they stand before the text that the model writes.

    >>> start_tokens(lambda text, **_: {"input_ids": [2, *map(ord, text)]})
    tensor([2])
    """
    alone, whole = (torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in ("", "a"))
    before = torch.equal(alone, whole[: len(alone)])
    begins = len(alone) > 0 and int(alone[-1]) == getattr(tokenizer, "bos_token_id", None)
    return alone if before or begins else alone[:0]


def behind(start: Tensor, windows: Tensor) -> Tensor:
    """Windows (int64, samples x length) behind these tokens, which take the place of as many at their end.

    >>> behind(torch.tensor([9]), torch.tensor([[1, 2, 3]])).tolist()
    [[9, 1, 2]]
    """
    return torch.cat([start.expand(len(windows), -1), windows], dim=1)[:, : windows.shape[1]]


def held_out_windows(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    options: CalibrationOptions,
    *,
    start: Tensor | None = None,
    tokens: CalibrationTokens | None = None,
) -> Tensor:
    """`options.held_out` more windows, in the same forms, each behind the start tokens: as the model is served.

    They share no token with the others of their form. `start` takes the place of the tokenizer's start tokens, `tokens`
    are those of the texts. Raises `DataError` where the texts have no other places, and as `calibration_windows` does.
    """
    if isinstance(tokenizer, ProcessorMixin):
        return shown_windows(tokenizer, options, skipped=options.samples, count=options.held_out)
    skipped, counts = options.counts(options.samples), options.counts(options.held_out)
    start = start_tokens(tokenizer) if start is None else start
    return behind(start, _windows(tokens or CalibrationTokens(tokenizer, options), options, skipped, counts))


def _windows(
    tokens: CalibrationTokens, options: CalibrationOptions, skipped: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """So many windows as written, of each form and in random order, after those that are skipped."""
    unordered, before = counts[-1], skipped[0] + skipped[-1]
    windows = _in_turns(tokens.of(None), replace(options, samples=before + counts[0] + unordered), before)
    parts = [windows[: counts[0]]]
    for number, (form, count) in enumerate(zip(FORMS, counts[1:-1], strict=True), start=1):
        if count:
            seed, before = options.seed + number * OTHER_SEED, skipped[number]
            parts.append(_in_turns(tokens.of(form), replace(options, samples=before + count, seed=seed), before))
    return torch.cat([*parts, shuffled(windows[counts[0] :], options.seed)])


def scored(windows: Tensor, options: CalibrationOptions) -> Tensor:
    """The windows that scores look at; the last of them are half a window of shuffled tokens, repeated."""
    windows = options.as_written(windows)[: options.score_samples]
    as_written = len(windows) - int(len(windows) * (options.copied or 0))
    half = shuffled(windows[as_written:], options.seed)[:, : windows.shape[1] // 2]
    return torch.cat([windows[:as_written], half.repeat(1, 3)[:, : windows.shape[1]]])


def unscored(windows: Tensor, options: CalibrationOptions) -> Tensor:
    """The first 64 tokens of four windows that scores have not looked at, or else of the last that they have.

    Windows that show images stay whole.

    >>> windows, varied = torch.arange(24).view(24, 1), {"varied": 0.25}
    >>> [unscored(windows, CalibrationOptions(score_samples=n, **varied)).flatten().tolist() for n in (3, 18)]
    [[3, 4, 5, 6], [14, 15, 16, 17]]
    """
    windows = options.as_written(windows)
    after = windows[len(windows) if options.score_samples is None else options.score_samples :]
    few = after[:PRICE_WINDOWS] if len(after) else windows[-PRICE_WINDOWS:]
    return few if shows(few) else few[:, :PRICE_TOKENS]


def shuffled(windows: Tensor, seed: int) -> Tensor:
    """The tokens of all windows (int64, samples x length) together, in random order.

    >>> shuffled(torch.arange(6).view(2, 3), seed=0).flatten().sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    order = torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(seed))
    return windows.flatten()[order].view_as(windows)


def calibration_texts(
    tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions, *, characters: int = MAX_CHARACTERS
) -> list[list[str]]:
    """The texts; of several, a column is for those that have it. Of documents, so many characters are read."""
    chat, names, column = tokenizer if options.chat else None, options.names, options.column
    having = [name for name in names if len(names) > 1 and _has(name, column)] or names
    columns = [column if name in having else COLUMN for name in names]
    return [
        read_calibration(name, column=column, chat=chat, characters=characters)
        for name, column in zip(names, columns, strict=True)
    ]


def _has(name: str, column: str) -> bool:
    return (
        name != DEMO
        and holds_documents(name)
        and any(column in row for _, row in itertools.islice(read_documents(name), 1))
    )


def _in_turns(sources: Sequence[Documents], options: CalibrationOptions, before: int) -> Tensor:
    """Windows of each source by its weight, as evenly as can be: more samples begin with the same ones.

    Those after the first `before`, of which they hold no token.
    """
    weights = [weight for _, weight in options.sources]
    owed, turns = [0.0] * len(weights), list[int]()
    for _ in range(options.samples):
        owed = [due + weight / sum(weights) for due, weight in zip(owed, weights, strict=True)]
        turns.append(owed.index(max(owed)))
        owed[turns[-1]] -= 1
    windows = torch.empty(options.samples, options.length, dtype=torch.int64)
    for number, documents in enumerate(sources):
        places = [place for place, turn in enumerate(turns) if turn == number]
        if places:
            earlier = sum(place < before for place in places)
            windows[places] = _drawn(documents, replace(options, samples=len(places)), earlier)
    return windows[before:]


def _drawn(documents: Documents, options: CalibrationOptions, earlier: int = 0) -> Tensor:
    usable = [ids for ids in documents if len(ids) >= options.length]
    if not usable:
        longest = max(map(len, documents), default=0)
        what = "the calibration text has" if len(documents) == 1 else "the longest calibration document has"
        raise DataError(
            f"{what} {longest} tokens, but one window needs {options.length}. Expected a longer text, or a shorter "
            f"window: CalibrationOptions(length={max(longest, 2)}, samples=1)."
        )
    places = _drawn_places([len(ids) for ids in usable], options, earlier)
    windows = [usable[document][start : start + options.length] for document, start in places]
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def _drawn_places(sizes: Sequence[int], options: CalibrationOptions, earlier: int) -> list[tuple[int, int]]:
    """Document and start of each window, in the order drawn; `sizes` are the documents' numbers of tokens.

    Windows after the first `earlier` hold none of their tokens.
    """
    left = [size - options.length + 1 for size in sizes]  # places of each document that can still be drawn
    if sum(left) < options.samples:
        raise DataError(
            f"tiny calibration text: {sum(sizes)} tokens hold {sum(left)} different windows of {options.length}, "
            f"but {options.samples} samples need as many. Expected a longer text, or fewer: "
            f"CalibrationOptions(samples={sum(left)})."
        )
    chooser = random.Random(options.seed)
    drawn: dict[tuple[int, int], None] = {}
    waiting: set[int] = set()  # documents that gave no window in this turn
    taken: dict[int, NDArray[np.bool_]] = {}  # document -> its places whose windows hold a token of the first ones
    while len(drawn) < options.samples:
        if len(drawn) == earlier > 0 and not taken:
            taken = _overlapping(sizes, drawn, options.length)
            left = [int((~taken[number]).sum()) if number in taken else places for number, places in enumerate(left)]
            waiting &= {document for document, places in enumerate(left) if places}
        waiting = waiting or {document for document, places in enumerate(left) if places}
        if not waiting:
            raise DataError(
                f"tiny calibration text: {sum(sizes)} tokens hold {len(drawn)} windows of {options.length}, and "
                f"{options.samples - len(drawn)} more would hold some of the same tokens. Expected a longer text, or "
                "fewer or shorter windows: CalibrationOptions(samples=16, length=64)."
            )
        document = chooser.randrange(len(sizes))
        start = chooser.randrange(sizes[document] - options.length + 1)
        overlaps = document in taken and taken[document][start]
        if document in waiting and not overlaps and (document, start) not in drawn:
            drawn[document, start] = None
            left[document] -= 1
            waiting.remove(document)
    return list(drawn)


def _overlapping(sizes: Sequence[int], drawn: Iterable[tuple[int, int]], length: int) -> dict[int, NDArray[np.bool_]]:
    """Which places of each document that windows were drawn of hold a token of one.

    >>> {number: places.nonzero()[0].tolist() for number, places in _overlapping([9, 9], [(1, 3)], 2).items()}
    {1: [2, 3, 4]}
    """
    taken: dict[int, NDArray[np.bool_]] = {}
    for document, start in drawn:
        places = taken.setdefault(document, np.zeros(sizes[document] - length + 1, dtype=bool))
        places[max(0, start - length + 1) : start + length] = True
    return taken


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


def _tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Up to `MAX_CHARACTERS` of the documents as token ids."""
    documents = _first_characters(documents)
    if not documents:
        return []
    # verbose=False: a text longer than the model's context is what we want here, not a reason to warn.
    encoded: Any = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.array(ids, dtype=np.int32) for ids in encoded.input_ids]
