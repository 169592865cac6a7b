"""A row of a file or data set -> the same in words, and which characters of it are answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import COLUMN, DEMO
from secateur.data.documents import holds_documents, read_documents
from secateur.data.options import DataOptions
from secateur.data.text import MESSAGES, read_calibration
from secateur.errors import DataError, one_line

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
# What the fields of instructions are called in Alpaca's, Dolly's and other data sets, the first that is there.
QUESTIONS = ("instruction", "prompt", "question")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
CHATS = (MESSAGES, "conversations")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # others are as they are
ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Sample:
    """One row in words."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters of answers, from and to
    where: str
    special: bool = True  # whether special tokens are to be added; a chat template has written its own
    document: bool = False  # what does not fit into a row goes into further ones


def samples_of(name: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Iterator[Sample]:
    """The rows of a source in words; of a plain text the whole is one."""
    if name == DEMO or not holds_documents(name):
        if options.column is not None:
            raise DataError(
                f"{name!r}: column={options.column!r} names a field of rows, and this is one text. Leave it out, or "
                "give a .jsonl, .json or .parquet file."
            )
        text = read_calibration(name)
        assert isinstance(text, str)
        yield Sample(text, ((0, len(text)),), repr(name), document=True)
        return
    for number, (where, row) in enumerate(read_documents(name)):
        if number == options.samples:
            return
        yield _in_words(row, where, tokenizer, options)


def _in_words(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Sample:
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
) -> Sample:
    where = f"{where}: its {column!r}"
    if isinstance(value, str):
        return Sample(value, ((0, len(value)),), where, document=True)
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
) -> Sample:
    if options.template == "chat":
        asked = f"{question}\n\n{context}" if context else question
        messages = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": answer}]
        return _chat(messages, where, tokenizer, options)
    prompt = (ALPACA_WITH_INPUT if context else ALPACA).format(instruction=question, input=context)
    text = prompt + answer
    return Sample(text, ((len(prompt), len(text)),) if answer.strip() else (), where)


def _chat(
    messages: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Sample:
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
            raise DataError(
                f"{where}: the chat template does not take it ({one_line(error)}). Mend the messages."
            ) from error

    text = written(len(messages))
    if options.loss_on == "all":
        return Sample(text, ((0, len(text)),), where, special=False)
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
    return Sample(text, tuple(spans), where, special=False)
