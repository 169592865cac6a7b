"""lm-eval's own tasks over local documents: read here a second time, and independently of the package.

`HUB` gives, for each of the seven tasks, the rows that `datasets.load_dataset` would return, in the schema of the data
set on the hub. `own_results` puts them in its place and lets `lm_eval.simple_evaluate` run the task by its name.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import lm_eval.tasks

Rows = list[dict[str, Any]]


def lines(path: Path) -> Iterator[Any]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return (json.loads(line) for line in text.decode().split("\n") if line)


def first_of(path: Path, key: Callable[[Any], Any]) -> list[Any]:
    """The first line of every question."""
    found: dict[Any, Any] = {}
    for line in lines(path):
        found.setdefault(key(line), line)
    return list(found.values())


def boolq(folder: Path) -> Rows:
    rows = []
    for line in first_of(folder / "boolq_rc_0shot_requests.jsonl.gz", lambda line: line["doc_id"]):
        doc = line["doc"]
        passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
        rows.append(
            {"passage": passage, "question": question, "idx": 0, "label": int(doc["choices"][doc["gold"]] == "yes")}
        )
    return rows


def piqa(folder: Path) -> Rows:
    labels = (folder / "piqa_original" / "valid-labels.lst").read_text().split()
    docs = lines(folder / "piqa_original" / "valid.jsonl")
    return [doc | {"label": int(label)} for doc, label in zip(docs, labels, strict=True)]


def hellaswag(folder: Path) -> Rows:
    return [doc | {"label": str(doc["label"])} for doc in lines(folder / "hellaswag_val_1000_original.jsonl")]


def winogrande(folder: Path) -> Rows:
    found = first_of(folder / "winogrande_rc_0shot_requests.jsonl.gz", lambda line: line["doc_id"])
    return [line["doc"] for line in found]


def arc(name: str) -> Callable[[Path], Rows]:
    def read(folder: Path) -> Rows:
        found = first_of(folder / f"{name}_test_rc_5shot_requests.jsonl.gz", lambda line: line["doc"]["id"])
        return [
            {
                "id": doc["id"],
                "question": doc["query"].split("Question: ", 1)[1].rsplit("\nAnswer:", 1)[0],
                "choices": {"text": doc["choices"], "label": [str(i) for i, _ in enumerate(doc["choices"], start=1)]},
                "answerKey": str(doc["gold"] + 1),
            }
            for doc in (line["doc"] for line in found)
        ]

    return read


def openbookqa(folder: Path) -> Rows:
    return [
        {
            "question_stem": doc["query"],
            "choices": {"text": doc["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[doc["gold"]],
        }
        for doc in lines(folder / "openbook_qa.jsonl")
    ]


# Task -> the data set's path on the hub, its configuration, and the rows.
HUB: dict[str, tuple[str, str | None, Callable[[Path], Rows]]] = {
    "boolq": ("aps/super_glue", "boolq", boolq),
    "piqa": ("baber/piqa", None, piqa),
    "hellaswag": ("Rowan/hellaswag", None, hellaswag),
    "winogrande": ("allenai/winogrande", "winogrande_xl", winogrande),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", arc("arc_easy")),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", arc("arc_challenge")),
    "openbookqa": ("allenai/openbookqa", "main", openbookqa),
}


def own_task(name: str, rows: Rows) -> Any:
    """lm-eval's task of that name, from its own file and unchanged, over these rows."""
    path, config, _ = HUB[name]

    def load_dataset(path_asked: str, name_asked: str | None = None, **_: Any) -> datasets.DatasetDict:
        assert (path_asked, name_asked) == (path, config)
        documents = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(train=documents.select([]), validation=documents, test=documents)

    home = Path(lm_eval.tasks.__file__).parent / {"boolq": "super_glue/boolq"}.get(name, name.split("_")[0])
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(home))
    with mock.patch("datasets.load_dataset", lambda path, name=None, **options: load_dataset(path, name, **options)):
        return manager.load([name])["tasks"][name]


def own_results(name: str, rows: Rows, model: Any, *, limit: int) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` makes of it."""
    task = own_task(name, rows)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # asks every program of the machine for its version
        found: dict[str, Any] = lm_eval.simple_evaluate(model, tasks=[task], limit=limit, task_manager=manager)
    return found
