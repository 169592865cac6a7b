"""Tasks are compared question by question, and their mean is unweighted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from secateur.evaluation.task_results import LLM_PRUNER_TASKS, TaskResult, mean_accuracy, task_difference


def result(name: str, outcomes: Sequence[float], **others: Any) -> TaskResult:
    value = sum(outcomes) / len(outcomes)
    spread = math.sqrt(sum((x - value) ** 2 for x in outcomes) / (len(outcomes) - 1) / len(outcomes))
    hashes = tuple(map(str, range(len(outcomes))))
    about: dict[str, Any] = {"metric": "acc", "hashes": hashes} | others
    return TaskResult(name, {}, len(outcomes), about.pop("metric"), value, spread, tuple(outcomes), **about)


def test_only_the_same_documents_and_metrics_compare() -> None:
    first = result("a", [1, 0, 1, 1])
    assert task_difference(result("a", [0, 0, 1, 0]), first) is not None
    assert task_difference(result("a", [0, 0, 1, 0], hashes=("x",) * 4), first) is None
    assert task_difference(result("a", [0, 0, 1, 0], metric="acc_norm"), first) is None


def test_the_mean_is_unweighted_and_its_error_that_of_independent_tasks() -> None:
    first = {"a": result("a", [1, 1, 1, 0]), "b": result("b", [1, 0])}
    second = {"a": result("a", [0, 1, 0, 0]), "b": result("b", [0, 0])}
    mean = mean_accuracy(second, first)
    assert mean is not None
    assert mean["value"] == pytest.approx((0.25 + 0) / 2)
    one, two = (task_difference(second[name], first[name]) for name in "ab")
    assert one is not None
    assert two is not None
    assert one.stderr is not None
    assert two.stderr is not None
    assert mean["difference"] == pytest.approx((-0.5 - 0.5) / 2)
    assert mean["difference_stderr"] == pytest.approx(math.hypot(one.stderr, two.stderr) / 2)
    assert mean["stderr"] == pytest.approx(math.hypot(second["a"].stderr or 0, second["b"].stderr or 0) / 2)


def test_the_mean_is_of_the_seven_where_they_are_all_there() -> None:
    results = {name: result(name, [1, 0]) for name in (*LLM_PRUNER_TASKS, "lambada_openai")}
    mean = mean_accuracy(results)
    assert mean is not None
    assert mean["tasks"] == list(LLM_PRUNER_TASKS)
    assert mean_accuracy({}) is None
