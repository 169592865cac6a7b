"""Files, folders and data sets -> rows with named fields, each with the place where it stands.

Files are UTF-8. A `.jsonl`, `.json` or `.parquet` file holds rows; any other file is plain text, and in a folder a row.
They lie here, or in a data set on the hub: `hf://datasets/OWNER/NAME/FILE`. Every other name is that of a data set on
the hub.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from secateur.data.calibration import DEMO
from secateur.errors import DataError, check_installed, one_line
from secateur.models.hub import hub_problem
from secateur.models.silence import quiet
from secateur.models.sources import hub_options

ROWS = (".jsonl", ".json", ".parquet")  # the endings of files that hold rows
HUB = "hf://"
HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")
# Names of the fields in Alpaca's, Dolly's and other data sets; the first that a row has is read.
INSTRUCTION_FIELDS = ("instruction", "prompt", "question")
INPUT_FIELDS = ("input", "context")
ANSWER_FIELDS = ("output", "response", "completion", "answer")


def read_documents(name_or_path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a `.jsonl`, `.json` or `.parquet` file or of a data set, each with the place where it stands.

    A data set is named `name` or `name:config`, and its split `train` is streamed. Of a folder each text file is a row,
    its `text`. Raises `DataError` for a file that is missing or damaged, a folder without text files, a data set that
    cannot be read, a package that is missing, and a row that is no object.
    """
    if is_data_set(name_or_path):
        rows = _data_set_rows(str(name_or_path))
    elif _is_folder(name_or_path):
        rows = _folder_rows(_expanded(name_or_path))
    else:
        path = existing_file(name_or_path)
        rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f'{where}: a JSON {type(row).__name__} is no row. Expected an object with fields: {{"text": "..."}}.'
            )
        yield where, row


def holds_documents(name_or_path: str | Path) -> bool:
    """Tell whether `read_documents` reads it; anything else is a file of plain text.

    >>> holds_documents("rows.jsonl"), holds_documents("book.txt"), holds_documents("organisation/set")
    (True, False, True)
    """
    return is_data_set(name_or_path) or Path(name_or_path).suffix.lower() in ROWS or _is_folder(name_or_path)


def first_field(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of these fields that a row has."""
    return next((name for name in names if name in row), None)


def instruction_fields(row: Mapping[str, Any]) -> tuple[str, str | None, str] | None:
    """The fields of a row's instruction, its input and its answer; None for a row of another kind.

    >>> instruction_fields({"prompt": "2 + 2 =", "response": "4"})
    ('prompt', None, 'response')
    """
    instruction, answer = first_field(row, INSTRUCTION_FIELDS), first_field(row, ANSWER_FIELDS)
    return None if instruction is None or answer is None else (instruction, first_field(row, INPUT_FIELDS), answer)


def string_in(row: Mapping[str, Any], name: str | None, where: str) -> str:
    """A field of a row as a string; without a name, or where it is null, the empty one."""
    value = None if name is None else row[name]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: its {name!r} is of type {type(value).__name__}, not a text. Expected a string.")
    return value or ""


def is_data_set(name_or_path: str | Path) -> bool:
    """Tell whether a string that is not an existing path may name a data set: `[organisation/]name[:config]`.

    >>> is_data_set("organisation/set"), is_data_set("book.txt")
    (True, False)
    """
    path = Path(name_or_path)
    if (
        isinstance(name_or_path, Path)
        or not name_or_path
        or name_or_path.startswith(HUB)
        or name_or_path.count("/") > 1
        or "\\" in name_or_path
    ):
        return False
    is_path = path.exists() or path.is_absolute() or name_or_path.startswith((".", "~"))
    return not is_path and path.suffix.lower() not in (*ROWS, ".txt", ".raw", ".md", ".text")


def _is_folder(name_or_path: str | Path) -> bool:
    return _expanded(name_or_path).is_dir()


def _expanded(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def existing_file(path: str | Path) -> Path:
    """The path of a file, with `~` expanded; one of a data set on the hub (`hf://datasets/...`) comes to the cache.

    Raises `DataError` when it is missing or a folder.
    """
    if str(path).startswith(HUB):
        return _downloaded(str(path))
    expanded = _expanded(path)
    if not expanded.exists():
        raise DataError(f"{str(path)!r}: no such file. Expected a text file, .jsonl, .json or .parquet, or {DEMO!r}.")
    if not expanded.is_file():
        raise DataError(f"{str(path)!r}: this is a folder. Expected one text file, .jsonl, .json or .parquet.")
    return expanded


def decoded(path: Path) -> str:
    """The text of a UTF-8 file. Raises `DataError` when it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark; newlines become \n
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r}: byte {error.start} is not UTF-8. Expected text in UTF-8; convert the file first."
        ) from error
    except OSError as error:
        raise DataError(f"{str(path)!r}: the file cannot be read ({error.strerror}).") from error


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, sorted, but for what is hidden."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _folder_rows(folder: Path) -> Iterator[tuple[str, object]]:
    """The text files of a folder and of those in it, in random order, so that the first are of all its parts.

    What is hidden, empty, not UTF-8 or holds rows itself is left out.
    """
    files = [path for path in visible_files(folder) if path.suffix.lower() not in ROWS]
    random.Random(0).shuffle(files)
    empty = True
    for path in files:
        try:
            text = decoded(path)
        except DataError:
            continue
        if text.strip() and "\0" not in text:
            empty = False
            yield str(path), {"text": text}
    if empty:
        raise DataError(
            f"{str(folder)!r}: there is no text file in this folder. Expected files in UTF-8 that are not hidden; "
            f"files of rows ({', '.join(ROWS)}) are named one by one."
        )


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """What a `.json` or `.jsonl` file holds, one after the other, each with the place where it stands."""
    if path.suffix.lower() == ".json" and not _is_object(next(filter(str.strip, _lines(path)), "")):
        try:
            whole = json.loads(decoded(path))
        except (ValueError, RecursionError):
            pass  # one object a line, as in .jsonl
        else:
            items = whole if isinstance(whole, list) else [whole]
            yield from ((f"{str(path)!r}, item {i}", item) for i, item in enumerate(items, start=1))
            return
    for number, line in enumerate(_lines(path), start=1):
        where = f"{str(path)!r}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: not JSON ({error}). Expected one object a line: {{"text": "..."}}.') from error
        yield where, item


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, one in memory at a time. Raises as `decoded` does."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except (UnicodeDecodeError, OSError):
        decoded(path)  # says what is wrong
        raise


def _is_object(line: str) -> bool:
    """Whether a line is a whole object of JSON."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a Parquet file, a part of it in memory at a time."""
    check_installed(DataError, "pyarrow", extra="data", what=f"{str(path)!r}: reading Parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{str(path)!r}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r}: not a readable Parquet file ({one_line(error)}).") from error


def _data_set_rows(name: str) -> Iterator[tuple[str, object]]:
    """The rows of a data set's split `train`, streamed: a few windows do not need a whole corpus on the disk."""
    check_installed(DataError, "datasets", extra="data", what=f"{name!r}: no such file, and a data set")
    import datasets

    try:
        repository, _, config = name.partition(":")
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name!r}, row {number}", row
    except Exception as error:  # whatever the hub, the network or the data set's format makes of it
        problem = hub_problem(error, f"datasets/{repository}")
        reason = problem or f"{one_line(error)}. Check the name and the network"
        raise DataError(
            f"{name!r}: no such file, and no data set of that name can be read; {reason}, or give a text file or "
            f"{DEMO!r}."
        ) from error


def _downloaded(uri: str) -> Path:
    """The file of a data set on the hub, in the hub's cache. Raises `DataError`."""
    parts = HUB_FILE.fullmatch(uri)
    if parts is None:
        raise DataError(
            f"{uri!r}: expected a file of a data set, hf://datasets/OWNER/NAME/FILE, with @REVISION behind NAME if one "
            "is meant; a whole data set is OWNER/NAME alone."
        )
    name = parts["name"]
    try:
        with quiet():
            path = hf_hub_download(
                name, parts["file"], repo_type="dataset", revision=parts["revision"], **hub_options()
            )
    except Exception as error:  # whatever the hub and the network make of it
        reason = hub_problem(error, f"datasets/{name}") or f"{one_line(error)}. Check the name and the network"
        raise DataError(f"{uri!r}: the file cannot be read; {reason}, or give a text file or {DEMO!r}.") from error
    return Path(path)
