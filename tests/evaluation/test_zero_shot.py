"""Offline tasks are lm-eval's: the same prompts, choices, predictions and accuracies; every error says what to do."""

from __future__ import annotations

import bz2
import copy
import functools
import json
import logging
import math
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_eval_reference import HUB, lines, own_results, own_task
from question_files import write_questions
from secateur.errors import DataError, TaskError
from secateur.evaluation.task_files import LOCAL, find_source, read_source
from secateur.evaluation.tasks import (
    LOGGERS,
    SEVEN,
    TaskResult,
    beside_first,
    check_limit,
    load_tasks,
    mean_of,
    score,
    task_names,
    zero_shot,
)
from tiny import tiny_model, tiny_tokenizer

COMPARED = 200  # documents of every task


@pytest.fixture
def public_data() -> Path:
    """The folder with the public files, which are not in this repository."""
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA names no folder with the public files")
    return Path(folder) / "eval"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(max_position_embeddings=512)


@pytest.fixture(autouse=True)
def _loggers_are_left_alone() -> Iterator[None]:
    before = {name: list(logging.getLogger(name).filters) for name in LOGGERS}
    yield
    assert before == {name: logging.getLogger(name).filters for name in LOGGERS}


def reads_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> type:
    """lm-eval's model that remembers what it has answered: another prompt is computed, the same one is not."""
    from lm_eval.models.huggingface import HFLM

    answers: dict[tuple[str, str], Any] = {}

    class Remembering(HFLM):  # type: ignore[misc]  # lm-eval has no annotations
        asked = 0

        def __init__(self, **options: Any) -> None:
            own = copy.deepcopy(tokenizer)
            super().__init__(**{"pretrained": model, "tokenizer": own, "batch_size": 4, **options})

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            new = [request for request in requests if request.args not in answers]
            Remembering.asked += len(new)
            if new:
                answers.update(zip((r.args for r in new), super().loglikelihood(new, disable_tqdm), strict=True))
            return [answers[request.args] for request in requests]

    return Remembering


def predictions(found: dict[str, Any], name: str) -> list[int]:
    """The choice of the greatest likelihood of every document."""
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [max(enumerate(s["filtered_resps"]), key=lambda each: each[1][0])[0] for s in samples]


def asked(found: dict[str, Any], name: str) -> list[list[tuple[str, str]]]:
    return [s["arguments"] for s in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])]


def assert_equals_own(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    *,
    limit: int,
) -> TaskResult:
    kind = reads_once(model, tokenizer)
    theirs = own_results(name, HUB[name][2](folder), kind(), limit=limit)
    computed = kind.asked  # type: ignore[attr-defined]
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", kind)
    [loaded] = load_tasks([name], folder=folder)
    ours = score(model, tokenizer, loaded, limit=limit, batch_size=4)
    assert asked(ours, name) == asked(theirs, name)
    assert kind.asked == computed  # type: ignore[attr-defined]
    assert [s["target"] for s in ours["samples"][name]] == [s["target"] for s in theirs["samples"][name]]
    assert predictions(ours, name) == predictions(theirs, name)
    assert ours["results"][name] == theirs["results"][name]
    result = zero_shot(model, tokenizer, [loaded], limit=limit, batch_size=4)[name]
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert result.metrics.get(metric) == theirs["results"][name].get(f"{metric},none")
    assert result.documents == len(predictions(theirs, name))
    return result


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("name", SEVEN)
def test_predictions_of_the_demo_model_are_lm_evals(
    name: str,
    public_data: Path,
    demo_model: PreTrainedModel,
    demo_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = assert_equals_own(name, public_data, demo_model, demo_tokenizer, monkeypatch, limit=COMPARED)
    assert result.documents == COMPARED


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
@pytest.mark.parametrize("name", SEVEN)
def test_all_public_questions_are_asked_as_lm_eval_asks_them(name: str, public_data: Path) -> None:
    assert requests_of(name, public_data) == built(own_task(name, HUB[name][2](public_data)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["boolq", "winogrande"])
def test_prompts_are_those_that_the_public_files_give_ready_made(name: str, public_data: Path) -> None:
    file = public_data / LOCAL[name].sources[0].files[0]
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


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.mark.parametrize("name", SEVEN)
def test_predictions_of_a_tiny_model_are_lm_evals(
    name: str, questions: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = assert_equals_own(name, questions / "eval", model, tiny_tokenizer(), monkeypatch, limit=3)
    assert result.metric == ("acc" if name in ("boolq", "winogrande") else "acc_norm")
    assert result.value == result.metrics[result.metric]


def test_another_prompt_is_seen(questions: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = HUB["openbookqa"][2](questions / "eval")
    changed = [row | {"question_stem": row["question_stem"].upper()} for row in rows]
    monkeypatch.setitem(HUB, "openbookqa", (*HUB["openbookqa"][:2], lambda _: changed))
    with pytest.raises(AssertionError):
        assert_equals_own("openbookqa", questions / "eval", model, tiny_tokenizer(), monkeypatch, limit=2)


class TestFiles:
    def test_every_question_comes_once(self, questions: Path) -> None:
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

    def test_prompts_word_by_word(self, questions: Path) -> None:
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

    def test_the_stripped_hellaswag_capitalises_what_lm_eval_does(self, questions: Path) -> None:
        first, second = requests_of("hellaswag_full", questions)
        assert first == requests_of("hellaswag", questions)[0]
        assert second[0] == (
            "Home and Garden: How to clean a pot. Wash it. Use warm water. then",  # WikiHow: nothing is continued
            " Rub it. Dry it.",
        )

    @pytest.mark.parametrize(
        ("name", "preferred", "note"),
        [
            ("boolq", "boolq_rc_0shot_requests.jsonl.gz", "no titles"),
            ("piqa", "piqa_original/valid-labels.lst", "lost spaces"),
            ("winogrande", "winogrande_rc_0shot_requests.jsonl.gz", None),
            ("hellaswag", "hellaswag_val_1000_original.jsonl", "preprocessed copy"),
        ],
    )
    def test_a_second_format_is_read_where_the_first_is_missing(
        self, name: str, preferred: str, note: str | None, questions: Path, tmp_path: Path
    ) -> None:
        others = write_questions(tmp_path)
        (others / "eval" / preferred).unlink()
        [loaded] = load_tasks([name], folder=others)
        assert loaded.data is not None
        assert loaded.data not in preferred
        assert (note in (loaded.note or "")) if note else loaded.note is None
        first = [[choice.strip() for _, choice in asked] for asked in requests_of(name, questions)]
        assert [[choice.strip() for _, choice in asked] for asked in requests_of(name, others)] == first
        if name == "winogrande":
            assert requests_of(name, others) == requests_of(name, questions)
        targets = [[document[1] for document in targeted(load_tasks([name], folder=f)[0])] for f in (questions, others)]
        assert targets[0] == targets[1]

    @pytest.mark.parametrize("name", LOCAL)
    def test_a_missing_file_is_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(TaskError, match=rf"^{name}: its questions are not in .*Expected there: ") as caught:
            load_tasks([name], folder=tmp_path)
        assert all(file in str(caught.value) for source in LOCAL[name].sources for file in source.files)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(TaskError, match=r"boolq: '.*none' is no folder\. .*--tasks-data FOLDER"):
            load_tasks(["boolq"], folder=tmp_path / "none")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("openbookqa", b"{", r"openbook_qa\.jsonl cannot be read \(JSONDecodeError: .*Expected a copy"),
            ("openbookqa", b"\xff\n", r"openbook_qa\.jsonl cannot be read \(UnicodeDecodeError"),
            ("openbookqa", b'{"query": "a"}\n', r"openbook_qa\.jsonl: a question lacks .*KeyError: 'choices'"),
            ("openbookqa", b'{"query": "a", "choices": ["b"], "gold": 3}\n', r"a question lacks .*IndexError"),
            ("openbookqa", b"\n", r"openbook_qa\.jsonl: there are no questions in it"),
            ("arc_easy", b"text", r"arc_easy.*gz cannot be read \(BadGzipFile"),
            ("hellaswag_full", bz2.compress(b"a: b\n1\n"), r"ValueError: 2 lines are not six for every question"),
            ("hellaswag_full", bz2.compress(b"a\n1\n" * 3), r"line 1 has no activity before a colon: 'a'"),
        ],
        ids=str,
    )
    def test_odd_files(self, name: str, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / LOCAL[name].sources[0].files[0]).write_bytes(content)
        source, paths = find_source(name, tmp_path)
        with pytest.raises(TaskError, match=message):
            read_source(source, paths)


def targeted(loaded: Any) -> list[tuple[Any, Any]]:
    task = next(iter(loaded.loaded["tasks"].values()))
    pairs = []
    for document in task.eval_docs:
        target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        pairs.append((document, target))
    return pairs


class TestRun:
    def test_no_network_is_asked_and_nothing_is_printed(
        self,
        questions: Path,
        model: PreTrainedModel,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("a connection")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        results = zero_shot(model, tiny_tokenizer(), load_tasks(SEVEN, folder=questions), limit=2)
        assert list(results) == list(SEVEN)
        assert all(result.documents == 2 for result in results.values())
        assert capfd.readouterr() == ("", "")

    def test_progress_counts_choices_of_every_task(self, questions: Path, model: PreTrainedModel) -> None:
        seen: list[tuple[int, int, str]] = []
        tasks = load_tasks(["openbookqa", "arc_easy"], folder=questions)
        zero_shot(model, tiny_tokenizer(), tasks, progress=lambda *now: seen.append(now))
        assert [now for now in seen if now[2] == "openbookqa"] == [(i, 8, "openbookqa") for i in range(1, 9)]
        assert seen[-1] == (16, 16, "arc_easy")

    def test_model_and_tokenizer_are_as_they_were(self, questions: Path) -> None:
        model, tokenizer = tiny_model().train(), copy.deepcopy(tiny_tokenizer())
        assert tokenizer.pad_token is None
        zero_shot(model, tokenizer, load_tasks(["openbookqa"], folder=questions))
        assert model.training
        assert tokenizer.pad_token is None

    def test_prompts_that_are_too_long_are_counted_in_one_line(
        self, questions: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        short = tiny_model(max_position_embeddings=16)
        zero_shot(short, tiny_tokenizer(), load_tasks(["arc_easy"], folder=questions))
        [message] = caplog.messages
        assert re.fullmatch(r"arc_easy: \d+ prompts are longer than the model reads at once, and lost .*", message)

    def test_bfloat16_is_scored_in_float32(self, questions: Path, model: PreTrainedModel) -> None:
        tasks = load_tasks(["arc_easy"], folder=questions)
        half = tiny_model(dtype=torch.bfloat16, max_position_embeddings=512)
        found = score(half, tiny_tokenizer(), tasks[0])
        sums = [resp[0][0] for sample in found["samples"]["arc_easy"] for resp in sample["resps"]]
        assert any(value != float(torch.tensor(value).bfloat16()) for value in sums)

    @pytest.mark.parametrize("batch_size", [1, 3, None])
    def test_batches_change_nothing(self, batch_size: int | None, questions: Path) -> None:
        exact = tiny_model(dtype=torch.float64, max_position_embeddings=512)
        tasks = load_tasks(["boolq", "arc_easy"], folder=questions)
        whole = zero_shot(exact, tiny_tokenizer(), tasks, batch_size=16)
        assert zero_shot(exact, tiny_tokenizer(), tasks, batch_size=batch_size) == whole

    @pytest.mark.parametrize("limit", [0, -3])
    def test_a_limit_that_leaves_nothing(self, limit: int) -> None:
        with pytest.raises(TaskError, match=rf"limit={limit} leaves no question\. .*--limit 200"):
            zero_shot(None, None, [], limit=limit)  # type: ignore[arg-type]

    def test_a_batch_of_nothing(self) -> None:
        with pytest.raises(DataError, match=r"batch_size=0 scores nothing; .*--batch-size 8"):
            zero_shot(None, None, [], batch_size=0)  # type: ignore[arg-type]


class TestNames:
    def test_shorthands(self) -> None:
        assert task_names("all") == task_names(" zero-shot ,") == list(SEVEN)
        assert task_names("piqa,boolq,piqa") == ["piqa", "boolq"]
        with pytest.raises(TaskError, match=r"tasks=',' names no task\. .*--tasks boolq,piqa"):
            task_names(",")

    @pytest.mark.slow
    def test_an_unknown_task_is_answered_with_near_names(self) -> None:
        with pytest.raises(TaskError, match=r"task 'arc_eassy' is unknown to lm-eval. Did you mean .*arc_easy"):
            load_tasks(["arc_eassy"])

    def test_an_unknown_local_task_too(self, questions: Path) -> None:
        with pytest.raises(
            TaskError, match=r"task 'arc_hard' has no local files. Did you mean .*Those that have: boolq"
        ):
            load_tasks(["arc_hard"], folder=questions)

    def test_without_lm_eval(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(TaskError, match=r"lm-eval scores the tasks\. Run: pip install 'secateur\[tasks\]'"):
            load_tasks(["boolq"])


class TestOtherTasks:
    """Tasks of one's own, by lm-eval's names: what is asked for by name passes through."""

    @pytest.fixture
    def manager(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        import lm_eval.tasks

        (tmp_path / "rows.json").write_text(json.dumps([{"q": "a b c", "a": "d"}, {"q": "x y", "a": "z"}]))
        common = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path / "hf")},
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
        }
        tasks: dict[str, dict[str, Any]] = {
            "spelled": {
                "output_type": "generate_until",
                "generation_kwargs": {"until": [" "], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                "filter_list": [
                    {"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "flexible")
                ],
            },
            "one_of_two": {
                "output_type": "multiple_choice",
                "doc_to_choice": ["d", "z"],
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
            "rolled": {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{q}}",
                "metric_list": [
                    {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
                ],
            },
        }
        for name, about in tasks.items():
            (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **about}))  # JSON is YAML
        group = {"group": "both", "task": ["one_of_two"], "aggregate_metric_list": [{"metric": "acc"}]}
        (tmp_path / "both.yaml").write_text(json.dumps(group))
        kind = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(tmp_path))
        monkeypatch.setattr("lm_eval.tasks.TaskManager", kind)
        return tmp_path

    def test_metrics_and_filters_keep_their_names(self, manager: Path, model: PreTrainedModel) -> None:
        results = zero_shot(model, tiny_tokenizer(), load_tasks(["spelled", "one_of_two", "rolled"]), limit=2)
        assert results["spelled"].metrics.keys() == {
            f"exact_match{part},{name}" for part in ("", "_stderr") for name in ("strict", "flexible")
        }
        assert results["spelled"].metric == "exact_match,strict"
        assert results["spelled"].outcomes == (0.0, 0.0)
        assert results["one_of_two"].metric == "acc"
        assert len(results["one_of_two"].outcomes) == 2
        rolled = results["rolled"]
        assert (rolled.metric, rolled.outcomes) == ("word_perplexity", ())
        assert rolled.value > 1
        mean = mean_of(results)
        assert mean is not None
        assert mean["tasks"] == ["one_of_two"]

    def test_a_group_and_its_members(self, manager: Path, model: PreTrainedModel) -> None:
        results = zero_shot(model, tiny_tokenizer(), load_tasks(["both"]))
        assert results.keys() == {"both", "one_of_two"}
        assert results["both"].value == results["one_of_two"].value
        assert results["both"].outcomes == ()

    def test_what_cannot_be_fetched_is_one_error(self, manager: Path) -> None:
        (manager / "rows.json").unlink()
        with pytest.raises(
            TaskError, match=r"task 'one_of_two': its questions cannot be fetched \(.*Check the network"
        ):
            load_tasks(["one_of_two"])


def result(name: str, outcomes: Sequence[float], **others: Any) -> TaskResult:
    value = sum(outcomes) / len(outcomes)
    spread = math.sqrt(sum((x - value) ** 2 for x in outcomes) / (len(outcomes) - 1) / len(outcomes))
    hashes = tuple(map(str, range(len(outcomes))))
    about: dict[str, Any] = {"metric": "acc", "documents_hash": hashes} | others
    return TaskResult(name, {}, len(outcomes), about.pop("metric"), value, spread, tuple(outcomes), **about)


class TestBesideTheFirst:
    def test_only_the_same_documents_and_metrics_compare(self) -> None:
        first = result("a", [1, 0, 1, 1])
        assert beside_first(result("a", [0, 0, 1, 0]), first) is not None
        assert beside_first(result("a", [0, 0, 1, 0], documents_hash=("x",) * 4), first) is None
        assert beside_first(result("a", [0, 0, 1, 0], metric="acc_norm"), first) is None

    def test_the_mean_is_unweighted_and_its_error_that_of_independent_tasks(self) -> None:
        first = {"a": result("a", [1, 1, 1, 0]), "b": result("b", [1, 0])}
        second = {"a": result("a", [0, 1, 0, 0]), "b": result("b", [0, 0])}
        mean = mean_of(second, first)
        assert mean is not None
        assert mean["value"] == pytest.approx((0.25 + 0) / 2)
        one, two = (beside_first(second[name], first[name]) for name in "ab")
        assert one is not None
        assert two is not None
        assert one.stderr is not None
        assert two.stderr is not None
        assert mean["difference"] == pytest.approx((-0.5 - 0.5) / 2)
        assert mean["difference_stderr"] == pytest.approx(math.hypot(one.stderr, two.stderr) / 2)
        assert mean["stderr"] == pytest.approx(math.hypot(second["a"].stderr or 0, second["b"].stderr or 0) / 2)

    def test_the_mean_is_of_the_seven_where_they_are_all_there(self) -> None:
        results = {name: result(name, [1, 0]) for name in (*SEVEN, "lambada_openai")}
        mean = mean_of(results)
        assert mean is not None
        assert mean["tasks"] == list(SEVEN)
        assert mean_of({}) is None

    def test_a_limit_is_checked_before_anything(self) -> None:
        check_limit(None)
        check_limit(1)
