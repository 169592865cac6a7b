r"""Text -> batches of tokens: `demo`, a file or a data set becomes the windows that scores and repairs look at.

Files are UTF-8. A `.jsonl`, `.json` or `.parquet` file holds documents, one `text` each; any other file is plain text.
`read_rows` gives a file's rows as the perplexity protocol wants them, `read_calibration` gives what windows are taken
from, and `sample_windows` takes them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.errors import DataError

DEMO = "demo"
MAX_CHARACTERS = 2_000_000  # of a calibration text; a few seconds of tokenising, and far more than windows need

_EXTRA = "pip install 'secateur[data]'"


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which text to calibrate on, and how much of it; LLM-Pruner takes 10 windows of 64 tokens.

    >>> CalibrationOptions(samples=0)
    Traceback (most recent call last):
    secateur.errors.DataError: samples=0 is too small. Expected at least 1: CalibrationOptions(samples=64).
    """

    text: str = DEMO  # demo, a file or the name of a data set
    samples: int = 64  # windows
    length: int = 128  # tokens per window
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text:
            raise DataError("text='' names no text. Expected demo, a file or a data set: CalibrationOptions('demo').")
        # A window of one token predicts nothing.
        for name, value, least, good in (
            ("samples", self.samples, 1, 64),
            ("length", self.length, 2, 128),
            ("seed", self.seed, 0, 0),
        ):
            if value < least:
                raise DataError(
                    f"{name}={value} is too small. Expected at least {least}: CalibrationOptions({name}={good})."
                )


def demo_texts() -> tuple[str, str]:
    """Return a calibration text and an evaluation text that every Python has: its own language reference.

    The topics of `pydoc_data.topics`, by name: those at even places are for calibration, those at odd places for
    evaluation. A text that stands under several names counts once, so the halves share none. The wording differs
    between Python versions, therefore results name the version or the `digest` of the tokens.

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
    rows = _documents(path) if _holds_documents(path) else _text_rows(_decoded(path))
    if not any(row.strip() for row in rows):
        raise DataError(f"{str(path)!r}: there is no text in it. Expected rows of text in UTF-8.")
    return rows


def read_calibration(name_or_path: str | Path) -> str | list[str]:
    """Read what calibration windows are taken from: one text, or documents that no window crosses.

    `demo` is the calibration half of `demo_texts`. A plain text file is one text; a file of documents is a list of
    them; any other name is a data set on the hub, of which the `text` column of the split `train` is read up to
    `MAX_CHARACTERS`. Raises `DataError` as `read_rows` does, and for a data set that cannot be read.

    >>> isinstance(read_calibration("demo"), str)
    True
    """
    if name_or_path == DEMO:
        return demo_texts()[0]
    if isinstance(name_or_path, str) and _is_data_set_name(name_or_path):
        return _data_set(name_or_path)
    path = _existing(name_or_path)
    if _holds_documents(path):
        return read_rows(path)
    text = _decoded(path)
    if not text.strip():
        raise DataError(f"{str(path)!r}: there is no text in it. Expected text in UTF-8.")
    return text


def read_text(name_or_path: str | Path) -> str:
    """Read a calibration text as `read_calibration` does, with documents joined by a blank line.

    >>> read_text("demo") == demo_texts()[0]
    True
    """
    text = read_calibration(name_or_path)
    return text if isinstance(text, str) else "\n\n".join(text)


def sample_windows(
    text_or_documents: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
) -> Tensor:
    """Take `options.samples` random windows of `options.length` tokens; returns int64 ids, samples x length.

    In one text every place is equally likely. Of documents, first a document that is long enough is drawn and then a
    place in it, as LLM-Pruner does. No window is drawn twice, no special tokens are added, and only the first
    `MAX_CHARACTERS` are looked at. The same text, tokenizer and options give the same windows. Raises `DataError` when
    the text is shorter than a window or has fewer places than samples.

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
    places = sum(len(ids) - length + 1 for ids in usable)
    if places < samples:
        raise DataError(
            f"tiny calibration text: {sum(map(len, usable))} tokens hold {places} different windows of {length}, but "
            f"{samples} samples need as many. Expected a longer text, or fewer: CalibrationOptions(samples={places})."
        )
    chooser = random.Random(options.seed)
    chosen: dict[tuple[int, int], None] = {}  # document and start, in the order drawn
    while len(chosen) < samples:
        document = chooser.randrange(len(usable))
        start = chooser.randrange(len(usable[document]) - length + 1)
        chosen[document, start] = None
    return torch.tensor([usable[document][start : start + length] for document, start in chosen], dtype=torch.int64)


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


def _documents(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return _parquet_texts(path)
    text = _decoded(path)
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
        except ValueError:
            pass  # one object a line, as in .jsonl
        else:
            items = whole if isinstance(whole, list) else [whole]
            return [_text_of(item, f"{str(path)!r}, item {i}") for i, item in enumerate(items, start=1)]
    documents = []
    for number, line in enumerate(io.StringIO(text), start=1):
        where = f"{str(path)!r}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DataError(f'{where}: not JSON ({error}). Expected one object a line: {{"text": "..."}}.') from error
        documents.append(_text_of(item, where))
    return documents


def _text_of(item: object, where: str) -> str:
    expected = 'Expected an object with a text: {"text": "..."}.'
    if not isinstance(item, dict):
        raise DataError(f"{where}: a JSON {type(item).__name__} is no document. {expected}")
    if "text" not in item:
        raise DataError(f"{where}: no field 'text' among its keys {sorted(item)}. {expected}")
    if not isinstance(item["text"], str):
        raise DataError(f"{where}: its 'text' is of type {type(item['text']).__name__}, not a string. {expected}")
    return item["text"]


def _parquet_texts(path: Path) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{str(path)!r}: reading Parquet needs pyarrow. Run: {_EXTRA}")
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        if "text" not in columns:
            raise DataError(f"{str(path)!r}: no column 'text' among {sorted(columns)}. Expected a column of texts.")
        values = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r}: not a readable Parquet file ({_in_one_line(error)}).") from error
    return [_text_of({"text": value}, f"{str(path)!r}, row {number}") for number, value in enumerate(values, start=1)]


def _is_data_set_name(name: str) -> bool:
    """Tell whether a string that is not an existing path may name a data set: `name` or `organisation/name`."""
    path = Path(name)
    is_path = path.exists() or path.is_absolute() or name.startswith((".", "~")) or "\\" in name
    return bool(name) and not is_path and name.count("/") <= 1 and not _has_file_suffix(path)


def _has_file_suffix(path: Path) -> bool:
    return _holds_documents(path) or path.suffix.lower() in (".txt", ".raw", ".md", ".text")


def _data_set(name: str) -> list[str]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{name!r}: no such file, and the name of a data set needs the package datasets. Run: {_EXTRA}, or give a "
            f"text file or {DEMO!r}."
        )
    import datasets

    documents: list[str] = []
    try:
        size = 0
        # Streamed, since a window or two do not need a whole corpus on disk.
        for number, item in enumerate(datasets.load_dataset(name, split="train", streaming=True), start=1):
            documents.append(_text_of(item, f"{name!r}, row {number}"))
            size += len(documents[-1])
            if size >= MAX_CHARACTERS:
                break
    except DataError:
        raise
    except Exception as error:  # whatever the hub, the network or the data set's format makes of it
        raise DataError(
            f"{name!r}: no such file, and no data set of that name can be read ({_in_one_line(error)}). Check the name "
            f"and the network, or give a text file or {DEMO!r}."
        ) from error
    return documents


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


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
