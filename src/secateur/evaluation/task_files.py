r"""Local files of questions -> documents in the form in which lm-eval's own tasks expect them.

The seven tasks of LLM-Pruner's protocol can be run without a network, from a folder of public files. Each reader below
turns one format into the schema of the data set on the hub; prompts, choices and scores stay lm-eval's. Formats:

- `*_requests.jsonl.gz`: one line for every question and choice, as AI2's evaluation suites publish them. `doc` is the
  question. The first line of a question counts (ARC: of each `doc["id"]`; others: of each `doc_id`), since a question
  comes once for each choice, and in some files a second time with a bare prompt.
- `*.jsonl` with `query`, `choices` and `gold`, as in MosaicML's evaluation suite, and PIQA and HellaSwag as published.
- `hellaswag_val_full.txt.bz2`: six lines a question, of which the WikiHow markers have been removed.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import TaskError

Document = dict[str, Any]
LABELS = "ABCDEFGHIJ"
UNTITLED = "its passages have no titles, so prompts are shorter than lm-eval's"
TRIMMED = "its solutions have lost spaces at their ends, so some scores differ from lm-eval's"
HELLASWAG_SUBSET = (
    "a subset in the original form, nine in ten of it on videos: no uniform sample of the 10,042 questions"
)
HELLASWAG_STRIPPED = (
    "a preprocessed copy: endings of WikiHow questions have lost a space at their start, so some scores differ from "
    "lm-eval's"
)


@dataclass(frozen=True, slots=True)
class Source:
    """Files that hold a task's questions, how they are read, and what to know about them.

    >>> LOCAL["arc_easy"].sources[0].files
    ('arc_easy_test_rc_5shot_requests.jsonl.gz',)
    """

    files: tuple[str, ...]
    read: Callable[..., list[Document]]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task that local files can feed: lm-eval's name for it, where its configuration lies, and files by preference.

    >>> LOCAL["boolq"].task
    'boolq'
    """

    task: str
    folder: str  # of lm-eval's package `tasks`
    sources: tuple[Source, ...]


def find_source(name: str, folder: Path) -> tuple[Source, list[Path]]:
    """The first source of a local task whose files are all in the folder or in its folder `eval`.

    Raises `TaskError` where there is none, naming the files.

    >>> find_source("winogrande", Path("no-such-folder"))
    Traceback (most recent call last):
    secateur.errors.TaskError: winogrande: 'no-such-folder' is no folder. ...
    """
    if not folder.is_dir():
        raise TaskError(
            f"{name}: {str(folder)!r} is no folder. Expected one with the questions: --tasks-data FOLDER, or leave it "
            "out to fetch them"
        )
    for source in LOCAL[name].sources:
        for base in (folder, folder / "eval"):
            paths = [base / file for file in source.files]
            if all(path.is_file() for path in paths):
                return source, paths
    wanted = ", or ".join(" with ".join(source.files) for source in LOCAL[name].sources)
    raise TaskError(
        f"{name}: its questions are not in {str(folder)!r}. Expected there: {wanted}. Without --tasks-data they are "
        "fetched from the hub"
    )


def read_source(source: Source, paths: Sequence[Path]) -> list[Document]:
    """Read all documents of a source. Raises `TaskError` for a file that cannot be read, or has none, or odd ones.

    >>> read_source(LOCAL["boolq"].sources[1], [Path("boolq.jsonl")])
    Traceback (most recent call last):
    secateur.errors.TaskError: boolq.jsonl cannot be read (FileNotFoundError: ...). Expected a copy of the public file.
    """
    where = paths[0]
    try:
        documents = source.read(*paths)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # the first three when unpacking; JSON, UTF-8 and ours
        told = " ".join(str(error).split())
        raise TaskError(
            f"{where} cannot be read ({type(error).__name__}: {told}). Expected a copy of the public file."
        ) from error
    except (KeyError, IndexError, TypeError) as error:
        raise TaskError(
            f"{where}: a question lacks what is expected of it ({type(error).__name__}: {error}). Expected a copy of "
            "the public file."
        ) from error
    if not documents:
        raise TaskError(f"{where}: there are no questions in it. Expected a copy of the public file.")
    return documents


# --- readers ----------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, unpacked, without what ends them."""
    unpacked: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress}
    text = unpacked.get(path.suffix, bytes)(path.read_bytes()).decode("utf-8")
    yield from text.removesuffix("\n").split("\n")  # str.splitlines knows ten other ends of a line


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    for line in _lines(path):
        if line.strip():
            yield json.loads(line)


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    """The questions of a file of requests, each once."""
    seen = set()
    for line in _objects(path):
        doc = line["doc"]
        key = doc.get("id", line["doc_id"])
        if key not in seen:
            seen.add(key)
            yield doc


def _between(text: str, start: str, end: str) -> str:
    """What stands between a start and an end that must be there."""
    if not text.startswith(start) or not text.endswith(end) or len(text) < len(start) + len(end):
        raise ValueError(f"{text[:60]!r} does not begin with {start!r} and end with {end!r}")
    return text[len(start) : len(text) - len(end)]


def _boolq(path: Path) -> list[Document]:
    documents = []
    for number, doc in enumerate(_questions(path)):
        passage, question = _passage_and_question(_between(doc["query"], "", "?\nAnswer:"))
        documents.append(_yes_or_no(number, passage, question, doc))
    return documents


def _boolq_untitled(path: Path) -> list[Document]:
    documents = []
    for number, doc in enumerate(_objects(path)):
        passage, question = _passage_and_question(_between(doc["query"].rstrip(), "Passage: ", "?"))
        documents.append(_yes_or_no(number, passage, question, doc))
    return documents


def _passage_and_question(text: str) -> tuple[str, str]:
    passage, mark, question = text.rpartition("\nQuestion: ")
    if not mark:
        raise ValueError(f"{text[-60:]!r} has no question")
    return passage, question


def _yes_or_no(number: int, passage: str, question: str, doc: dict[str, Any]) -> Document:
    answer = doc["choices"][doc["gold"]].strip()
    return {"question": question, "passage": passage, "idx": number, "label": ["no", "yes"].index(answer)}


def _arc(path: Path) -> list[Document]:
    return [
        {"id": doc["id"], "question": _between(doc["query"], "Question: ", "\nAnswer:"), **_labelled(doc)}
        for doc in _questions(path)
    ]


def _openbookqa(path: Path) -> list[Document]:
    return [
        {"id": str(number), "question_stem": doc["query"], **_labelled(doc)}
        for number, doc in enumerate(_objects(path))
    ]


def _labelled(doc: dict[str, Any]) -> Document:
    choices = list(doc["choices"])
    labels = list(LABELS[: len(choices)])
    return {"choices": {"text": choices, "label": labels}, "answerKey": labels[doc["gold"]]}


def _piqa(questions: Path, answers: Path) -> list[Document]:
    labels = [int(line) for line in _lines(answers) if line.strip()]
    return [
        {"goal": doc["goal"], "sol1": doc["sol1"], "sol2": doc["sol2"], "label": label}
        for doc, label in zip(_objects(questions), labels, strict=True)
    ]


def _piqa_queries(path: Path) -> list[Document]:
    return [
        {
            "goal": _between(doc["query"], "Question: ", "\n"),
            "sol1": doc["choices"][0],
            "sol2": doc["choices"][1],
            "label": int(doc["gold"]),
        }
        for doc in _objects(path)
    ]


def _winogrande(path: Path) -> list[Document]:
    return [{name: doc[name] for name in ("sentence", "option1", "option2", "answer")} for doc in _questions(path)]


def _winogrande_contexts(path: Path) -> list[Document]:
    """Sentences up to the end of either option, and what follows: the gap is put before all of it."""
    return [
        {
            "sentence": f"_ {doc['continuation']}",
            "option1": doc["context_options"][0],
            "option2": doc["context_options"][1],
            "answer": str(int(doc["gold"]) + 1),
        }
        for doc in _objects(path)
    ]


def _hellaswag(path: Path) -> list[Document]:
    names = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type")
    return [{**{name: doc[name] for name in names}, "label": str(doc["label"])} for doc in _objects(path)]


# What begins with a small letter after the end of a sentence: the start of the sentence that is to be continued.
_FRAGMENT = re.compile(r"(.*[.!?\"')])\s+([^A-Z\s][^.!?]*)", re.DOTALL)


def _hellaswag_text(path: Path) -> list[Document]:
    """Contexts are taken apart again where they end in a fragment, of which lm-eval then makes a capital."""
    lines = list(_lines(path))
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are not six for every question")
    documents = []
    for number, first in enumerate(range(0, len(lines), 6)):
        label, mark, context = lines[first].partition(": ")
        if not mark:
            raise ValueError(f"line {first + 1} has no activity before a colon: {lines[first][:60]!r}")
        fragment = None if context.startswith("How to ") else _FRAGMENT.fullmatch(context)
        before, after = fragment.groups() if fragment else (context, "")
        documents.append(
            {
                "ind": number,
                "activity_label": label,
                "ctx_a": before,
                "ctx_b": after,
                "endings": lines[first + 2 : first + 6],
                "label": str(int(lines[first + 1])),
            }
        )
    return documents


_FULL_HELLASWAG = Source(("hellaswag_val_full.txt.bz2",), _hellaswag_text, HELLASWAG_STRIPPED)

# Name -> the task. The first source that is there is taken: those that give lm-eval's prompts exactly come first.
LOCAL = {
    "boolq": LocalTask(
        "boolq",
        "super_glue/boolq",
        (Source(("boolq_rc_0shot_requests.jsonl.gz",), _boolq), Source(("boolq.jsonl",), _boolq_untitled, UNTITLED)),
    ),
    "piqa": LocalTask(
        "piqa",
        "piqa",
        (
            Source(("piqa_original/valid.jsonl", "piqa_original/valid-labels.lst"), _piqa),
            Source(("piqa.jsonl",), _piqa_queries, TRIMMED),
        ),
    ),
    "hellaswag": LocalTask(
        "hellaswag",
        "hellaswag",
        (Source(("hellaswag_val_1000_original.jsonl",), _hellaswag, HELLASWAG_SUBSET), _FULL_HELLASWAG),
    ),
    "hellaswag_full": LocalTask("hellaswag", "hellaswag", (_FULL_HELLASWAG,)),
    "winogrande": LocalTask(
        "winogrande",
        "winogrande",
        (
            Source(("winogrande_rc_0shot_requests.jsonl.gz",), _winogrande),
            Source(("winogrande.jsonl",), _winogrande_contexts),
        ),
    ),
    "arc_easy": LocalTask("arc_easy", "arc", (Source(("arc_easy_test_rc_5shot_requests.jsonl.gz",), _arc),)),
    "arc_challenge": LocalTask(
        "arc_challenge", "arc", (Source(("arc_challenge_test_rc_5shot_requests.jsonl.gz",), _arc),)
    ),
    "openbookqa": LocalTask("openbookqa", "openbookqa", (Source(("openbook_qa.jsonl",), _openbookqa),)),
}
