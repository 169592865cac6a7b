"""Files and tokenizers -> evaluation texts as tokens, with the UTF-8 bytes that each token stands for.

Tensor names end in their axes: T token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.rows import Rows
from secateur.data.text import demo_texts, read_rows
from secateur.data.windows import start_tokens
from secateur.errors import DataError, check_least

DEMO_TEXT = "python reference"  # the name of the text that is read where none is given


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """A text as tokens, and for each token how many UTF-8 bytes of the text it and all before it stand for."""

    ids_T: Tensor  # int64
    byte_ends_T: Tensor  # int64, never falling
    start_T: Tensor  # int64, what the tokenizer puts before a text; `ids_T` begins with it


def read_evaluation_text(path: Path | str) -> str:
    """Read the rows of a file and join them with a blank line, as LLM-Pruner and most perplexity tables do.

    Raises DataError where `read_rows` does: the file is missing, empty or of an unknown format.
    """
    return "\n\n".join(read_rows(path))


def read_texts(named: Sequence[str], *, option: str = "--ppl") -> dict[str, str]:
    """Read texts given as NAME=FILE; returns name -> text.

    Without any, the half of Python's language reference that calibration does not read. Errors name the `option` that
    the texts were given with. Raises `DataError` for another form, a name that comes twice, and where
    `read_evaluation_text` does.
    """
    if not named:
        return {DEMO_TEXT: demo_texts()[1]}
    texts: dict[str, str] = {}
    for item in named:
        name, _, file = item.partition("=")
        if not name or not file:
            raise DataError(f"{option} {item}: expected NAME=FILE, for example {option} wikitext2=wiki.test.raw")
        if name in texts:
            raise DataError(f"{option} {item}: {name} is the name of another text already; give each its own")
        texts[name] = read_evaluation_text(file)
    return texts


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int | None = None) -> Tensor:
    """Tokenize a whole text in one call, with the tokenizer's usual special tokens; returns ids_T, int64, on the CPU.

    Only the first `max_tokens` are returned (None: all). Raises DataError if `max_tokens` is below 1.

    >>> def bytes_tokenizer(text, **_):
    ...     return {"input_ids": list(text.encode())}
    >>> encode(bytes_tokenizer, "prune", max_tokens=3)
    tensor([112, 114, 117])
    """
    check_least(DataError, "max_tokens", max_tokens, 1, 40_000)
    # verbose=False: a text is longer than the model reads at once, and we cut it into windows ourselves
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int | None = None) -> EncodedText:
    """Tokenize as `encode` does, and find where in the text's UTF-8 bytes every token ends.

    What no token covers (white space, with some tokenizers) belongs to the next token, and a character that is split
    over several tokens to the first of them. A tokenizer written in Python has no offsets: its tokens then stand for as
    many bytes each as the text has per token.

    >>> def words(text, **_):
    ...     return {"input_ids": [1, 2], "offset_mapping": [(0, 3), (4, 8)]}
    >>> words.is_fast = True
    >>> encode_text(words, "one d\u00e9ux").byte_ends_T
    tensor([3, 9])
    """
    check_least(DataError, "max_tokens", max_tokens, 1, 40_000)
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids_T = torch.tensor(encoding["input_ids"], dtype=torch.int64)
        ends_T = _byte_ends(text, [end for _, end in encoding["offset_mapping"]])
    else:
        ids_T = encode(tokenizer, text)
        size = len(text.encode(errors="surrogatepass"))
        ends_T = torch.arange(1, len(ids_T) + 1, dtype=torch.int64) * size // max(len(ids_T), 1)
    return EncodedText(ids_T[:max_tokens], ends_T[:max_tokens], start_tokens(tokenizer))


def _byte_ends(text: str, ends: Sequence[int]) -> Tensor:
    """Offsets in characters -> the largest so far, in UTF-8 bytes."""
    bytes_so_far, position, size = [], 0, 0
    for end in ends:
        if end > position:
            size += len(text[position:end].encode(errors="surrogatepass"))
            position = end
        bytes_so_far.append(size)
    return torch.tensor(bytes_so_far, dtype=torch.int64)


def first_bytes(text: str, size: int) -> str:
    r"""The text up to so many UTF-8 bytes, whole characters alone.

    >>> first_bytes("d\u00e9ux", 2), first_bytes("d\u00e9ux", 3)
    ('d', 'd\xe9')
    """
    return text.encode(errors="surrogatepass")[:size].decode(errors="ignore")


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Tokens as the text that they stand for, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode_rows(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Iterator[str]:
    """The text of every row."""
    return (decode(tokenizer, rows.ids_T[rows.slice_of(row)].tolist()) for row in range(len(rows)))
