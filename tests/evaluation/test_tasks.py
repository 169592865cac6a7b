"""Tasks are lm-eval's: the same prompts, predictions and accuracies, whatever the batch, and no network is asked."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_eval_reference import HUB, own_results
from question_files import write_questions
from secateur.errors import DataError, TaskError
from secateur.evaluation.task_results import LLM_PRUNER_TASKS, TaskResult, mean_accuracy
from secateur.evaluation.tasks import load_tasks, run_lm_eval, zero_shot
from tiny import tiny_model, tiny_tokenizer

COMPARED = 8  # questions of every task that the demo model answers


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(max_position_embeddings=512)


@pytest.fixture(autouse=True)
def _loggers_are_left_alone() -> Iterator[None]:
    lm_eval = logging.getLogger("lm_eval")
    before = list(lm_eval.handlers), lm_eval.propagate
    yield
    assert (lm_eval.handlers, lm_eval.propagate) == before


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
    ours = run_lm_eval(model, tokenizer, loaded, limit=limit, batch_size=4)
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
@pytest.mark.parametrize("name", LLM_PRUNER_TASKS)
def test_predictions_of_the_demo_model_are_lm_evals(
    name: str,
    demo_model: PreTrainedModel,
    demo_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA names no folder with the public files")
    result = assert_equals_own(name, Path(folder) / "eval", demo_model, demo_tokenizer, monkeypatch, limit=COMPARED)
    assert result.documents == COMPARED


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.mark.parametrize("name", LLM_PRUNER_TASKS)
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
        results = zero_shot(model, tiny_tokenizer(), load_tasks(LLM_PRUNER_TASKS, folder=questions), limit=2)
        assert list(results) == list(LLM_PRUNER_TASKS)
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
        assert re.fullmatch(r"arc_easy: \d+ prompts exceed the model's positions and lost their start", message)

    def test_bfloat16_is_scored_in_float32(self, questions: Path, model: PreTrainedModel) -> None:
        tasks = load_tasks(["arc_easy"], folder=questions)
        half = tiny_model(dtype=torch.bfloat16, max_position_embeddings=512)
        found = run_lm_eval(half, tiny_tokenizer(), tasks[0])
        sums = [resp[0][0] for sample in found["samples"]["arc_easy"] for resp in sample["resps"]]
        assert any(value != float(torch.tensor(value).bfloat16()) for value in sums)

    @pytest.mark.parametrize("batch_size", [1, None])
    def test_batches_change_nothing(self, batch_size: int | None, questions: Path) -> None:
        exact = tiny_model(dtype=torch.float64, max_position_embeddings=512)
        tasks = load_tasks(["boolq", "arc_easy"], folder=questions)
        whole = zero_shot(exact, tiny_tokenizer(), tasks, batch_size=16)
        assert zero_shot(exact, tiny_tokenizer(), tasks, batch_size=batch_size) == whole

    @pytest.mark.parametrize("limit", [0, -3])
    def test_a_limit_that_leaves_nothing(self, limit: int) -> None:
        with pytest.raises(TaskError, match=rf"limit={limit} is too small. Expected at least 1, for example limit=200"):
            zero_shot(None, None, [], limit=limit)  # type: ignore[arg-type]

    def test_a_batch_of_nothing(self) -> None:
        with pytest.raises(
            DataError, match=r"batch_size=0 is too small. Expected at least 1, for example batch_size=8"
        ):
            zero_shot(None, None, [], batch_size=0)  # type: ignore[arg-type]


class TestNames:
    def test_zero_shot_is_seven_tasks_and_each_comes_once(self, questions: Path) -> None:
        tasks = load_tasks(["piqa", "zero-shot", "piqa"], folder=questions)
        assert [task.name for task in tasks] == list(dict.fromkeys(["piqa", *LLM_PRUNER_TASKS]))

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
        with pytest.raises(TaskError, match=r"needs the package lm_eval\. Run: pip install 'secateur\[tasks\]'"):
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
        mean = mean_accuracy(results)
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
