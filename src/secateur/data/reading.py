"""Sources -> rows of tokens, cut to a length; of every token it is known whether it is to be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from secateur.data.options import DataOptions, split_weight
from secateur.data.rows import Rows, packed, starts_of
from secateur.data.words import Sample, samples_of
from secateur.errors import DataError

CUT_OFF = "cut off before the answer"
UNANSWERED = "without an answer"
MOST_VALIDATION = 256  # rows: more would cost more than they tell
AT_ONCE = 1000  # texts that are tokenised in one call


@dataclass(frozen=True, slots=True, eq=False)
class TuningData:
    """What was read: rows to train on, rows that judge the training, and what was left out and why."""

    train: Rows
    validation: Rows
    weights: tuple[float, ...] | None  # of the sources; None: every row counts the same
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows by reason


def read_tuning_data(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> TuningData:
    r"""Read, put into words, tokenise and cut everything that the options name.

    Plain text is cut into rows of `length` tokens; an end-of-text token follows every document and every answer that
    is not cut off. Raises `DataError` for a source that cannot be read or has no field to train on, a chat that the
    template does not take, and when there are no rows, or nothing is left of any.

    >>> import tempfile
    >>> from pathlib import Path
    >>> def letters(texts, **_):
    ...     offsets = [[(i, i + 1) for i in range(len(text))] for text in texts]
    ...     return {"input_ids": [list(text.encode()) for text in texts], "offset_mapping": offsets}
    >>> letters.is_fast, letters.eos_token_id = True, None
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "rows.jsonl"
    ...     _ = file.write_text('{"prompt": "2+2=", "output": "four"}\n' * 2, encoding="utf-8")
    ...     rows = read_tuning_data(letters, DataOptions((str(file),), validation=0.5)).train
    >>> bytes(rows.ids_T[rows.learned_T].tolist())
    b'four'
    """
    named = [split_weight(source) for source in options.sources]
    kept: list[tuple[list[int], list[bool], int]] = []  # tokens, whether each is learned, source
    dropped: dict[str, int] = {}
    for number, (name, _) in enumerate(named):
        rows, left_out = _read_source(name, tokenizer, options)
        kept += [(ids, learned, number) for ids, learned in rows]
        dropped = {why: dropped.get(why, 0) + left_out.get(why, 0) for why in dropped | left_out}
    whole = Rows(
        torch.tensor([token for ids, _, _ in kept for token in ids], dtype=torch.int32),
        torch.tensor([flag for _, learned, _ in kept for flag in learned], dtype=torch.bool),
        starts_of([len(ids) for ids, _, _ in kept]),
        torch.tensor([number for _, _, number in kept], dtype=torch.int32),
    )
    train, validation = _split(whole, options)
    if options.packing:
        train, validation = packed(train, options.max_length), packed(validation, options.max_length)
    weights = None
    if any(weight is not None for _, weight in named):
        weights = tuple(1.0 if weight is None else weight for _, weight in named)
    return TuningData(train, validation, weights, dropped)


def _read_source(
    name: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> tuple[list[tuple[list[int], list[bool]]], dict[str, int]]:
    """The rows of one source from which something can be learned, and how many others there were, by reason."""
    kept: list[tuple[list[int], list[bool]]] = []
    dropped: dict[str, int] = {}
    seen = 0
    for batch in _batches(samples_of(name, tokenizer, options)):
        seen += len(batch)
        for sample, ids, learned in zip(batch, *_tokenised(batch, tokenizer, options), strict=True):
            answered = any(learned[1:])
            for first in range(0, len(ids) if sample.document else 1, options.max_length):
                piece = slice(first, first + options.max_length)
                some = [False, *learned[piece][1:]]  # nothing comes before the first token, to predict it by
                if any(some):
                    kept.append((ids[piece], some))
                elif not sample.document:
                    why = CUT_OFF if answered else UNANSWERED
                    dropped[why] = dropped.get(why, 0) + 1
        if options.samples is not None and len(kept) >= options.samples and batch[0].document:
            kept = kept[: options.samples]  # of plain text, rows are counted
            break
    if not seen:
        raise DataError(f"{name!r}: there are no rows in it. Expected at least one to train on.")
    if not kept:
        cut = dropped.get(CUT_OFF, 0)
        remedy = (
            f"{cut} are cut off before the answer begins; allow longer rows: --max-length {options.max_length * 2}"
            if cut
            else "none has an answer of a token or more: learn the prompts, too, --loss-on all"
        )
        raise DataError(f"{name!r}: nothing is left of its {seen} rows to learn from; {remedy}.")
    return kept, dropped


def _batches(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenised(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> tuple[list[list[int]], list[list[bool]]]:
    """Tokens of every sample, and which are to be learned; of a whole text, not cut yet."""
    ids: list[list[int]] = [[] for _ in samples]
    learned: list[list[bool]] = [[] for _ in samples]
    for special in (True, False):
        some = [i for i, sample in enumerate(samples) if sample.special is special]
        if not some:
            continue
        # verbose=False: what is longer than the model reads at once is cut here
        encoded: Any = tokenizer(
            [samples[i].text for i in some],
            add_special_tokens=special,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        for place, i in enumerate(some):
            ids[i] = list(encoded["input_ids"][place])
            if options.loss_on == "all":
                learned[i] = [True] * len(ids[i])
            elif tokenizer.is_fast:
                learned[i] = _within(encoded["offset_mapping"][place], samples[i].spans)
            else:
                learned[i] = _counted(samples[i], len(ids[i]), tokenizer)
            if special and tokenizer.eos_token_id is not None and ids[i][-1:] != [tokenizer.eos_token_id]:
                ids[i].append(tokenizer.eos_token_id)
                learned[i].append(options.loss_on == "all" or bool(samples[i].spans))
    return ids, learned


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens end within a span; one that begins before it and ends in it counts: it holds some of the answer."""
    return [any(first < end <= last for first, last in spans) and end > start for start, end in offsets]


def _counted(sample: Sample, count: int, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """The same where a tokenizer does not say which characters a token is of: by the number of tokens before them."""

    def tokens(end: int) -> int:
        encoded: Any = tokenizer(sample.text[:end], add_special_tokens=sample.special, verbose=False)
        return len(encoded["input_ids"])

    learned = [False] * count
    for first, last in sample.spans:
        begin, end = tokens(first), count if last == len(sample.text) else tokens(last)
        learned[begin:end] = [True] * (end - begin)
    return learned


def _split(rows: Rows, options: DataOptions) -> tuple[Rows, Rows]:
    """Rows to train on, and rows left out; one at least to train on."""
    count = 0
    if options.validation > 0:
        count = min(max(1, round(options.validation * len(rows))), MOST_VALIDATION, len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed))
    return rows.select(order[count:].sort().values), rows.select(order[:count].sort().values)
