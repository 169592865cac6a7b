"""Local files give the questions that lm-eval's own tasks ask: every question once, word by word."""

from __future__ import annotations

import bz2
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lm_eval_reference import HUB, lines, own_task
from question_files import write_questions
from secateur.errors import TaskError
from secateur.evaluation.local_tasks import LOCAL, find_files, read_rows
from secateur.evaluation.task_results import LLM_PRUNER_TASKS
from secateur.evaluation.tasks import load_tasks


@pytest.fixture(scope="module")
def public_data() -> Path:
    """The folder with the public files, which are not in this repository."""
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA names no folder with the public files")
    return Path(folder) / "eval"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@functools.cache
def requests_of(name: str, folder: Path) -> list[list[tuple[str, str]]]:
    """Prompts and choices of all documents of our task."""
    return built(next(iter(load_tasks([name], folder=folder)[0].loaded["tasks"].values())))


def built(task: Any) -> list[list[tuple[str, str]]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    found: dict[int, list[tuple[str, str]]] = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request.args)
    return [found[number] for number in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LLM_PRUNER_TASKS)
def test_all_public_questions_are_asked_as_lm_eval_asks_them(name: str, public_data: Path) -> None:
    assert requests_of(name, public_data) == built(own_task(name, HUB[name][2](public_data)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["boolq", "winogrande"])
def test_prompts_are_those_that_the_public_files_give_ready_made(name: str, public_data: Path) -> None:
    file = public_data / LOCAL[name].files[0]
    made = sorted(tuple(map(str.strip, line["request"].values())) for line in lines(file))
    ours = sorted(tuple(map(str.strip, asked)) for requests in requests_of(name, public_data) for asked in requests)
    assert ours == made


@pytest.mark.slow
def test_contexts_of_the_stripped_hellaswag_are_put_together_again(public_data: Path) -> None:
    def key(endings: Sequence[str]) -> str:
        return "".join("".join(endings).split())

    full = {key([choice for _, choice in asked]): asked for asked in requests_of("hellaswag_full", public_data)}
    exact = requests_of("hellaswag", public_data)
    same = [full[key([choice for _, choice in asked])] for asked in exact]
    assert [asked[0][0] for asked in same] == [asked[0][0] for asked in exact]
    assert sum(a == b for a, b in zip(same, exact, strict=True)) == 941  # the others have lost a space before an ending


def test_every_question_comes_once(questions: Path) -> None:
    counts = {name: len(requests_of(name, questions)) for name in LOCAL}
    assert counts == {
        "boolq": 4,
        "piqa": 3,
        "hellaswag": 2,
        "hellaswag_full": 2,
        "winogrande": 3,
        "arc_easy": 4,
        "arc_challenge": 4,
        "openbookqa": 2,
    }


def test_prompts_word_by_word(questions: Path) -> None:
    assert requests_of("arc_easy", questions)[1] == [
        ("Question: What do plants need?\nAnswer:", f" {choice}") for choice in ("light", "sound", "money")
    ]
    assert requests_of("boolq", questions)[0] == [
        (
            "Tea -- Tea is made of leaves.\nQuestion: is not one. It is drunk hot.\n"
            "Question: is tea made of leaves?\nAnswer:",
            f" {choice}",
        )
        for choice in ("no", "yes")
    ]
    assert requests_of("winogrande", questions)[1] == [
        (f"Ann thanked Eve because {name}", " had helped.") for name in ("Ann", "Eve")
    ]
    assert requests_of("piqa", questions)[0] == [
        ("Question: To open a jar\nAnswer:", " turn the lid "),
        ("Question: To open a jar\nAnswer:", " turn the table"),
    ]
    assert [context for context, _ in requests_of("hellaswag", questions)[0]] == [
        "Making tea: A woman boils water. She puts leaves in a cup. The woman in red"
    ] * 4
    assert requests_of("hellaswag", questions)[1][0] == (
        "Home and Garden: How to clean a pot. Wash it. Use warm water.",
        "  Rub it. Dry it.",
    )


def test_the_stripped_hellaswag_capitalises_what_lm_eval_does(questions: Path) -> None:
    first, second = requests_of("hellaswag_full", questions)
    assert first == requests_of("hellaswag", questions)[0]
    assert second[0] == (
        "Home and Garden: How to clean a pot. Wash it. Use warm water. then",  # WikiHow: nothing is continued
        " Rub it. Dry it.",
    )


@pytest.mark.parametrize("name", LOCAL)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=rf"^{name}: its questions are not in .*Expected there: ") as caught:
        find_files(name, tmp_path)
    assert all(file in str(caught.value) for file in LOCAL[name].files)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"boolq: '.*none' is not a folder\. .*--tasks-data FOLDER"):
        load_tasks(["boolq"], folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("openbookqa", b"{", r"openbook_qa\.jsonl cannot be read \(JSONDecodeError: .*Expected a copy"),
        ("openbookqa", b"\xff\n", r"openbook_qa\.jsonl cannot be read \(UnicodeDecodeError"),
        ("openbookqa", b'{"query": "a"}\n', r"openbook_qa\.jsonl cannot be read \(KeyError: 'choices'"),
        ("openbookqa", b'{"query": "a", "choices": ["b"], "gold": 3}\n', r"cannot be read \(IndexError"),
        ("openbookqa", b"\n", r"openbook_qa\.jsonl: it has no questions"),
        ("arc_easy", b"text", r"arc_easy.*gz cannot be read \(BadGzipFile"),
        ("hellaswag_full", bz2.compress(b"a: b\n1\n"), r"ValueError: 2 lines are not six for every question"),
        ("hellaswag_full", bz2.compress(b"a\n1\n" * 3), r"ValueError: 'a' does not match"),
    ],
    ids=str,
)
def test_odd_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / LOCAL[name].files[0]).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_rows(LOCAL[name], find_files(name, tmp_path))
