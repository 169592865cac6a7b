"""A row of a file or data set -> its text by a prompt template, and which characters of it are answers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import COLUMN, DEMO
from secateur.data.documents import first_field, holds_documents, instruction_fields, read_documents, string_in
from secateur.data.forms import FORMS
from secateur.data.options import DataOptions
from secateur.data.text import MESSAGES, in_template, read_calibration
from secateur.errors import DataError

# The prompt of Stanford Alpaca, as LLM-Pruner trains with it. It is data: without a comma it is another prompt.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MESSAGE_FIELDS = (MESSAGES, "conversations")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # other roles stay as they are
ASSISTANT = "assistant"
PART = 4000  # characters of a long text, some rows, that are in one form


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]  # characters, half-open
    where: str  # for errors: the file and the number of the row
    add_special_tokens: bool = True  # False: a chat template has written them
    is_document: bool = False  # plain text: what does not fit into a row goes into further rows
    is_part: bool = False  # of a document that goes on after it


def read_examples(source: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Iterator[Example]:
    """Yield the rows of a source as text; a plain text file is one example."""
    if source == DEMO or not holds_documents(source):
        if options.column is not None:
            raise DataError(
                f"{source!r}: column={options.column!r} names a field of rows, and this is one text. Leave it out, or "
                "give a .jsonl, .json or .parquet file."
            )
        (text,) = read_calibration(source)
        yield Example(text, ((0, len(text)),), repr(source), is_document=True)
        return
    for number, (where, row) in enumerate(read_documents(source)):
        if number == options.samples:
            return
        yield _format_row(row, where, tokenizer, options)


def in_forms(examples: Iterator[Example], share: float) -> Iterator[Example]:
    """The same examples with this share of their plain text in each of `FORMS` in turn; a long text is divided.

    >>> texts = iter([Example(text, (), "", is_document=True) for text in ("One.", "It's two.", "Three, yes.")])
    >>> [example.text for example in in_forms(texts, 0.5)]
    ['One.', "it 's two ", 'Three, yes.']
    """
    owed, forms = 0.0, itertools.cycle(FORMS.values())
    for example in examples:
        if not (example.is_document and share):
            yield example
            continue
        parts = _parts(example.text)
        for number, part in enumerate(parts, start=1):
            owed += share
            text = part if owed < 1 else next(forms)(part)
            owed -= owed >= 1
            yield replace(example, text=text, answer_spans=((0, len(text)),), is_part=number < len(parts))


def _parts(text: str) -> list[str]:
    """A text in parts of some `PART` characters, with paragraphs whole."""
    parts = [""]
    for paragraph in re.split(r"(?<=\n)(?=\n)", text):
        if len(parts[-1]) >= PART:
            parts.append("")
        parts[-1] += paragraph
    return parts


def _format_row(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Example:
    if options.column is not None:
        if options.column not in row:
            raise DataError(f"{where}: no column {options.column!r} among {sorted(row)}. Name one of them: --column.")
        return _format_column(row[options.column], options.column, where, tokenizer, options)
    if fields := instruction_fields(row):
        return _format_instruction([string_in(row, name, where) for name in fields], where, tokenizer, options)
    column = first_field(row, (*MESSAGE_FIELDS, COLUMN))
    if column is None:
        raise DataError(
            f"{where}: no fields to train on among {sorted(row)}. Expected instruction and output (or response), "
            "messages, or text; a field of another name is read with --column NAME."
        )
    return _format_column(row[column], column, where, tokenizer, options)


def _format_column(
    value: object, column: str, where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Example:
    where = f"{where}: its {column!r}"
    if isinstance(value, str):
        return Example(value, ((0, len(value)),), where, is_document=True)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f"{where} is of type {type(value).__name__}, neither a text nor messages. Expected a string, or a list of "
            '{"role": "...", "content": "..."}.'
        )
    return _format_chat([_message(message, where) for message in value], where, tokenizer, options)


def _message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f'{where} has a message without text. Expected {{"role": "...", "content": "..."}}.')
    return {"role": ROLES.get(role, role), "content": content}


def _format_instruction(
    fields: list[str], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Example:
    instruction, context, answer = fields
    if options.template == "chat" or (options.template == "auto" and getattr(tokenizer, "chat_template", None)):
        prompt = f"{instruction}\n\n{context}" if context else instruction
        messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": answer}]
        return _format_chat(messages, where, tokenizer, options)
    prompt = (ALPACA_WITH_INPUT if context else ALPACA).format(instruction=instruction, input=context)
    text = prompt + answer
    return Example(text, ((len(prompt), len(text)),) if answer.strip() else (), where)


def _format_chat(
    messages: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Example:
    """Apply the chat template; an answer is what an assistant's message adds to the messages before it."""
    if options.template == "alpaca":
        raise DataError(
            f"{where} holds messages, which Alpaca's prompt has no place for. Use the tokenizer's: --template chat"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is to be put into the chat template, and the tokenizer has none. Use Alpaca's prompt for "
            "instructions (--template alpaca), or give it one: tokenizer.chat_template = ..."
        )

    text = in_template(messages, where, tokenizer)
    if options.loss_on == "all":
        return Example(text, ((0, len(text)),), where, add_special_tokens=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == ASSISTANT and message["content"].strip():
            before = in_template(messages[:i], where, tokenizer, prompt=True)
            after = in_template(messages[: i + 1], where, tokenizer)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: the chat template writes message {i + 1} otherwise when others follow, so it is not "
                    "known which tokens are the answer. Learn all tokens (--loss-on all), or split the chat."
                )
            spans.append((len(before), len(after)))
    return Example(text, tuple(spans), where, add_special_tokens=False)
