r"""Text -> batches of tokens: `demo`, a file or a data set becomes the windows that scores and repairs look at.

Files are UTF-8. A `.jsonl`, `.json` or `.parquet` file holds documents, one `text` each; any other file is plain text.
`read_rows` gives a file's rows as the perplexity protocol wants them, `read_calibration` gives what windows are taken
from, `sample_windows` takes them, and `calibration_windows` does both. Where there is no text at all, `self_written`
lets the model write it. `overlap` tells whether windows occur in a text that is to be evaluated.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import DataError, SecateurError, one_line
from secateur.models.config import check_positions
from secateur.models.silence import quiet

DEMO = "demo"
SELF = "self"
COLUMN = "text"
MESSAGES = "messages"
MAX_CHARACTERS = 2_000_000  # of a calibration text; a few seconds of tokenising, and far more than windows need
WRITTEN_TOKENS = 2048  # of samples that are written at once; the keys and values of so many tokens are held
OVERLAP_WORDS = 13  # in a row, which two texts do not share by chance: GPT-3, arXiv 2005.14165, appendix C

_EXTRA = "pip install 'secateur[data]'"


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which text to calibrate on, and how much of it; LLM-Pruner takes 10 windows of 64 tokens.

    >>> CalibrationOptions(samples=0)
    Traceback (most recent call last):
    secateur.errors.DataError: samples=0 is too small. Expected at least 1: CalibrationOptions(samples=64).
    """

    text: str = DEMO  # demo, a file, the name of a data set, or self: what the model writes
    samples: int = 64  # windows
    length: int = 128  # tokens per window
    seed: int = 0
    column: str = COLUMN  # the field of a document that holds its text; with chat, `messages` comes before `text`
    chat: bool = False  # put every document into the tokenizer's chat template
    for_scores: int | None = None  # the first windows, which scores look at; repair takes all (None: both all)
    # The share of the windows, the last ones, whose tokens are in random order. Scores do not look at them: they are
    # for repair, which then fits weights to words, too, that the text seldom has side by side. None: a quarter where a
    # repair looks at windows, none elsewhere (`plan.settled` says which).
    shuffled: float | None = 0.0

    def __post_init__(self) -> None:
        if not self.text:
            raise DataError("text='' names no text. Expected demo, a file or a data set: CalibrationOptions('demo').")
        if not self.column:
            raise DataError("column='' names no field. Expected that of the text: CalibrationOptions(column='text').")
        if self.text == SELF and (self.chat or self.column != COLUMN):
            raise DataError(
                f"column={self.column!r} and chat={self.chat} are about documents, and {SELF!r} is what the model "
                f"writes. Leave them out: CalibrationOptions({SELF!r})."
            )
        # A window of one token predicts nothing.
        for name, value, least, good in (
            ("samples", self.samples, 1, 64),
            ("length", self.length, 2, 128),
            ("seed", self.seed, 0, 0),
            ("for_scores", self.for_scores, 1, 64),
        ):
            if value is not None and value < least:
                raise DataError(
                    f"{name}={value} is too small. Expected at least {least}: CalibrationOptions({name}={good})."
                )
        if self.shuffled is not None and not 0 <= self.shuffled < 1:
            raise DataError(
                f"shuffled={self.shuffled:g} is no share of the windows that leaves some as they are. Expected at "
                "least 0 and less than 1: CalibrationOptions(shuffled=0.25)."
            )

    def in_order(self, windows: Tensor) -> Tensor:
        """Those of the windows (int64, samples x length) whose tokens are as the text has them.

        >>> len(CalibrationOptions(shuffled=0.25).in_order(torch.zeros(8, 2)))
        6
        """
        return windows[: self._in_order(len(windows))]

    def scored(self, windows: Tensor) -> Tensor:
        """Those of the windows that scores look at.

        >>> len(CalibrationOptions(for_scores=3).scored(torch.zeros(8, 2)))
        3
        """
        return self.in_order(windows)[: self.for_scores]

    def as_scored(self) -> CalibrationOptions:
        """The same for scores, without what only repair sees; statistics can be kept under it.

        >>> CalibrationOptions(samples=8, for_scores=6, shuffled=0.25).as_scored().shuffled
        0.0
        >>> CalibrationOptions(samples=8, for_scores=7, shuffled=0.25).as_scored().shuffled
        0.25
        """
        alike = self.for_scores is not None and self.for_scores <= self._in_order(self.samples)
        return replace(self, shuffled=0.0) if alike else self

    def _in_order(self, windows: int) -> int:
        return windows - int(windows * (self.shuffled or 0))


def demo_texts() -> tuple[str, str]:
    """Return a calibration text and an evaluation text that every Python has: its own language reference.

    The topics of `pydoc_data.topics`, by name: those at even places are for calibration, those at odd places for
    evaluation. A text that stands under several names counts once. Some topics repeat parts of others; one for
    calibration that has `OVERLAP_WORDS` words in a row of the evaluation text is left out. The wording differs between
    Python versions, therefore results name the version or the `digest` of the tokens.

    >>> calibration, evaluation = demo_texts()
    >>> min(len(calibration), len(evaluation)) > 100_000
    True
    """
    from pydoc_data.topics import topics

    halves: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for place, name in enumerate(sorted(topics)):
        if topics[name] not in seen:
            seen.add(topics[name])
            halves[place % 2].append(topics[name])
    calibration, evaluation = halves
    tested = {run for topic in evaluation for run in _runs(topic)}
    calibration = [topic for topic in calibration if tested.isdisjoint(_runs(topic))]
    return "\n\n".join(calibration), "\n\n".join(evaluation)


def read_rows(path: str | Path) -> list[str]:
    r"""Read a file's rows, ready to be joined with a blank line as the perplexity protocol does.

    - `.jsonl` and `.json`: the `text` of each object, as it is. `.json` may be one array instead of one object a line.
    - `.parquet`: the `text` column, as it is.
    - anything else, if some line is blank (nothing or white space): prose laid out in lines, such as WikiText's raw
      files. Every line is a row and keeps its newline; a blank line is the row `""`.
    - anything else without blank lines, such as PTB's files: every line is a row, stripped.

    The newline that ends a file starts no further row. Raises `DataError` for a file that is missing, not UTF-8, empty
    or without such texts, naming the line, and for Parquet without the packages that read it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "wiki.txt"
    ...     _ = file.write_text(" \n = Title = \n \n A line . \n", encoding="utf-8")
    ...     read_rows(file)
    ['', ' = Title = \n', '', ' A line . \n']
    """
    path = _existing(path)
    rows = _documents(path, _Wanted()) if _holds_documents(path) else _text_rows(_decoded(path))
    _check_not_empty(path, rows)
    return rows


def read_calibration(
    name_or_path: str | Path, *, column: str = COLUMN, chat: PreTrainedTokenizerBase | None = None
) -> str | list[str]:
    """Read what calibration windows are taken from: one text, or documents that no window crosses.

    `demo` is the calibration half of `demo_texts`. A plain text file is one text; a file of documents is a list of
    them; any other name is a data set on the hub (`name`, or `name:config`), of which the split `train` is read up to
    `MAX_CHARACTERS`. A document's text is its field `column`: a string, or a dialogue's utterances (a list of strings),
    which are joined by newlines.

    With a tokenizer as `chat`, every document is put into its chat template: a text as one message of the user,
    utterances as messages of user and assistant in turns, and a list of messages (`role` and `content`) as it is;
    `messages` is read rather than `text` where there is such a field and no other `column` is named. A plain text is
    then one long message.

    Raises `DataError` as `read_rows` does, for a data set that cannot be read, for a column that is not there, and
    for a tokenizer without a template.

    >>> isinstance(read_calibration("demo"), str)
    True
    """
    if name_or_path == SELF:
        raise DataError(f"{SELF!r} is no text to read: the model writes it. self_written(model, options) does.")
    if chat is not None and not chat.chat_template:
        raise DataError(
            "chat=True, but the tokenizer has no chat template. Leave it out: CalibrationOptions(chat=False), or give "
            "it one: tokenizer.chat_template = ..."
        )
    wanted = _Wanted(column, chat)
    found: str | list[str]
    if name_or_path == DEMO:
        found = demo_texts()[0]
    elif isinstance(name_or_path, str) and _is_data_set_name(name_or_path):
        found = _data_set(name_or_path, wanted)
    else:
        path = _existing(name_or_path)
        found = _documents(path, wanted) if _holds_documents(path) else _decoded(path)
    _check_not_empty(name_or_path, [found] if isinstance(found, str) else found)
    if not isinstance(found, str):
        return found
    if column != COLUMN:
        raise DataError(
            f"{str(name_or_path)!r}: column={column!r} names a field of documents, and this is one text. Leave it out, "
            "or give a .jsonl, .json or .parquet file."
        )
    return found if chat is None else _in_template(found, repr(str(name_or_path)), chat)


def read_documents(name_or_path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a `.jsonl`, `.json` or `.parquet` file or of a data set, each with the place where it stands.

    A data set is named as for `read_calibration`, and its split `train` is streamed. Raises `DataError` as
    `read_calibration` does, and for a row that is no object.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "rows.jsonl"
    ...     _ = file.write_text('{"question": "Why?"}', encoding="utf-8")
    ...     [row for _, row in read_documents(file)]
    [{'question': 'Why?'}]
    """
    if isinstance(name_or_path, str) and _is_data_set_name(name_or_path):
        rows = _data_set_rows(name_or_path)
    else:
        path = _existing(name_or_path)
        rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_items(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__} is no row. Expected an object with named fields.")
        yield where, row


def holds_documents(name_or_path: str | Path) -> bool:
    """Tell whether `read_documents` reads it; anything else is a file of plain text.

    >>> holds_documents("rows.jsonl"), holds_documents("book.txt"), holds_documents("organisation/set")
    (True, False, True)
    """
    named = isinstance(name_or_path, str) and _is_data_set_name(name_or_path)
    return named or _holds_documents(Path(name_or_path))


def read_text(name_or_path: str | Path) -> str:
    """Read a calibration text as `read_calibration` does, with documents joined by a blank line.

    >>> read_text("demo") == demo_texts()[0]
    True
    """
    text = read_calibration(name_or_path)
    return text if isinstance(text, str) else "\n\n".join(text)


def calibration_windows(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> Tensor:
    """Read the text that the options name and take their windows of it; returns int64 ids, samples x length.

    Raises `DataError` as `read_calibration` and `sample_windows` do.

    >>> from types import SimpleNamespace
    >>> def letters(texts, **_):
    ...     return SimpleNamespace(input_ids=[list(text.encode()) for text in texts])
    >>> calibration_windows(letters, CalibrationOptions(samples=3, length=8)).shape
    torch.Size([3, 8])
    """
    text = read_calibration(options.text, column=options.column, chat=tokenizer if options.chat else None)
    return sample_windows(text, tokenizer, options)


def sample_windows(
    text_or_documents: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
) -> Tensor:
    """Take `options.samples` random windows of `options.length` tokens; returns int64 ids, samples x length.

    In one text every place is equally likely. Of documents, first a document that is long enough is drawn and then a
    place in it, and no document is drawn again before all were, as LLM-Pruner does (`get_c4`, `get_bookcorpus`). No
    window is drawn twice, no special tokens are added, and only the first `MAX_CHARACTERS` are looked at. The tokens of
    the last `options.shuffled` of the windows are in random order. The same text, tokenizer and options give the same
    windows. Raises `DataError` when the text is shorter than a window or has fewer places than samples.

    >>> from types import SimpleNamespace
    >>> def letters(texts, **_):
    ...     return SimpleNamespace(input_ids=[[ord(letter) - ord("a") for letter in text] for text in texts])
    >>> sample_windows("abcdef", letters, CalibrationOptions(samples=3, length=4)).tolist()
    [[1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, 3]]
    """
    documents = [text_or_documents] if isinstance(text_or_documents, str) else text_or_documents
    encoded = _tokenize(_first_characters(documents), tokenizer)
    length, samples = options.length, options.samples
    usable = [ids for ids in encoded if len(ids) >= length]
    if not usable:
        longest = max((len(ids) for ids in encoded), default=0)
        what = "the calibration text has" if len(documents) == 1 else "the longest calibration document has"
        raise DataError(
            f"{what} {longest} tokens, but one window needs {length}. Expected a longer text, or a shorter window: "
            f"CalibrationOptions(length={max(longest, 2)}, samples=1)."
        )
    left = [len(ids) - length + 1 for ids in usable]  # places of each document that were not drawn
    if sum(left) < samples:
        raise DataError(
            f"tiny calibration text: {sum(map(len, usable))} tokens hold {sum(left)} different windows of {length}, "
            f"but {samples} samples need as many. Expected a longer text, or fewer: "
            f"CalibrationOptions(samples={sum(left)})."
        )
    chooser = random.Random(options.seed)
    chosen: dict[tuple[int, int], None] = {}  # document and start, in the order drawn
    waiting: set[int] = set()  # documents that gave no window in this round
    while len(chosen) < samples:
        waiting = waiting or {document for document, places in enumerate(left) if places}
        document = chooser.randrange(len(usable))
        start = chooser.randrange(len(usable[document]) - length + 1)
        if document in waiting and (document, start) not in chosen:
            chosen[document, start] = None
            left[document] -= 1
            waiting.remove(document)
    windows = [usable[document][start : start + length] for document, start in chosen]
    return _shuffled(torch.tensor(windows, dtype=torch.int64), options)


def _shuffled(windows: Tensor, options: CalibrationOptions) -> Tensor:
    """The same windows, the tokens of the last ones, together, in random order."""
    kept = options.in_order(windows)
    mixed = windows[len(kept) :].flatten()
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(options.seed))
    return torch.cat([kept, mixed[order].view(-1, windows.shape[1])])


def self_written(
    model: PreTrainedModel, options: CalibrationOptions, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Let the model write its own calibration text; returns int64 ids on the CPU, samples x length.

    Calibration without data, as in LLM-QAT (arXiv 2305.17888): every token is drawn from the model's own distribution
    at temperature 1, with none of its generation settings. A sample starts after the beginning-of-text token that the
    model's configs name, else the first end-of-text token, else token 0, and does not hold it; an end of text within
    it is a token like any other, so all samples have the same length. The same model, options and machine give the
    same tokens. `progress` counts samples. Raises `DataError` for a model that cannot generate, or whose logits hold
    NaN, and as `check_positions` does.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> self_written(model, CalibrationOptions("self", samples=3, length=5)).shape
    torch.Size([3, 5])
    """
    check_positions(model.config, options.length)
    instead = f"Give a text instead: CalibrationOptions({DEMO!r})."
    writer: Any = model
    if not hasattr(writer, "generate"):
        raise DataError(f"text={SELF!r}: {type(model).__name__} has no generate, so it writes no text. {instead}")

    def check(_: Tensor, logits: Tensor) -> Tensor:
        if logits.isnan().any():
            raise DataError(f"text={SELF!r}: the logits of {type(model).__name__} hold NaN, so it writes no text.")
        return logits

    plain = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, max_new_tokens=options.length
    )
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # accelerate moves what goes in
    at_once = max(1, WRITTEN_TOKENS // options.length)
    written: list[Tensor] = []
    with _seeded(options.seed, device), _without_generation_settings(writer), quiet():
        for first in range(0, options.samples, at_once):
            count = min(at_once, options.samples - first)
            start = torch.full((count, 1), _start_token(model), device=device)
            try:
                ids = writer.generate(input_ids=start, generation_config=plain, logits_processor=[check])
            except SecateurError:
                raise
            except Exception as error:  # whatever the model's own code makes of it
                raise DataError(
                    f"text={SELF!r}: {type(model).__name__} writes no text ({one_line(error)}). {instead}"
                ) from error
            written.append(ids[:, 1:].cpu())
            if progress is not None:
                progress(first + count, options.samples)
    return _shuffled(torch.cat(written), options)


def overlap(windows: Iterable[str], text: str | Iterable[str], *, words: int = OVERLAP_WORDS) -> float:
    """Return the share of the windows that have `words` words in a row in common with the text or texts, 0 to 1.

    Calibration on what is evaluated flatters the result. Words are runs of letters and digits, in lower case; 13 of
    them in a row are GPT-3's rule (arXiv 2005.14165, appendix C). A window of fewer words is not counted.

    >>> overlap(["and a cat sat on", "and a dog lay on"], "A cat sat, a dog sat.", words=3)
    0.5
    """
    # Of long texts the runs themselves would fill gigabytes: hashes are kept, and of many texts those of the windows.
    if isinstance(text, str):
        tested = set(map(hash, _runs(text, words)))
        hits = [any(hash(run) in tested for run in _runs(window, words)) for window in windows]
        return sum(hits) / max(len(hits), 1)
    holders: dict[int, list[int]] = defaultdict(list)
    count = 0
    for window in windows:
        for run in _runs(window, words):
            holders[hash(run)].append(count)
        count += 1
    found = {number for each in text for run in _runs(each, words) for number in holders.get(hash(run), ())}
    return len(found) / max(count, 1)


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


def _runs(text: str, words: int = OVERLAP_WORDS) -> Iterator[tuple[str, ...]]:
    """Yield every run of so many words."""
    found = re.findall(r"\w+", text.lower())
    return zip(*(found[first:] for first in range(words)), strict=False)


def _start_token(model: PreTrainedModel) -> int:
    """The token that a text starts after: see `self_written`."""
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        for source in (config, getattr(model, "generation_config", None)):
            token = getattr(source, name, None)
            token = token[0] if isinstance(token, list | tuple) and token else token
            if isinstance(token, int) and 0 <= token < config.vocab_size:  # some configs name tokens that are not there
                return token
    return 0


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers, and put them back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _without_generation_settings(model: Any) -> Iterator[None]:
    """Take the model's generation settings away for a while: generate reads those that it is not given from there."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which field of a document is its text, and the tokenizer whose chat template it is put into, if any."""

    column: str = COLUMN
    chat: PreTrainedTokenizerBase | None = None

    def among(self, names: Iterable[str]) -> str | None:
        """The field of these to read."""
        columns = (MESSAGES, COLUMN) if self.chat is not None and self.column == COLUMN else (self.column,)
        return next((column for column in columns if column in names), None)


def _check_not_empty(name: str | Path, texts: Sequence[str]) -> None:
    if not any(text.strip() for text in texts):
        raise DataError(f"{str(name)!r}: there is no text in it. Expected text in UTF-8, or {DEMO!r}.")


def _existing(path: str | Path) -> Path:
    found = Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    if not found.exists():
        raise DataError(f"{str(path)!r}: no such file. Expected a text file, .jsonl, .json or .parquet, or {DEMO!r}.")
    if not found.is_file():
        raise DataError(f"{str(path)!r}: this is a folder. Expected one text file, .jsonl, .json or .parquet.")
    return found


def _holds_documents(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json", ".parquet")


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark; newlines become \n
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r}: byte {error.start} is not UTF-8. Expected text in UTF-8; convert the file first."
        ) from error
    except OSError as error:
        raise DataError(f"{str(path)!r}: the file cannot be read ({error.strerror}).") from error


def _text_rows(text: str) -> list[str]:
    lines = list(io.StringIO(text))  # splits at \n alone, where str.splitlines knows ten other characters
    if any(not line.strip() for line in lines):
        return [line if line.strip() else "" for line in lines]
    return [line.strip() for line in lines]


def _documents(path: Path, wanted: _Wanted) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return _parquet_texts(path, wanted)
    return [_text_of(item, where, wanted) for where, item in _json_items(path)]


def _json_items(path: Path) -> Iterator[tuple[str, object]]:
    """What a `.json` or `.jsonl` file holds, one after the other, each with the place where it stands."""
    text = _decoded(path)
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
        except ValueError:
            pass  # one object a line, as in .jsonl
        else:
            items = whole if isinstance(whole, list) else [whole]
            yield from ((f"{str(path)!r}, item {i}", item) for i, item in enumerate(items, start=1))
            return
    for number, line in enumerate(io.StringIO(text), start=1):
        where = f"{str(path)!r}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DataError(f'{where}: not JSON ({error}). Expected one object a line: {{"text": "..."}}.') from error
        yield where, item


def _text_of(item: object, where: str, wanted: _Wanted) -> str:
    """The text of one document, in the chat template if that is wanted."""
    if not isinstance(item, dict):
        raise DataError(
            f'{where}: a JSON {type(item).__name__} is no document. Expected an object with a text: {{"text": "..."}}.'
        )
    column = wanted.among(item)
    if column is None:
        texts = [name for name, value in item.items() if isinstance(value, str) or (value and _is_dialogue(value))]
        raise _no_column(where, wanted.column, list(item), texts)
    value, where = item[column], f"{where}: its {column!r}"
    if _is_chat(value) and wanted.chat is None:
        raise DataError(
            f"{where} holds messages of a chat. Put them into the chat template: "
            f"CalibrationOptions(column={column!r}, chat=True)."
        )
    if not (isinstance(value, str) or _is_dialogue(value) or _is_chat(value)):
        raise DataError(
            f"{where} is of type {type(value).__name__}, not a text. Expected a string, or a list of strings; with "
            'chat=True also a list of {"role": "...", "content": "..."}.'
        )
    if wanted.chat is not None:
        return _in_template(value, where, wanted.chat)
    return value if isinstance(value, str) else "\n".join(value)


def _is_dialogue(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(utterance, str) for utterance in value)


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and message.keys() >= {"role", "content"} for message in value)
    )


def _no_column(where: str, column: str, names: Iterable[str], texts: Sequence[str]) -> DataError:
    """The error for a column that is not there; `texts` are columns that hold text."""
    if texts:
        remedy = f"{texts[0]!r} holds text: name it, CalibrationOptions(column={texts[0]!r}), or rename it {COLUMN!r}."
    else:
        remedy = 'Expected an object with a text: {"text": "..."}.'
    return DataError(f"{where}: no column {column!r} among {sorted(names)}. {remedy}")


def _in_template(value: Any, where: str, chat: PreTrainedTokenizerBase) -> str:
    """A text, utterances or messages as the chat template writes them."""
    messages: list[dict[str, str]]
    if _is_chat(value):
        messages = value
    else:
        turns = [value] if isinstance(value, str) else value
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        return str(chat.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates refuse what they do not expect, each in its own way
        raise DataError(
            f"{where}: the chat template does not take it ({one_line(error)}). Mend the messages, or leave the "
            "template out: CalibrationOptions(chat=False)."
        ) from error


def _parquet_texts(path: Path, wanted: _Wanted) -> list[str]:
    pyarrow = _parquet_reader(path)
    try:
        schema = pyarrow.parquet.read_schema(path)
        column = wanted.among(schema.names)
        if column is None:
            texts = [name for name in schema.names if str(schema.field(name).type).endswith("string")]
            raise _no_column(repr(str(path)), wanted.column, schema.names, texts)
        values = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r}: not a readable Parquet file ({one_line(error)}).") from error
    return [_text_of({column: value}, f"{str(path)!r}, row {i}", wanted) for i, value in enumerate(values, start=1)]


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    pyarrow = _parquet_reader(path)
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r}: not a readable Parquet file ({one_line(error)}).") from error
    yield from ((f"{str(path)!r}, row {i}", row) for i, row in enumerate(rows, start=1))


def _parquet_reader(path: Path) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{str(path)!r}: reading Parquet needs pyarrow. Run: {_EXTRA}")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def _is_data_set_name(name: str) -> bool:
    """Tell whether a string that is not an existing path may name a data set: `[organisation/]name[:config]`."""
    path = Path(name)
    is_path = path.exists() or path.is_absolute() or name.startswith((".", "~")) or "\\" in name
    return bool(name) and not is_path and name.count("/") <= 1 and not _has_file_suffix(path)


def _has_file_suffix(path: Path) -> bool:
    return _holds_documents(path) or path.suffix.lower() in (".txt", ".raw", ".md", ".text")


def _data_set(name: str, wanted: _Wanted) -> list[str]:
    documents: list[str] = []
    size = 0
    for where, item in _data_set_rows(name):
        documents.append(_text_of(item, where, wanted))
        size += len(documents[-1])
        if size >= MAX_CHARACTERS:
            break
    return documents


def _data_set_rows(name: str) -> Iterator[tuple[str, object]]:
    """The rows of a data set's split `train`, streamed: a window or two do not need a whole corpus on disk."""
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{name!r}: no such file, and the name of a data set needs the package datasets. Run: {_EXTRA}, or give a "
            f"text file or {DEMO!r}."
        )
    import datasets

    try:
        repository, _, config = name.partition(":")
        rows = iter(datasets.load_dataset(repository, config or None, split="train", streaming=True))
        for number in itertools.count(1):
            row = next(rows, None)
            if row is None:
                return
            yield f"{name!r}, row {number}", row
    except Exception as error:  # whatever the hub, the network or the data set's format makes of it
        raise DataError(
            f"{name!r}: no such file, and no data set of that name can be read ({one_line(error)}). Check the name "
            f"and the network, or give a text file or {DEMO!r}."
        ) from error


def _first_characters(documents: Iterable[str]) -> list[str]:
    """Return the documents up to `MAX_CHARACTERS` in all; the last one may be cut."""
    kept: list[str] = []
    left = MAX_CHARACTERS
    for document in documents:
        if left <= 0:
            break
        kept.append(document[:left])
        left -= len(kept[-1])
    return kept


def _tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not documents:
        return []
    # verbose=False: a text longer than the model's context is what we want here, not a reason to warn.
    encoded: Any = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded.input_ids]
