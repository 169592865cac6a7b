r"""Instructions, chats and text -> rows of tokens to train on, and the order in which the steps take them.

A row of a file or data set is put into words (Alpaca's prompt, or the tokenizer's chat template), tokenised, and cut to
`length`. Of each token it is known whether it is to be learned: those of answers, or all. The order of a whole training
is fixed before it begins, so one that goes on after a stop, or is shared by several processes, reads the same.

Tensor names end in their axes: R row, T token.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.calibration import COLUMN, DEMO, MESSAGES, digest, holds_documents, read_calibration, read_documents
from secateur.errors import DataError

# The prompt of Stanford Alpaca, as LLM-Pruner trains with it. It is data: a comma less is another prompt.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TEMPLATES = ("auto", "alpaca", "chat")
LOSS_ON = ("answers", "all")
# What the fields of instructions are called in Alpaca's, Dolly's and other data sets, the first that is there.
QUESTIONS = ("instruction", "prompt", "question")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
CHATS = (MESSAGES, "conversations")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # others are as they are
ASSISTANT = "assistant"
MOST_VALIDATION = 256  # rows: more would cost more than they tell
GROUPED_STEPS = 16  # whose rows are sorted by length together, where that is asked for
CUT_OFF = "cut off before the answer"
UNANSWERED = "without an answer"
AT_ONCE = 1000  # texts that are tokenised in one call
IGNORED = -100  # of a target: nothing is to be learned there


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What to train on. A source is a file, `demo` or the name of a data set; `FILE@2` gives it the weight 2.

    >>> DataOptions(("alpaca.json",), loss_on="questions")
    Traceback (most recent call last):
    secateur.errors.DataError: loss_on='questions' is unknown. Expected answers or all: DataOptions(loss_on='answers').
    """

    sources: tuple[str, ...]
    template: str = "auto"  # auto: Alpaca's prompt for instructions, the chat template for messages; or one for both
    loss_on: str = "answers"  # or all: the prompts, too
    length: int = 256  # tokens, to which rows are cut
    samples: int | None = None  # of every source the first so many; None: all
    column: str | None = None  # the field of documents that holds text or messages; None: found by its name
    packing: bool = False  # several short rows in one, which do not see each other
    validation: float = 0.02  # the share of the rows that are left out of the training, and judge it
    group_by_length: bool = False  # rows of like length into the same step; within a step they always are
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources or not all(name for name, _ in map(weighted, self.sources)):
            raise DataError(f"sources={self.sources} names no data. Expected files or data sets: ('alpaca.json',).")
        for name, value, known in (("template", self.template, TEMPLATES), ("loss_on", self.loss_on, LOSS_ON)):
            if value not in known:
                expected = f"{', '.join(known[:-1])} or {known[-1]}"
                raise DataError(f"{name}={value!r} is unknown. Expected {expected}: DataOptions({name}={known[0]!r}).")
        for name, number, least, good in (("length", self.length, 2, 256), ("samples", self.samples, 1, 1000)):
            if number is not None and number < least:
                raise DataError(f"{name}={number} is too small. Expected at least {least}: DataOptions({name}={good}).")
        if not 0 <= self.validation < 1:
            raise DataError(
                f"validation={self.validation} is no share of the rows. Expected 0 (none) up to 1: "
                "DataOptions(validation=0.02)."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of tokens, one after the other in one tensor."""

    ids_T: Tensor  # int32
    learned_T: Tensor  # bool: whether the token is to be predicted
    starts: Tensor  # int64, of every row and of the end
    sources: Tensor  # int32, of every row: which source it is from
    positions_T: Tensor | None = None  # int32, of the token in its text; where several texts are in a row

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, int64."""
        return self.starts.diff()

    def slice_of(self, row: int) -> slice:
        """Where the tokens of a row stand."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def select(self, rows: Tensor) -> Rows:
        """Some of the rows, in the order given."""
        places = [torch.arange(*self.starts[[int(row), int(row) + 1]].tolist()) for row in rows]
        at = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        return Rows(
            self.ids_T[at],
            self.learned_T[at],
            _starts(self.lengths[rows].tolist()),
            self.sources[rows],
            None if self.positions_T is None else self.positions_T[at],
        )

    def digest(self) -> str:
        """Hash the tokens, what is learned of them, and where rows begin: SHA-256, in hex."""
        parts = [self.ids_T, self.learned_T, self.starts, *([] if self.positions_T is None else [self.positions_T])]
        return hashlib.sha256("".join(map(digest, parts)).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class TuningData:
    """What was read: rows to train on, rows that judge the training, and what was left out and why."""

    train: Rows
    validation: Rows
    weights: tuple[float, ...] | None  # of the sources; None: every row counts the same
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows by reason


@dataclass(frozen=True, slots=True)
class _Sample:
    """One row in words."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters of answers, from and to
    where: str
    special: bool = True  # whether special tokens are to be added; a chat template has written its own
    document: bool = False  # what does not fit into a row goes into further ones


def weighted(source: str) -> tuple[str, float | None]:
    """The name of a source and its weight, if it has one.

    >>> weighted("alpaca.json@0.5"), weighted("alpaca.json")
    (('alpaca.json', 0.5), ('alpaca.json', None))
    """
    name, at, weight = source.rpartition("@")
    if not at or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight):
        return source, None
    if float(weight) == 0:
        raise DataError(f"{source!r}: the weight 0 leaves nothing of it. Leave it out, or give it a weight: {name}@1")
    return name, float(weight)


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
    named = [weighted(source) for source in options.sources]
    kept: list[tuple[list[int], list[bool], int]] = []  # tokens, whether each is learned, source
    dropped: dict[str, int] = {}
    for number, (name, _) in enumerate(named):
        rows, left_out = _read_source(name, tokenizer, options)
        kept += [(ids, learned, number) for ids, learned in rows]
        dropped = {why: dropped.get(why, 0) + left_out.get(why, 0) for why in dropped | left_out}
    whole = Rows(
        torch.tensor([token for ids, _, _ in kept for token in ids], dtype=torch.int32),
        torch.tensor([flag for _, learned, _ in kept for flag in learned], dtype=torch.bool),
        _starts([len(ids) for ids, _, _ in kept]),
        torch.tensor([number for _, _, number in kept], dtype=torch.int32),
    )
    train, validation = _split(whole, options)
    if options.packing:
        train, validation = packed(train, options.length), packed(validation, options.length)
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
    for batch in _batches(_samples(name, tokenizer, options)):
        seen += len(batch)
        for sample, ids, learned in zip(batch, *_tokenised(batch, tokenizer, options), strict=True):
            answered = any(learned[1:])
            for first in range(0, len(ids) if sample.document else 1, options.length):
                piece = slice(first, first + options.length)
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
            f"{cut} are cut off before the answer begins: give more tokens to a row, --length {options.length * 2}"
            if cut
            else "none has an answer of a token or more: learn the prompts, too, --loss-on all"
        )
        raise DataError(f"{name!r}: nothing is left of its {seen} rows to learn from; {remedy}.")
    return kept, dropped


def packed(rows: Rows, length: int) -> Rows:
    """Put several rows of the same source into one of at most `length` tokens; each keeps positions of its own.

    The longest go first, each into the fullest row that has room for it.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> fewer = packed(rows, 7)
    >>> fewer.ids_T.tolist(), fewer.lengths.tolist(), fewer.positions_T.tolist()
    ([2, 3, 4, 5, 6, 0, 1, 7, 8], [7, 2], [0, 1, 2, 3, 4, 0, 1, 0, 1])
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # source, tokens left, number of the bin; sorted
    lengths = rows.lengths.tolist()
    for row in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        source, need = int(rows.sources[row]), lengths[row]
        at = bisect.bisect_left(room, (source, need, -1))
        if at < len(room) and room[at][0] == source:
            _, left, number = room.pop(at)
        else:
            left, number = length, len(bins)
            bins.append([])
        bins[number].append(row)
        bisect.insort(room, (source, left - need, number))
    flat = rows.select(torch.tensor([row for each in bins for row in each], dtype=torch.int64))
    positions = torch.cat([torch.arange(n) for n in flat.lengths.tolist()]) if len(flat) else torch.zeros(0)
    return Rows(
        flat.ids_T,
        flat.learned_T,
        _starts([sum(lengths[row] for row in each) for each in bins]),
        torch.tensor([int(rows.sources[each[0]]) for each in bins], dtype=torch.int32),
        positions.to(torch.int32),
    )


def whole_steps(rows: int, epochs: float, batch: int) -> int:
    """How many steps of `batch` rows come nearest to so many epochs; at least one.

    >>> whole_steps(1000, 1, 64)
    16
    """
    return max(1, round(epochs * rows / batch))


def training_order(
    rows: Rows,
    *,
    steps: int,
    batch: int,
    seed: int,
    weights: Sequence[float] | None = None,
    group_by_length: bool = False,
) -> Tensor:
    """The numbers of the rows that every step takes: int64, steps x batch.

    Rows are shuffled anew each time that all have been taken. With weights, each source has that share of all draws.
    Within a step the longest come first, so that a micro-batch holds rows of like length and little padding: the
    gradient of a step is a sum, so this changes nothing of it. `group_by_length` also sorts among the rows of
    `GROUPED_STEPS` steps, which then differ from each other more than a shuffle would make them.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> training_order(rows, steps=2, batch=3, seed=0).sort(dim=1).values.tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = steps * batch
    if weights is None:
        order = _drawn(torch.arange(len(rows)), wanted, generator)
    else:
        shares = torch.tensor(weights, dtype=torch.float64)
        ends = (shares.cumsum(0) / shares.sum() * wanted).round().long()
        counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        order = torch.cat(
            [
                _drawn(torch.nonzero(rows.sources == source).flatten(), int(count), generator)
                for source, count in enumerate(counts)
            ]
        )[torch.randperm(wanted, generator=generator)]
    lengths = rows.lengths
    if group_by_length:
        parts = []
        for part in order.split(GROUPED_STEPS * batch):
            by_length = part[lengths[part].argsort(descending=True, stable=True)].reshape(-1, batch)
            parts.append(by_length[torch.randperm(len(by_length), generator=generator)])
        order = torch.cat(parts).flatten()
    by_step = order.reshape(steps, batch)
    return by_step.gather(1, lengths[by_step].argsort(dim=1, descending=True, stable=True))


def collate(rows: Rows, numbers: Sequence[int], *, pad: int) -> dict[str, Tensor]:
    """A batch of rows, padded on the right to the longest: what a model reads, and the `labels` of its logits.

    A label is the token that the logits at its place are to predict: the next one, or `IGNORED`. Packed rows have
    `position_ids` and no mask, from which transformers sees that several texts are in a row.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 2 == 1, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> batch = collate(rows, [2, 1], pad=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8, 0, 0, 0], [2, 3, 4, 5, 6]], [[-100, -100, -100, -100, -100], [3, -100, 5, -100, -100]])
    """
    places = [rows.slice_of(number) for number in numbers]
    width = max(place.stop - place.start for place in places)
    ids = torch.full((len(places), width), pad, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for i, place in enumerate(places):
        own = rows.ids_T[place].long()
        ids[i, : len(own)] = own
        labels[i, : len(own) - 1] = own[1:].where(rows.learned_T[place][1:], IGNORED)
        mask[i, : len(own)] = 1
        if rows.positions_T is not None:
            positions[i, : len(own)] = rows.positions_T[place]
    return {
        "input_ids": ids,
        "labels": labels,
        **({"attention_mask": mask} if rows.positions_T is None else {"position_ids": positions}),
    }


# --- rows in words ----------------------------------------------------------------------------------------------------


def _samples(name: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Iterator[_Sample]:
    """The rows of a source in words; of a plain text the whole is one."""
    if name == DEMO or not holds_documents(name):
        if options.column is not None:
            raise DataError(
                f"{name!r}: column={options.column!r} names a field of rows, and this is one text. Leave it out, or "
                "give a .jsonl, .json or .parquet file."
            )
        text = read_calibration(name)
        assert isinstance(text, str)
        yield _Sample(text, ((0, len(text)),), repr(name), document=True)
        return
    for number, (where, row) in enumerate(read_documents(name)):
        if number == options.samples:
            return
        yield _in_words(row, where, tokenizer, options)


def _in_words(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> _Sample:
    if options.column is not None:
        if options.column not in row:
            raise DataError(f"{where}: no column {options.column!r} among {sorted(row)}. Name one of them: --column.")
        return _of_column(row[options.column], options.column, where, tokenizer, options)
    question = next((name for name in QUESTIONS if name in row), None)
    answer = next((name for name in ANSWERS if name in row), None)
    if question is not None and answer is not None:
        context = next((name for name in CONTEXTS if name in row), None)
        texts = [_string(row, name, where) for name in (question, context, answer)]
        return _instruction(*texts, where=where, tokenizer=tokenizer, options=options)
    column = next((name for name in (*CHATS, COLUMN) if name in row), None)
    if column is None:
        raise DataError(
            f"{where}: no fields to train on among {sorted(row)}. Expected instruction and output (or response), "
            "messages, or text; a field of another name is read with --column NAME."
        )
    return _of_column(row[column], column, where, tokenizer, options)


def _string(row: Mapping[str, Any], name: str | None, where: str) -> str:
    value = None if name is None else row[name]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: its {name!r} is of type {type(value).__name__}, not a text. Expected a string.")
    return value or ""


def _of_column(
    value: object, column: str, where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> _Sample:
    where = f"{where}: its {column!r}"
    if isinstance(value, str):
        return _Sample(value, ((0, len(value)),), where, document=True)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f"{where} is of type {type(value).__name__}, neither a text nor messages. Expected a string, or a list of "
            '{"role": "...", "content": "..."}.'
        )
    return _chat([_message(message, where) for message in value], where, tokenizer, options)


def _message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f'{where} has a message without text. Expected {{"role": "...", "content": "..."}}.')
    return {"role": ROLES.get(role, role), "content": content}


def _instruction(
    question: str,
    context: str,
    answer: str,
    *,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
) -> _Sample:
    if options.template == "chat":
        asked = f"{question}\n\n{context}" if context else question
        messages = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": answer}]
        return _chat(messages, where, tokenizer, options)
    prompt = (ALPACA_WITH_INPUT if context else ALPACA).format(instruction=question, input=context)
    text = prompt + answer
    return _Sample(text, ((len(prompt), len(text)),) if answer.strip() else (), where)


def _chat(
    messages: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> _Sample:
    """Messages as the chat template writes them; an answer is what an assistant's message adds to those before it."""
    if options.template == "alpaca":
        raise DataError(
            f"{where} holds messages, which Alpaca's prompt has no place for. Use the tokenizer's: --template chat"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is to be put into the chat template, and the tokenizer has none. Use Alpaca's prompt for "
            "instructions (--template alpaca), or give it one: tokenizer.chat_template = ..."
        )

    def written(count: int, *, prompt: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # templates refuse what they do not expect, each in its own way
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
            raise DataError(f"{where}: the chat template does not take it ({told}). Mend the messages.") from error

    text = written(len(messages))
    if options.loss_on == "all":
        return _Sample(text, ((0, len(text)),), where, special=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == ASSISTANT and message["content"].strip():
            before, after = written(i, prompt=True), written(i + 1)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: the chat template writes message {i + 1} otherwise when others follow, so that it is "
                    "not known which tokens are the answer. Learn all tokens (--loss-on all), or split the chat."
                )
            spans.append((len(before), len(after)))
    return _Sample(text, tuple(spans), where, special=False)


# --- words to tokens --------------------------------------------------------------------------------------------------


def _batches(samples: Iterator[_Sample]) -> Iterator[list[_Sample]]:
    batch: list[_Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenised(
    samples: list[_Sample], tokenizer: PreTrainedTokenizerBase, options: DataOptions
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


def _counted(sample: _Sample, count: int, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
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


def _drawn(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the pool, all before any again, each time in another order."""
    if not len(pool) or not count:
        return torch.zeros(0, dtype=torch.int64)
    rounds = -(-count // len(pool))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[:count]


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
