r"""Files, data sets and the demo -> text.

`read_rows` gives a file's rows as the perplexity protocol wants them, `read_calibration` what calibration windows are
taken from: documents that no window crosses.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import COLUMN, DEMO, SELF
from secateur.data.documents import (
    decoded,
    existing_file,
    holds_documents,
    instruction_fields,
    read_documents,
    string_in,
)
from secateur.data.overlap import word_runs
from secateur.errors import DataError, one_line

MESSAGES = "messages"
MAX_CHARACTERS = 2_000_000  # of a calibration text; a few seconds of tokenising, and far more than windows need


@functools.cache
def demo_texts() -> tuple[str, str]:
    """Return a calibration text and an evaluation text that every Python has: its own language reference.

    The topics of `pydoc_data.topics`, by name: those at even places are for calibration, those at odd places for
    evaluation. A text under several names counts once; one for calibration that has `OVERLAP_WORDS` words in a row of
    the evaluation text is left out. The wording differs between Python versions.

    >>> calibration, evaluation = demo_texts()
    >>> min(len(calibration), len(evaluation)) > 100_000
    True
    """
    from pydoc_data.topics import topics

    places: dict[str, int] = {}
    for place, name in enumerate(sorted(topics)):
        places.setdefault(topics[name], place)
    calibration, evaluation = ([topic for topic, place in places.items() if place % 2 == half] for half in (0, 1))
    tested = {run for topic in evaluation for run in word_runs(topic)}
    calibration = [topic for topic in calibration if tested.isdisjoint(word_runs(topic))]
    return "\n\n".join(calibration), "\n\n".join(evaluation)


def read_rows(path: str | Path) -> list[str]:
    """Read a file's rows, ready to be joined with a blank line as the perplexity protocol does.

    `.jsonl`, `.json` (one array, or one object a line) and `.parquet`: the `text` of each row, as it is. Any other
    file: itself, or the lines of a data set, see `plain_rows`. Raises `DataError` for a file that is missing, not
    UTF-8, empty or without such texts, naming the line, and for Parquet without the packages that read it.
    """
    path = existing_file(path)
    if holds_documents(path):
        rows = [text_of(row, where, COLUMN) for where, row in read_documents(path)]
    else:
        rows = plain_rows(decoded(path))
    _check_not_empty(path, rows)
    return rows


def plain_rows(text: str) -> list[str]:
    r"""The rows of a plain text: itself, as it is, unless it has the form of WikiText's or PTB's files.

    In these every line that is not blank begins and ends with a space, and is a row. With blank lines, as in WikiText's
    raw files, it keeps its newline, and a blank line is `""`; without, as in PTB's, it is stripped.

    >>> plain_rows(" \n = Title = \n \n A line . \n"), plain_rows(" a b \n c \n")
    (['', ' = Title = \n', '', ' A line . \n'], ['a b', 'c'])
    >>> plain_rows("A line\nof prose.\n")
    ['A line\nof prose.\n']
    """
    lines = [line if line.strip() else "" for line in io.StringIO(text)]  # str.splitlines would split at ten others
    if not all(line.startswith(" ") and line.removesuffix("\n").endswith(" ") for line in lines if line):
        return [text]
    return lines if "" in lines else [line.strip() for line in lines]


def read_calibration(
    name_or_path: str | Path,
    *,
    column: str = COLUMN,
    chat: PreTrainedTokenizerBase | None = None,
    characters: int = MAX_CHARACTERS,
) -> list[str]:
    """Read what calibration windows are taken from: documents that no window crosses.

    `demo` is the calibration half of `demo_texts`. A plain text file is one document; a file of documents, or a data
    set on the hub (its split `train`), has many, read up to so many characters. A document's text is its field
    `column`: a string, or utterances (a list of strings), which newlines join. Where there is no `text`, an
    instruction, its input and the answer are one text, with a blank line between them.

    With a tokenizer as `chat`, every document is put into its chat template: a text as one message of the user,
    utterances as messages of user and assistant in turns, and a list of messages (`role` and `content`) as it is;
    `messages` is read rather than `text` where there is such a field and no other `column` is named. Raises `DataError`
    as `read_rows` does, for a data set or column that is not there, and for a tokenizer without a template.

    >>> len(read_calibration("demo"))
    1
    """
    if name_or_path == SELF:
        raise DataError(f"{SELF!r} is no text to read: the model generates it, by generate_windows(model, options).")
    if chat is not None and not chat.chat_template:
        raise DataError(
            "chat=True, but the tokenizer has no chat template. Leave it out: CalibrationOptions(chat=False), or give "
            "it one: tokenizer.chat_template = ..."
        )
    if name_or_path != DEMO and holds_documents(name_or_path):
        documents = _first_documents(name_or_path, column, chat, characters)
        _check_not_empty(name_or_path, documents)
        return documents
    text = demo_texts()[0] if name_or_path == DEMO else decoded(existing_file(name_or_path))
    _check_not_empty(name_or_path, [text])
    if column != COLUMN:
        raise DataError(
            f"{str(name_or_path)!r}: column={column!r} names a field of documents, and this is one text. Leave it out, "
            "or give a .jsonl, .json or .parquet file."
        )
    return [text if chat is None else in_template(text, repr(str(name_or_path)), chat)]


def _check_not_empty(name: str | Path, texts: Sequence[str]) -> None:
    if not any(text.strip() for text in texts):
        raise DataError(f"{str(name)!r}: there is no text in it. Expected text in UTF-8, or {DEMO!r}.")


def _first_documents(
    name_or_path: str | Path, column: str, chat: PreTrainedTokenizerBase | None, characters: int
) -> list[str]:
    """The texts of documents, up to the one that reaches so many characters."""
    documents: list[str] = []
    size = 0
    for where, row in read_documents(name_or_path):
        documents.append(text_of(row, where, column, chat))
        size += len(documents[-1])
        if size >= characters:
            break
    return documents


def text_of(row: Mapping[str, Any], where: str, column: str, chat: PreTrainedTokenizerBase | None = None) -> str:
    """The text of one document, in the chat template if there is to be one. Raises `DataError`, which says `where`."""
    if chat is not None and column == COLUMN and MESSAGES in row:
        column = MESSAGES
    fields = instruction_fields(row) if column == COLUMN and column not in row else None
    if fields is not None:
        instruction, more, answer = (string_in(row, name, where) for name in fields)
        turns = ["\n\n".join(filter(None, (instruction, more))), answer]
        return "\n\n".join(turns) if chat is None else in_template(turns, where, chat)
    if column not in row:
        texts = [name for name, value in row.items() if isinstance(value, str) or (value and _is_dialogue(value))]
        remedy = 'Expected an object with a text: {"text": "..."}.'
        if texts:
            remedy = (
                f"{texts[0]!r} holds text: name it, CalibrationOptions(column={texts[0]!r}), or call it {COLUMN!r}."
            )
        raise DataError(f"{where}: no column {column!r} among {sorted(row)}. {remedy}")
    value, where = row[column], f"{where}: its {column!r}"
    if _is_chat(value) and chat is None:
        raise DataError(
            f"{where} holds messages of a chat. Put them into the chat template: "
            f"CalibrationOptions(column={column!r}, chat=True)."
        )
    if not (isinstance(value, str) or _is_dialogue(value) or _is_chat(value)):
        raise DataError(
            f"{where} is of type {type(value).__name__}, not a text. Expected a string, or a list of strings; with "
            'chat=True also a list of {"role": "...", "content": "..."}.'
        )
    if chat is not None:
        return in_template(value, where, chat)
    return value if isinstance(value, str) else "\n".join(value)


def _is_dialogue(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(utterance, str) for utterance in value)


def _is_chat(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, dict) and message.keys() >= {"role", "content"} for message in value)


def in_template(value: Any, where: str, chat: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    """A text, utterances or messages as the chat template writes them; a `prompt` ends where an answer begins.

    Raises `DataError`, which says `where`, for messages that the template does not take.
    """
    messages: list[dict[str, str]] = value
    if not _is_chat(value):
        turns = [value] if isinstance(value, str) else value
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        return str(chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates refuse what they do not expect, each in its own way
        raise DataError(
            f"{where}: the chat template does not take it ({one_line(error)}). Mend the messages, or do without it."
        ) from error
