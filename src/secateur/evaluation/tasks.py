"""Model + tasks -> accuracies, by lm-eval: prompts, choices, scores and standard errors are its own.

A task comes with its questions from the hub, or with those of local files (`task_files.py`), in which case its
configuration is lm-eval's and only the data set is another. Every task is loaded once, for all models.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import DataError, TaskError, did_you_mean, one_line
from secateur.evaluation.perplexity import evaluation_mode, fitting_batch, input_device, vocabulary_size
from secateur.evaluation.significance import Difference, mean_difference, mean_of_errors, paired
from secateur.evaluation.task_files import LOCAL, find_source, read_source

logger = logging.getLogger(__name__)

# The tasks of LLM-Pruner's tables (arXiv 2305.11627, section 4.1), by lm-eval's names.
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
SHORTHANDS = {"zero-shot": SEVEN, "all": SEVEN}
HEADLINES = ("acc_norm", "acc")  # the first that a task has is its headline
FEWSHOT_SEED = 1234  # lm-eval's own
BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
MOST_ROWS = 32  # in a batch
MEMORY_SHARE = 8  # of a GPU's free memory, what the logits of a batch may take is one part in so many
CPU_BYTES = 512 * 2**20  # of the logits of a batch, where there is no GPU

# Loggers that may not be there yet when the first task is loaded; a filter holds for its own logger alone.
LOGGERS = (
    "lm_eval.api.task",
    "lm_eval.api.model",
    "lm_eval.config.task",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.models.utils",
    "lm_eval.tasks.manager",
)

_EXTRA = "pip install 'secateur[tasks]'"


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTask:
    """A task, or a group of them, as lm-eval has loaded it with its questions."""

    name: str
    loaded: Any  # what lm-eval's TaskManager.load returns
    data: str | None = None  # the local file; None: the hub
    note: str | None = None  # what is not as in lm-eval's own data set


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model makes of one task.

    >>> TaskResult("boolq", {"acc": 0.6}, 3270, "acc", 0.6, 0.0086).value
    0.6
    """

    task: str
    metrics: Mapping[str, float | None]  # such as acc and acc_stderr, by lm-eval's names
    documents: int
    metric: str  # the headline
    value: float
    stderr: float | None
    outcomes: tuple[float, ...] = ()  # the headline's value of every document; empty for a group of tasks
    documents_hash: tuple[str, ...] = ()  # of every document, in the same order
    data: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur evaluate --json` writes it."""
        about = {"data": self.data, "note": self.note}
        return {
            **self.metrics,
            "documents": self.documents,
            "metric": self.metric,
            "value": self.value,
            "stderr": self.stderr,
            **{name: text for name, text in about.items() if text is not None},
        }


def task_names(text: str) -> list[str]:
    """The names in a list with commas; `zero-shot` and `all` stand for LLM-Pruner's seven. Raises `TaskError` for none.

    >>> task_names("zero-shot,boolq,lambada_openai")[-2:]
    ['openbookqa', 'lambada_openai']
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    if not given:
        raise TaskError(f"tasks={text!r} names no task. Expected for example --tasks boolq,piqa, or --tasks zero-shot")
    return list(dict.fromkeys(each for name in given for each in SHORTHANDS.get(name, (name,))))


def check_limit(limit: int | None) -> None:
    """Raise `TaskError` for a number of documents that leaves none.

    >>> check_limit(0)
    Traceback (most recent call last):
    secateur.errors.TaskError: limit=0 leaves no question. Expected at least 1: --limit 200
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit={limit} leaves no question. Expected at least 1: --limit 200")


def load_tasks(names: Sequence[str], *, folder: Path | None = None) -> list[LoadedTask]:
    """Load tasks with their questions: from the files of a folder, or without one from the hub.

    Raises `TaskError` for a task that is unknown or cannot be fetched, for files that are missing or odd, and where
    lm-eval is not installed.

    >>> load_tasks([])
    []
    """
    if not names:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError(f"--tasks {','.join(names)}: the package lm-eval scores the tasks. Run: {_EXTRA}")
    if folder is not None:
        for name in names:
            if name not in LOCAL:
                hint = did_you_mean(name, LOCAL, most=3) or "."
                raise TaskError(
                    f"task {name!r} has no local files{hint} Those that have: {', '.join(LOCAL)}. "
                    "Without --tasks-data it is fetched from the hub"
                )
        found = {name: find_source(name, folder) for name in names}  # all of them before any is read
        return [_load_local(name, *found[name]) for name in names]
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        known = set(manager.all_tasks)
        for name in names:
            if name not in known:
                raise TaskError(
                    f"task {name!r} is unknown to lm-eval{did_you_mean(name, known | set(SHORTHANDS), most=3) or '.'} "
                    f"Expected for example --tasks {','.join(SEVEN[:3])}, or --tasks zero-shot"
                )
        return [_load_from_hub(name, manager) for name in names]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[LoadedTask],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, TaskResult]:
    """Let lm-eval score a model on tasks, each on its first `limit` documents; returns task -> result.

    `batch_size` counts rows per forward pass; None takes as many as keep the logits of the longest in memory. Log-
    probabilities are taken in float32 whatever the model's dtype (lm-eval's option `softmax_dtype`). `progress` is
    called with requests done, all requests and the task's name. Raises `TaskError` for a limit below 1 and for tasks
    that lm-eval refuses to run.

    >>> zero_shot(None, None, [])
    {}
    """
    check_limit(limit)
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size={batch_size} scores nothing; expected at least 1: --batch-size 8")
    results: dict[str, TaskResult] = {}
    for task in tasks:
        with _quiet() as shortened:
            raw = score(model, tokenizer, task, limit=limit, batch_size=batch_size, progress=progress)
        if shortened.count:
            logger.warning(
                "%s: %d prompts are longer than the model reads at once, and lost their start",
                task.name,
                shortened.count,
            )
        results |= _results(task, raw)
    return results


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns for a model and one loaded task, the samples among it."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for each in task.loaded["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=FEWSHOT_SEED)
        each.build_all_requests(limit=limit)
    requests = [request for each in task.loaded["tasks"].values() for request in each.instances]
    with evaluation_mode(model):
        lm = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token where it has none
            batch_size=batch_size or _batch(model, tokenizer, requests),
            softmax_dtype="float32",
        )
        if lm.device.type == "meta":  # weights that accelerate brings from the disk, layer by layer
            lm._device = input_device(model)
        if progress is not None:
            lm.set_cache_hook(_Counter(progress, len(requests), task.name))
        try:
            found: dict[str, Any] = evaluate(lm, task.loaded, limit=limit, bootstrap_iters=BOOTSTRAPS)
        except (ValueError, NotImplementedError) as error:
            raise TaskError(f"{task.name}: lm-eval does not run it ({one_line(error)})") from error
    return found


def beside_first(result: TaskResult, first: TaskResult) -> Difference | None:
    """A result beside the first model's, document by document; None where they have no documents in common.

    >>> first = TaskResult("boolq", {}, 2, "acc", 1.0, 0.0, (1.0, 1.0), ("a", "b"))
    >>> beside_first(TaskResult("boolq", {}, 2, "acc", 0.5, 0.5, (1.0, 0.0), ("a", "b")), first)
    Difference(difference=-0.5, stderr=0.5, p=1.0)
    """
    if not result.outcomes or result.documents_hash != first.documents_hash or result.metric != first.metric:
        return None
    return paired(result.outcomes, first.outcomes)


def mean_of(results: Mapping[str, TaskResult], first: Mapping[str, TaskResult] | None = None) -> dict[str, Any] | None:
    """The unweighted mean of the headlines as plain data, with its standard error, beside the first model's if given.

    LLM-Pruner's seven where all of them are there, else all tasks with an accuracy; None where there is none.

    >>> mean_of({"a": TaskResult("a", {}, 2, "acc", 0.5, 0.3), "b": TaskResult("b", {}, 2, "acc", 0.7, 0.4)})["stderr"]
    0.25
    """
    seven = [results[name] for name in SEVEN if name in results]
    chosen = (
        seven if len(seven) == len(SEVEN) else [r for r in results.values() if r.metric in HEADLINES and r.outcomes]
    )
    chosen = chosen or [r for r in results.values() if r.metric in HEADLINES]
    if not chosen:
        return None
    found: dict[str, Any] = {
        "value": sum(result.value for result in chosen) / len(chosen),
        "stderr": mean_of_errors([result.stderr for result in chosen]),
        "tasks": [result.task for result in chosen],
    }
    if first is not None:
        differences = [beside_first(result, first[result.task]) for result in chosen if result.task in first]
        known = [difference for difference in differences if difference is not None]
        if len(known) == len(chosen):
            mean = mean_difference(known)
            found |= {"difference": mean.difference, "difference_stderr": mean.stderr, "p": mean.p}
    return found


# --- loading ----------------------------------------------------------------------------------------------------


def _load_local(name: str, source: Any, paths: Sequence[Path]) -> LoadedTask:
    """lm-eval's own configuration of the task, with documents of ours for its data set."""
    with _quiet():
        import datasets
        import lm_eval.tasks

        documents = datasets.Dataset.from_list(read_source(source, paths))
        # Without few-shot examples nothing is read of the split they come from; it has to be there.
        splits = {"train": documents.select([]), "validation": documents, "test": documents}
        local = LOCAL[name]
        home = Path(lm_eval.tasks.__file__).parent / local.folder
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[home])
        # A group's members keep their own configuration but for what is said here; a lone configuration would not.
        member = {"task": local.task, "custom_dataset": lambda **_: datasets.DatasetDict(splits)}
        loaded = manager.load([{"group": "local", "task": [member]}])
        return LoadedTask(name, {"tasks": loaded["tasks"]}, paths[0].name, source.note)


def _load_from_hub(name: str, manager: Any) -> LoadedTask:
    try:
        return LoadedTask(name, manager.load([name]))
    except Exception as error:  # whatever the hub, the network, the cache or a task's own code makes of it
        local = f", or give local files: --tasks-data FOLDER (for {', '.join(SEVEN)})" if name in LOCAL else ""
        raise TaskError(
            f"task {name!r}: its questions cannot be fetched ({one_line(error)}). Check the network{local}"
        ) from error


# --- scoring ----------------------------------------------------------------------------------------------------


def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Any]) -> int:
    """How many of the longest requests fit in memory at once."""
    texts = ("".join(part for part in request.args if isinstance(part, str)) for request in requests)
    tokens = len(tokenizer(max(texts, key=len), verbose=False)["input_ids"])
    device = input_device(model)
    limit = CPU_BYTES if device.type != "cuda" else torch.cuda.mem_get_info(device)[0] // MEMORY_SHARE
    return min(MOST_ROWS, fitting_batch(max(tokens, 1), vocabulary_size(model), limit=limit))


class _Counter:
    """Counts answers where lm-eval would keep them for another time."""

    def __init__(self, progress: Callable[[int, int, str], None], total: int, name: str) -> None:
        self.progress, self.total, self.name, self.done = progress, total, name, 0

    def add_partial(self, *_: Any) -> None:
        self.done += 1
        self.progress(min(self.done, self.total), self.total, self.name)


class _Shortened(logging.Filter):
    """Counts what lm-eval says about prompts that are too long, and lets none of it through."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if "Truncating" in record.getMessage() or "exceeds model's maximum" in record.getMessage():
            self.count += 1
        return record.levelno >= logging.ERROR


@contextmanager
def _quiet() -> Iterator[_Shortened]:
    """Without lm-eval's progress bars and what it logs below an error; ours are there for that."""
    from tqdm import tqdm

    shown = tqdm.__init__

    def hidden(self: Any, *arguments: Any, **options: Any) -> None:
        shown(self, *arguments, **{**options, "disable": True})

    shortened = _Shortened()
    names = [name for name in logging.root.manager.loggerDict if name == "lm_eval" or name.startswith("lm_eval.")]
    names += [name for name in LOGGERS if name not in names]
    loggers = [logging.getLogger(name) for name in names]
    for each in loggers:
        each.addFilter(shortened)
    tqdm.__init__ = hidden
    try:
        yield shortened
    finally:
        tqdm.__init__ = shown
        for each in loggers:
            each.removeFilter(shortened)


# --- results ----------------------------------------------------------------------------------------------------


def _results(task: LoadedTask, raw: Mapping[str, Any]) -> dict[str, TaskResult]:
    """What lm-eval found, by the name that was asked for; of a group, the group's own and its members'."""
    found = {}
    for name, values in raw["results"].items():
        metrics = {_metric(key): _number(value) for key, value in values.items() if "," in key}
        headlines = [metric for metric in metrics if not metric.partition(",")[0].endswith("_stderr")]
        if not headlines:  # a group without an aggregate
            continue
        headline = next((metric for metric in HEADLINES if metric in metrics), headlines[0])
        samples = raw["samples"].get(name, [])
        outcomes = _outcomes(samples, headline)
        count = raw["n-samples"].get(name, {}).get("effective", values.get("sample_len", len(samples)))
        asked = name if task.data is None else task.name
        found[asked] = TaskResult(
            asked,
            metrics,
            int(count),
            headline,
            float("nan") if metrics[headline] is None else float(metrics[headline] or 0.0),
            metrics.get(_stderr_of(headline)),
            tuple(outcomes.values()),
            tuple(outcomes),
            task.data,
            task.note,
        )
    return found


def _metric(key: str) -> str:
    """`acc,none` -> `acc`; the name of a filter that does something stays."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else key


def _stderr_of(metric: str) -> str:
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # N/A where there is no standard error


def _outcomes(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Document's place and hash -> the metric's value, where it is a number of every document by itself."""
    name, _, filtered = metric.partition(",")
    chosen = [sample for sample in samples if sample["filter"] == (filtered or "none")]
    found = {f"{sample['doc_id']} {sample['doc_hash']}": sample.get(name) for sample in chosen}
    if not all(isinstance(value, int | float) for value in found.values()):
        return {}
    return {key: float(value) for key, value in sorted(found.items(), key=_place) if value is not None}


def _place(item: tuple[str, Any]) -> int:
    return int(item[0].split()[0])
