"""What lm-eval returns -> one result for each task; two models compared question by question; the mean of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.significance import Difference, mean_difference, mean_of_errors, paired

# The tasks of LLM-Pruner's tables (arXiv 2305.11627, section 4.1), by lm-eval's names.
LLM_PRUNER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
HEADLINES = ("acc_norm", "acc")  # the first that a task has is its headline


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The metrics of one model on one task."""

    task: str
    metrics: Mapping[str, float | None]  # such as acc and acc_stderr, by lm-eval's names
    documents: int  # questions that were answered
    metric: str  # the headline
    value: float
    stderr: float | None
    outcomes: tuple[float, ...] = ()  # the headline's value of every question; empty for a group of tasks
    hashes: tuple[str, ...] = ()  # of every question, in the same order
    data: str | None = None  # the local file; None: the hub
    note: str | None = None  # how the questions differ from lm-eval's own data set

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur evaluate --json` writes it."""
        about = {name: getattr(self, name) for name in ("documents", "metric", "value", "stderr")}
        source = {"data": self.data, "note": self.note}
        return {**self.metrics, **about, **{name: text for name, text in source.items() if text is not None}}


def read_results(raw: Mapping[str, Any], *, data: str | None = None, note: str | None = None) -> dict[str, TaskResult]:
    """Read what `lm_eval.evaluate` returns; of a group of tasks, the group's result and its members'."""
    results = {}
    for name, values in raw["results"].items():
        # lm-eval appends the name of a filter; `none` is the one that does nothing. "N/A" is no number.
        metrics = {
            key.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
            for key, value in values.items()
            if "," in key
        }
        candidates = [metric for metric in metrics if not metric.partition(",")[0].endswith("_stderr")]
        if not candidates:  # a group without an aggregate
            continue
        headline = next((metric for metric in HEADLINES if metric in metrics), candidates[0])
        metric, comma, filtered = headline.partition(",")
        value = metrics[headline]
        samples = raw["samples"].get(name, [])
        outcomes = _outcomes(samples, metric, filtered or "none")
        results[name] = TaskResult(
            name,
            metrics,
            int(raw["n-samples"].get(name, {}).get("effective", values.get("sample_len", len(samples)))),
            headline,
            float("nan") if value is None else value,
            metrics.get(f"{metric}_stderr{comma}{filtered}"),
            tuple(outcomes.values()),
            tuple(outcomes),
            data,
            note,
        )
    return results


def _outcomes(samples: Sequence[Mapping[str, Any]], metric: str, filtered: str) -> dict[str, float]:
    """Number and hash of a question -> the metric's value, where every question has one."""
    chosen = sorted((s for s in samples if s["filter"] == filtered), key=lambda sample: int(sample["doc_id"]))
    values = {f"{sample['doc_id']} {sample['doc_hash']}": sample.get(metric) for sample in chosen}
    numbers = {question: float(value) for question, value in values.items() if isinstance(value, int | float)}
    return numbers if len(numbers) == len(values) else {}


def task_difference(result: TaskResult, first: TaskResult | None) -> Difference | None:
    """A result against the first model's, question by question; None where the questions are not the same."""
    if first is None or not result.outcomes or (result.hashes, result.metric) != (first.hashes, first.metric):
        return None
    return paired(result.outcomes, first.outcomes)


def mean_accuracy(
    results: Mapping[str, TaskResult], first: Mapping[str, TaskResult] | None = None
) -> dict[str, Any] | None:
    """The unweighted mean of the headlines with its standard error, and its difference from the first model's.

    Plain data, as `secateur evaluate --json` writes it. LLM-Pruner's seven tasks where all of them are there, else all
    tasks with an accuracy; None where there is none.
    """
    accuracies = [result for result in results.values() if result.metric in HEADLINES]
    chosen = [result for result in accuracies if result.outcomes] or accuracies
    if results.keys() >= set(LLM_PRUNER_TASKS):
        chosen = [results[name] for name in LLM_PRUNER_TASKS]
    if not chosen:
        return None
    mean: dict[str, Any] = {
        "value": sum(result.value for result in chosen) / len(chosen),
        "stderr": mean_of_errors([result.stderr for result in chosen]),
        "tasks": [result.task for result in chosen],
    }
    if first is not None:
        differences = [task_difference(result, first.get(result.task)) for result in chosen]
        known = [difference for difference in differences if difference is not None]
        if len(known) == len(chosen):
            found = mean_difference(known)
            mean |= {"difference": found.difference, "difference_stderr": found.stderr, "p": found.p}
    return mean
