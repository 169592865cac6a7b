"""Models, one after the other -> perplexities, accuracies and samples of text, each beside the first model's.

The first model is the dense one, as a rule. All models see the same windows and the same questions, so what is
compared is window by window and question by question (`significance.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import TaskError
from secateur.evaluation.perplexity import Perplexity, ScoredText, sample_text, score_texts, wanted_protocols
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.significance import Difference, paired_ratio
from secateur.evaluation.tasks import (
    LoadedTask,
    TaskResult,
    beside_first,
    check_limit,
    load_tasks,
    mean_of,
    task_names,
    zero_shot,
)
from secateur.progress import ProgressBars


@dataclass(frozen=True, slots=True)
class Measures:
    """What is measured of every model.

    >>> Measures(texts={"wikitext2": "A text."}).protocols
    ()
    """

    texts: Mapping[str, str] = field(default_factory=dict)  # name -> text
    protocols: tuple[Protocol, ...] = ()
    max_tokens: int | None = None
    tasks: tuple[LoadedTask, ...] = ()
    limit: int | None = None  # documents of every task
    batch_size: int | None = None  # rows of a task that are computed at once; None: what fits
    prompts: tuple[str, ...] = ()  # to be continued
    new_tokens: int = 48


@dataclass(frozen=True, slots=True)
class Measured:
    """One model, measured.

    >>> Measured("demo").with_sizes(weight_bytes=2, file_bytes=None).weight_bytes
    2
    """

    model: str
    weight_bytes: int | None = None
    file_bytes: int | None = None
    texts: tuple[ScoredText, ...] = ()
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)  # prompt -> its greedy continuation

    def with_sizes(self, weight_bytes: int, file_bytes: int | None) -> Measured:
        """The same, with the bytes of the weights in memory, and of their files where there are some."""
        return replace(self, weight_bytes=weight_bytes, file_bytes=file_bytes)

    @property
    def perplexity(self) -> list[Perplexity]:
        """The perplexities, by text and protocol."""
        return [each.perplexity for each in self.texts]


def plan_measures(
    texts: Mapping[str, str],
    *,
    seq_lens: Sequence[int] | None = None,
    protocols: Sequence[str] = (),
    max_tokens: int | None = None,
    tasks: str | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    prompts: Sequence[str] = (),
    new_tokens: int = 48,
) -> Measures:
    """Read what is asked for, so that what is wrong with it is known before a model is loaded.

    Raises `DataError` for a protocol, and `TaskError` for a task, that cannot be done.

    >>> [str(protocol) for protocol in plan_measures({}, seq_lens=[64], protocols=["gptq@2048"]).protocols]
    ['llm-pruner@64', 'gptq@2048']
    """
    check_limit(limit)
    if tasks is None:
        for option, value in (("tasks-data", folder), ("limit", limit), ("batch-size", batch_size)):
            if value is not None:
                raise TaskError(f"--{option} {value} is about tasks, and none is named. Expected --tasks zero-shot")
    return Measures(
        texts,
        wanted_protocols(seq_lens, protocols),
        max_tokens,
        tuple(load_tasks(task_names(tasks), folder=folder)) if tasks is not None else (),
        limit,
        batch_size,
        tuple(dict.fromkeys(prompts)),
        new_tokens,
    )


def measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measures: Measures,
    *,
    bars: ProgressBars,
) -> Measured:
    """Measure one model that is loaded. Raises as `perplexity`, `zero_shot` and `sample_text` do.

    >>> from contextlib import nullcontext
    >>> measure("none", None, None, Measures(), bars=nullcontext).perplexity
    []
    """
    texts: list[ScoredText] = []
    if measures.texts:
        with bars(f"evaluate {name}") as progress:
            texts = score_texts(
                model,
                tokenizer,
                measures.texts,
                protocols=measures.protocols,
                max_tokens=measures.max_tokens,
                progress=progress,
            )
    tasks: dict[str, TaskResult] = {}
    for task in measures.tasks:
        with bars(f"{task.name} {name}") as progress:
            tasks |= zero_shot(
                model, tokenizer, [task], limit=measures.limit, batch_size=measures.batch_size, progress=progress
            )
    with bars(f"write {name}"):
        samples = {
            prompt: sample_text(model, tokenizer, prompt, new_tokens=measures.new_tokens) for prompt in measures.prompts
        }
    return Measured(name, texts=tuple(texts), tasks=tasks, samples=samples)


def differences(measured: Measured, first: Measured) -> list[Difference | None]:
    """How many nats per token a model is worse than the first in every text, window by window.

    None where the two did not read the same windows, as with another tokenizer.

    >>> one = Measured("a", texts=(ScoredText(Perplexity("t", 3, 4, 1.0, 0.0), (1.0, 2.0), (2, 2)),))
    >>> differences(one, one)
    [Difference(difference=0.0, stderr=0.0, p=1.0)]
    """
    known = {(each.perplexity.data, each.perplexity.protocol): each for each in first.texts}
    found: list[Difference | None] = []
    for each in measured.texts:
        other = known.get((each.perplexity.data, each.perplexity.protocol))
        same = other is not None and (each.tokens, each.perplexity.bytes) == (other.tokens, other.perplexity.bytes)
        found.append(paired_ratio(each.nats, other.nats, each.tokens) if other is not None and same else None)
    return found


def as_json(results: Sequence[Measured]) -> dict[str, Any]:
    """Plain data, as `secateur evaluate --json` writes it; every model but the first stands beside the first.

    >>> as_json([Measured("demo")])["results"][0]["model"]
    'demo'
    """
    return {"results": [_row(measured, results[0] if number else None) for number, measured in enumerate(results)]}


def _row(measured: Measured, first: Measured | None) -> dict[str, Any]:
    perplexity = [asdict(each) for each in measured.perplexity]
    tasks = {name: result.to_json() for name, result in measured.tasks.items()}
    if first is not None:
        for entry, difference in zip(perplexity, differences(measured, first), strict=True):
            if difference is not None:
                entry["against"] = {"model": first.model, **asdict(difference)}
        for name, result in measured.tasks.items():
            beside = beside_first(result, first.tasks[name]) if name in first.tasks else None
            if beside is not None:
                tasks[name]["against"] = {"model": first.model, **asdict(beside)}
    return {
        "model": measured.model,
        "perplexity": perplexity,
        "tasks": tasks,
        "tasks_mean": mean_of(measured.tasks, first.tasks if first is not None else None),
        "samples": [{"prompt": prompt, "text": text} for prompt, text in measured.samples.items()],
        "weight_bytes": measured.weight_bytes,
        "file_bytes": measured.file_bytes,
    }
