"""Local files with questions -> rows in the schema of the hub's data set, which lm-eval's own task then reads.

Prompts, choices and scores stay lm-eval's: only the data set of a task is replaced. Three formats are read:

- `*_requests.jsonl.gz`: a line for every question and choice, as AI2's evaluation suites publish them. `doc` is the
  question; its first line counts, because some files repeat the questions with another prompt.
- `*.jsonl`: a line for every question, with the fields of the hub or with `query`, `choices` and `gold`.
- `hellaswag_val_full.txt.bz2`: six lines for every question.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import TaskError, one_line

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Files with the questions of a task."""

    files: tuple[str, ...]
    """The questions; a second file has a label on each line."""

    row: Callable[[Row], Row] = dict
    """A question of the file -> a row in the hub's schema."""

    note: str | None = None
    """How the questions differ from lm-eval's own data set."""


def find_files(name: str, folder: Path) -> list[Path]:
    """The files of a local task, in the folder or in its folder `eval`. Raises `TaskError` naming what is missing."""
    if not folder.is_dir():
        raise TaskError(
            f"{name}: {str(folder)!r} is not a folder. Expected one with the questions: --tasks-data FOLDER, or leave "
            "it out to fetch them"
        )
    files = LOCAL[name].files
    for base in (folder, folder / "eval"):
        paths = [base / file for file in files]
        if all(path.is_file() for path in paths):
            return paths
    raise TaskError(
        f"{name}: its questions are not in {str(folder)!r}. Expected there: {' with '.join(files)}. Without "
        "--tasks-data they are fetched from the hub"
    )


def read_rows(source: Source, paths: Sequence[Path]) -> list[Row]:
    """Read all questions of a source as rows of the hub's data set.

    Raises `TaskError` for a file that cannot be read, has no questions, or questions of another form.
    """
    try:
        questions = _six_lines(paths[0]) if ".txt" in paths[0].suffixes else _questions(paths[0])
        if len(paths) > 1:
            labels = [int(line) for line in _lines(paths[1])]
            questions = [{**question, "label": label} for question, label in zip(questions, labels, strict=True)]
        rows = [source.row(question) for question in questions]
    # unpacking; JSON and UTF-8 (both are ValueErrors); lists in lists without end; fields that a question lacks
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise TaskError(f"{paths[0]} cannot be read ({one_line(error)}). Expected a copy of the public file") from error
    if not rows:
        raise TaskError(f"{paths[0]}: it has no questions. Expected a copy of the public file")
    return rows


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not blank, unpacked."""
    unpack: Callable[[bytes], bytes] = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(path.suffix, bytes)
    # str.splitlines would split at ten other characters, too
    return [line for line in unpack(path.read_bytes()).decode().split("\n") if line.strip()]


def _questions(path: Path) -> Iterable[Row]:
    """The questions of a file with one on each line, or of a file of requests, each once."""
    found: dict[Any, Row] = {}
    for number, line in enumerate(map(json.loads, _lines(path))):
        question = line.get("doc", line)
        found.setdefault(question.get("id", line.get("doc_id", number)), question)
    return found.values()


def _six_lines(path: Path) -> Iterable[Row]:
    lines = _lines(path)
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are not six for every question")
    starts = range(0, len(lines), 6)
    return [{"context": lines[i], "label": int(lines[i + 1]), "endings": lines[i + 2 : i + 6]} for i in starts]


def _fields(pattern: str, text: str) -> Row:
    match = re.fullmatch(pattern, text, re.DOTALL)
    if match is None:
        raise ValueError(f"{text[:60]!r} does not match {pattern!r}")
    return match.groupdict()


def _boolq(question: Row) -> Row:
    passage = _fields(r"(?P<passage>.*)\nQuestion: (?P<question>.*)\?\nAnswer:", question["query"])
    return {**passage, "label": ["no", "yes"].index(question["choices"][question["gold"]])}


def _arc(question: Row) -> Row:
    return {**_fields(r"Question: (?P<question>.*)\nAnswer:", question["query"]), **_choices(question)}


def _openbookqa(question: Row) -> Row:
    return {"question_stem": question["query"], **_choices(question)}


def _choices(question: Row) -> Row:
    labels = list("ABCDEFGHIJ"[: len(question["choices"])])
    return {"choices": {"text": question["choices"], "label": labels}, "answerKey": labels[question["gold"]]}


def _hellaswag_text(question: Row) -> Row:
    """lm-eval capitalises the fragment that ends a context: what begins in lower case after the end of a sentence."""
    activity = _fields(r"(?P<activity_label>.*?): (?P<ctx_a>.*)", question["context"])
    fragment = re.fullmatch(r"(.*[.!?\"')])\s+([^A-Z\s][^.!?]*)", activity["ctx_a"], re.DOTALL)
    if fragment is None or activity["ctx_a"].startswith("How to "):  # WikiHow: no fragment to continue
        return {**question, **activity, "ctx_b": ""}
    return {**question, **activity, "ctx_a": fragment[1], "ctx_b": fragment[2]}


# Name -> where its questions are. All give lm-eval's prompts exactly but for what a note says.
LOCAL = {
    "boolq": Source(("boolq_rc_0shot_requests.jsonl.gz",), _boolq),
    "piqa": Source(("piqa_original/valid.jsonl", "piqa_original/valid-labels.lst")),
    "hellaswag": Source(
        ("hellaswag_val_1000_original.jsonl",),
        note="a subset in the original form, nine in ten of it on videos: not a uniform sample of the 10,042 questions",
    ),
    "hellaswag_full": Source(
        ("hellaswag_val_full.txt.bz2",),
        _hellaswag_text,
        "a preprocessed copy: endings of WikiHow questions have lost a space at their start, so some scores differ "
        "from lm-eval's",
    ),
    "winogrande": Source(("winogrande_rc_0shot_requests.jsonl.gz",)),
    "arc_easy": Source(("arc_easy_test_rc_5shot_requests.jsonl.gz",), _arc),
    "arc_challenge": Source(("arc_challenge_test_rc_5shot_requests.jsonl.gz",), _arc),
    "openbookqa": Source(("openbook_qa.jsonl",), _openbookqa),
}
