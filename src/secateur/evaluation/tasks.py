"""Model + tasks -> accuracies, by lm-eval: prompts, choices, log-likelihoods and standard errors are its own.

A task has its questions from the hub or from local files (`local_tasks.py`); then its configuration is lm-eval's and
only the data set is replaced. Every task is loaded once, for all models.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import DataError, TaskError, check_installed, check_least, did_you_mean, one_line
from secateur.evaluation.inference import evaluation_mode, fitting_batch, input_device, vocabulary_size
from secateur.evaluation.local_tasks import LOCAL, find_files, read_rows
from secateur.evaluation.task_results import LLM_PRUNER_TASKS, TaskResult, read_results
from secateur.models.precision import half_products, matmul_precision
from secateur.models.silence import quiet

logger = logging.getLogger(__name__)

SHORTHANDS = {"zero-shot": LLM_PRUNER_TASKS}
# Where lm-eval keeps the tasks that can have local files; its whole index takes seconds to read.
LM_EVAL_FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")
FEWSHOT_SEED = 1234  # lm-eval's own
BOOTSTRAP_SAMPLES = 1000  # of metrics whose standard error has no formula
MAX_BATCH = 32
GPU_MEMORY_PART = 8  # the logits of a batch may take 1/8 of a GPU's free memory
CPU_LOGITS_BYTES = 512 * 2**20  # of a batch, where there is no GPU


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTask:
    """A task or a group of tasks with its questions, as lm-eval has loaded it."""

    name: str
    loaded: Any  # what lm-eval's TaskManager.load returns
    data: str | None = None  # the local file; None: the hub
    note: str | None = None  # how the questions differ from lm-eval's own data set


def load_tasks(names: Sequence[str], *, folder: Path | str | None = None) -> list[LoadedTask]:
    """Load tasks with their questions: from the files of a folder, or without one from the hub.

    `zero-shot` stands for LLM-Pruner's seven. Raises `TaskError` for a task that is unknown or cannot be fetched, for
    files that are missing or damaged, and where lm-eval is not installed.
    """
    names = list(dict.fromkeys(each for name in names for each in SHORTHANDS.get(name, (name,))))
    if not names:
        return []
    check_installed(TaskError, "lm_eval", extra="tasks", what=f"tasks={','.join(names)}")
    with _quiet():
        return _load_from_hub(names) if folder is None else _load_local(names, Path(folder))


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[LoadedTask],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, TaskResult]:
    """Score a model on tasks with lm-eval, each on its first `limit` questions; returns task -> result.

    `batch_size` counts answers per forward pass; None takes as many as keep the logits of the longest in memory. Log-
    probabilities are taken in float32 whatever the model's dtype. `progress` is called with answers scored, all answers
    and the task's name. Raises `TaskError` for a limit below 1 and for tasks that lm-eval refuses to run.
    """
    check_least(TaskError, "limit", limit, 1, 200)
    check_least(DataError, "batch_size", batch_size, 1, 8)
    results: dict[str, TaskResult] = {}
    for task in tasks:
        with _quiet() as messages:
            raw = run_lm_eval(model, tokenizer, task, limit=limit, batch_size=batch_size, progress=progress)
        if messages.truncated:
            logger.warning(
                "%s: %d prompts exceed the model's positions and lost their start", task.name, messages.truncated
            )
        results |= read_results(raw, data=task.data, note=task.note)
    return results


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns for a model and one loaded task, the samples included."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for each in task.loaded["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=FEWSHOT_SEED)
        each.build_all_requests(limit=limit)
    requests = [request for each in task.loaded["tasks"].values() for request in each.instances]
    with evaluation_mode(model), matmul_precision(exact=True), half_products(model):
        lm = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets a padding token where it has none
            batch_size=batch_size or _fitting_batch(model, tokenizer, requests),
            softmax_dtype="float32",
        )
        if lm.device.type == "meta":  # weights that accelerate brings from the disk, layer by layer
            lm._device = input_device(model)
        if progress is not None:
            lm.set_cache_hook(_counter(progress, len(requests), task.name))
        try:
            raw: dict[str, Any] = evaluate(lm, task.loaded, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES)
        except (ValueError, NotImplementedError) as error:
            raise TaskError(f"{task.name}: lm-eval does not run it ({one_line(error)})") from error
    return raw


def _load_local(names: Sequence[str], folder: Path) -> list[LoadedTask]:
    """lm-eval's own configuration of each task, with the questions of local files."""
    for name in names:
        if name not in LOCAL:
            raise TaskError(
                f"task {name!r} has no local files{did_you_mean(name, LOCAL, most=3) or '.'} Those that have: "
                f"{', '.join(LOCAL)}. Without --tasks-data it is fetched from the hub"
            )
    files = {name: find_files(name, folder) for name in names}  # all of them before any is read
    import datasets
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[home / path for path in LM_EVAL_FOLDERS])
    tasks = []
    for name, paths in files.items():
        rows = datasets.Dataset.from_list(read_rows(LOCAL[name], paths))
        # Without few-shot examples nothing is read of the split they come from; it has to be there.
        splits = datasets.DatasetDict(train=rows.select([]), validation=rows, test=rows)
        # A group's members keep their own configuration but for what is said here; a lone configuration would not.
        member = {"task": name.removesuffix("_full"), "custom_dataset": lambda splits=splits, **_: splits}
        [task] = manager.load([{"group": "local", "task": [member]}])["tasks"].values()
        tasks.append(LoadedTask(name, {"tasks": {name: task}}, paths[0].name, LOCAL[name].note))
    return tasks


def _load_from_hub(names: Sequence[str]) -> list[LoadedTask]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, [*manager.all_tasks, *SHORTHANDS], most=3) or "."
            raise TaskError(f"task {name!r} is unknown to lm-eval{near} Expected for example --tasks boolq,piqa")
    tasks = []
    for name in names:
        try:
            tasks.append(LoadedTask(name, manager.load([name])))
        except Exception as error:  # whatever the hub, the network, the cache or a task's own code raises
            local = ", or give local files: --tasks-data FOLDER" if name in LOCAL else ""
            raise TaskError(
                f"task {name!r}: its questions cannot be fetched ({one_line(error)}). Check the network{local}"
            ) from error
    return tasks


def _fitting_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Any]) -> int:
    """How many of the longest requests fit in memory at once."""
    texts = ("".join(part for part in request.args if isinstance(part, str)) for request in requests)
    tokens = len(tokenizer(max(texts, key=len), verbose=False)["input_ids"])
    device = input_device(model)
    limit = CPU_LOGITS_BYTES if device.type != "cuda" else torch.cuda.mem_get_info(device)[0] // GPU_MEMORY_PART
    return min(MAX_BATCH, fitting_batch(max(tokens, 1), vocabulary_size(model), limit=limit))


def _counter(progress: Callable[[int, int, str], None], total: int, name: str) -> Any:
    """What stands where lm-eval would cache answers, and counts them."""
    done = itertools.count(1)
    return SimpleNamespace(add_partial=lambda *_: progress(min(next(done), total), total, name))


class _Messages(logging.Handler):
    """Counts lm-eval's warnings of truncated prompts, passes its errors on and drops the rest."""

    truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            logging.getLogger().handle(record)
        elif "exceeds model's max" in record.getMessage():
            self.truncated += 1


@contextmanager
def _quiet() -> Iterator[_Messages]:
    """Without lm-eval's progress bars and its messages below an error; Secateur has its own."""
    lm_eval, messages = logging.getLogger("lm_eval"), _Messages()
    handlers, propagate = lm_eval.handlers, lm_eval.propagate
    lm_eval.handlers, lm_eval.propagate = [messages], False
    try:
        with quiet():
            yield messages
    finally:
        lm_eval.handlers, lm_eval.propagate = handlers, propagate
