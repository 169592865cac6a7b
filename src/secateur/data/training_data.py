"""Sources -> rows of tokens of at most `max_length`, and for every token whether it counts in the loss."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import SELF
from secateur.data.options import DataOptions, split_weight
from secateur.data.rows import Rows, pack_rows, row_starts
from secateur.data.templates import Example, in_forms, read_examples
from secateur.data.windows import start_tokens
from secateur.errors import DataError

TRUNCATED = "cut off before the answer"
UNANSWERED = "without an answer"
MOST_VALIDATION = 16  # rows: more would cost more time than they tell
TOKENIZER_BATCH = 1000  # texts per call of the tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Rows to train on, rows for validation, and how many rows were dropped and why."""

    train: Rows
    validation: Rows
    weights: tuple[float, ...] | None  # of the sources; None: every row counts the same
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows by reason

    @property
    def tokens_per_row(self) -> float:
        """The mean length of the rows that are read, where each source has its share of them."""
        rows = self.train
        if self.weights is None:
            return float(rows.lengths_R.float().mean())
        means = [float(rows.lengths_R[rows.sources_R == n].float().mean()) for n in range(len(self.weights))]
        return sum(mean * weight for mean, weight in zip(means, self.weights, strict=True)) / sum(self.weights)


def read_training_data(
    tokenizer: PreTrainedTokenizerBase, options: DataOptions, written_RT: Tensor | None = None
) -> TrainingData:
    r"""Read the sources, apply the prompt template, tokenize, and truncate.

    `written_RT` (int64, rows x tokens) are the rows of the source `self`. Plain text is split into rows of `max_length`
    tokens. An end-of-text token follows every document and every answer that is not truncated. Raises `DataError` for a
    source that cannot be read or has no field to train on, for a chat that the template does not take, and where no
    rows are left of a source.

    >>> import tempfile
    >>> from pathlib import Path
    >>> def letters(texts, **_):
    ...     offsets = [[(i, i + 1) for i in range(len(text))] for text in texts]
    ...     return {"input_ids": [list(text.encode()) for text in texts], "offset_mapping": offsets}
    >>> letters.is_fast, letters.eos_token_id = True, None
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "rows.jsonl"
    ...     _ = file.write_text('{"prompt": "2+2=", "output": "four"}\n' * 2, encoding="utf-8")
    ...     rows = read_training_data(letters, DataOptions((str(file),), loss_on="answers", validation=0.5)).train
    >>> bytes(rows.ids_T[rows.loss_mask_T].tolist())
    b'four'
    """
    dropped: Counter[str] = Counter()
    by_source = [
        _written(written_RT, start_tokens(tokenizer).tolist())
        if name == SELF and written_RT is not None
        else _read_source(name, tokenizer, options, dropped)
        for name in options.source_names
    ]
    parts = [part for source in by_source for part in source]
    rows = Rows(
        torch.tensor([token for ids, _ in parts for token in ids], dtype=torch.int32),
        torch.tensor([counts for _, loss_mask in parts for counts in loss_mask], dtype=torch.bool),
        row_starts([len(ids) for ids, _ in parts]),
        torch.tensor([number for number, source in enumerate(by_source) for _ in source], dtype=torch.int32),
    )
    train, validation = _split(rows, options)
    if options.packing:
        train, validation = (pack_rows(part, options.max_length) for part in (train, validation))
    weights = [split_weight(source)[1] for source in options.sources]
    equal = all(weight is None for weight in weights)
    return TrainingData(
        train, validation, None if equal else tuple(1.0 if w is None else w for w in weights), dict(dropped)
    )


def _written(written_RT: Tensor, start: list[int]) -> list[tuple[list[int], list[bool]]]:
    """Rows that the dense model wrote, which count whole, behind the tokens that a text begins with."""
    rows, before = written_RT.shape[1], max(1, len(start))
    return [((start + ids)[:rows], [False] * before + [True] * (rows - before)) for ids in written_RT.tolist()]


def _read_source(
    name: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions, dropped: Counter[str]
) -> list[tuple[list[int], list[bool]]]:
    """Return the rows of one source that have something to learn; counts the others in `dropped`, by reason."""
    rows: list[tuple[list[int], list[bool]]] = []
    before, examples = dropped[TRUNCATED], 0
    start = start_tokens(tokenizer).tolist()
    for batch in _batches(in_forms(read_examples(name, tokenizer, options), options.varied)):
        examples += len(batch)
        for example, ids, loss_mask in zip(batch, *_tokenize(batch, tokenizer, options), strict=True):
            has_answer = any(loss_mask[1:])
            parts = _parts(ids, loss_mask, options.max_length, start) if example.is_document else [(ids, loss_mask)]
            for part, mask in parts:
                part_mask = [False, *mask[1 : options.max_length]]  # nothing stands before the first token
                if any(part_mask):
                    rows.append((part[: options.max_length], part_mask))
                elif not example.is_document:
                    dropped[TRUNCATED if has_answer else UNANSWERED] += 1
        if options.samples is not None and len(rows) >= options.samples and batch[0].is_document:
            rows = rows[: options.samples]  # of plain text, rows are counted
            break
    if not examples:
        raise DataError(f"{name!r}: there are no rows in it. Expected at least one to train on.")
    if not rows:
        truncated = dropped[TRUNCATED] - before
        remedy = (
            f"{truncated} are cut off before the answer begins; allow longer rows: --max-length "
            f"{options.max_length * 2}"
            if truncated
            else "none has an answer of a token or more: learn the prompts, too, --loss-on all"
        )
        raise DataError(f"{name!r}: nothing is left of its {examples} rows to learn from; {remedy}.")
    return rows


def _parts(
    ids: list[int], loss_mask: list[bool], length: int, start: list[int]
) -> Iterator[tuple[list[int], list[bool]]]:
    """A document in parts of at most `length` tokens, each behind the tokens that a text begins with."""
    first = len(start) if ids[: len(start)] == start else 0
    room = max(1, length - len(start))
    for begin in range(first, len(ids), room):
        yield start + ids[begin : begin + room], [False] * len(start) + loss_mask[begin : begin + room]


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while batch := list(itertools.islice(examples, TOKENIZER_BATCH)):
        yield batch


def _tokenize(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> tuple[list[list[int]], list[list[bool]]]:
    """Return the tokens of every example and their loss mask, not truncated yet."""
    ids: list[list[int]] = [[] for _ in examples]
    loss_mask: list[list[bool]] = [[] for _ in examples]
    for special in (True, False):
        chosen = [i for i, example in enumerate(examples) if example.add_special_tokens is special]
        if not chosen:
            continue
        # verbose=False: texts longer than the model's positions are truncated here
        encoded: Any = tokenizer(
            [examples[i].text for i in chosen],
            add_special_tokens=special,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        for place, i in enumerate(chosen):
            ids[i] = list(encoded["input_ids"][place])
            if options.loss_on == "all":
                loss_mask[i] = [True] * len(ids[i])
            elif tokenizer.is_fast:
                loss_mask[i] = _mask_by_offsets(encoded["offset_mapping"][place], examples[i].answer_spans)
            else:
                loss_mask[i] = _mask_by_counting(examples[i], len(ids[i]), tokenizer)
            ends = special and tokenizer.eos_token_id is not None and not examples[i].is_part
            if ends and ids[i][-1:] != [tokenizer.eos_token_id]:
                ids[i].append(tokenizer.eos_token_id)
                loss_mask[i].append(options.loss_on == "all" or bool(examples[i].answer_spans))
    return ids, loss_mask


def _mask_by_offsets(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Mask tokens that end within a span, so one that begins before the answer and ends in it counts."""
    return [any(first < end <= last for first, last in spans) and end > start for start, end in offsets]


def _mask_by_counting(example: Example, count: int, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Return the same mask for a tokenizer without offsets: by the number of tokens before each span."""

    def tokens_before(end: int) -> int:
        encoded: Any = tokenizer(example.text[:end], add_special_tokens=example.add_special_tokens, verbose=False)
        return len(encoded["input_ids"])

    loss_mask = [False] * count
    for first, last in example.answer_spans:
        begin, end = tokens_before(first), count if last == len(example.text) else tokens_before(last)
        loss_mask[begin:end] = [True] * (end - begin)
    return loss_mask


def _split(rows: Rows, options: DataOptions) -> tuple[Rows, Rows]:
    """Split into rows to train on, at least one, and rows for validation."""
    count = 0
    if options.validation > 0:
        count = min(max(1, round(options.validation * len(rows))), MOST_VALIDATION, len(rows) - 1)
    order_R = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed))
    left, held = Counter(rows.sources_R.tolist()), list[int]()
    for row in order_R.tolist():
        if len(held) == count:
            break
        if left[source := int(rows.sources_R[row])] > 1:  # each source keeps a row to train on
            left[source] -= 1
            held.append(row)
    validates_R = torch.zeros(len(rows), dtype=torch.bool)
    validates_R[held] = True
    return rows.select(torch.nonzero(~validates_R).flatten()), rows.select(torch.nonzero(validates_R).flatten())
