"""Models, one after the other -> perplexities, accuracies and samples of text, each beside the first model's.

The first model is the dense one, as a rule. All models see the same windows and the same questions, so they are
compared window by window and question by question (`significance.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.inference import sample_text
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.perplexity import Perplexity, bits_difference, evaluate, loss_difference
from secateur.evaluation.task_results import TaskResult, mean_accuracy, task_difference
from secateur.evaluation.tasks import LoadedTask, load_tasks, zero_shot
from secateur.evaluation.texts import encode_text, first_bytes, read_texts
from secateur.progress import ProgressBars


@dataclass(frozen=True, slots=True)
class EvaluationInputs:
    """The options of an evaluation with what they name: texts and questions are read once, for all models."""

    options: EvaluationOptions
    texts: Mapping[str, str]  # name -> text
    tasks: tuple[LoadedTask, ...]


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """What was measured of one model."""

    model: str
    perplexity: tuple[Perplexity, ...] = ()  # by text and protocol
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)  # prompt -> its greedy continuation
    weight_bytes: int | None = None  # in memory
    file_bytes: int | None = None  # None where there are no files

    def perplexity_like(self, other: Perplexity) -> Perplexity | None:
        """The perplexity on the same text by the same protocol; None where there is none."""
        return next((p for p in self.perplexity if (p.data, p.protocol) == (other.data, other.protocol)), None)


def load_inputs(options: EvaluationOptions) -> EvaluationInputs:
    """Read the texts and the questions, so that what is missing is known before a model is loaded.

    Raises `DataError` for a text, and `TaskError` for a task, that cannot be read.
    """
    defaults = EvaluationOptions()
    about_texts = options.texts or (options.protocols, options.max_tokens) != (defaults.protocols, defaults.max_tokens)
    texts = read_texts(options.texts) if about_texts or not (options.tasks or options.prompts) else {}
    return EvaluationInputs(options, texts, tuple(load_tasks(options.tasks, folder=options.tasks_data)))


def of_same_text(
    inputs: EvaluationInputs, first: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> EvaluationInputs:
    """The inputs for a model whose tokenizer is not that of the first model: as much text as that one reads."""
    limit = inputs.options.max_tokens
    if limit is None or tokenizer.get_vocab() == first.get_vocab():
        return inputs
    texts = {
        name: first_bytes(text, int(encode_text(first, text).byte_ends_T[:limit][-1]))
        for name, text in inputs.texts.items()
    }
    return replace(inputs, options=replace(inputs.options, max_tokens=None), texts=texts)


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: EvaluationInputs,
    *,
    bars: ProgressBars,
    file_bytes: int | None = None,
) -> ModelEvaluation:
    """Evaluate one loaded model; the bytes of its files are for the record. Raises as what it calls does."""
    options = inputs.options
    perplexity: list[Perplexity] = []
    if inputs.texts:
        with bars(f"evaluate {name}") as progress:
            perplexity = evaluate(
                model,
                tokenizer,
                inputs.texts,
                protocols=options.protocols,
                max_tokens=options.max_tokens,
                batch_size=options.batch_size,
                progress=progress,
            )
    tasks: dict[str, TaskResult] = {}
    for task in inputs.tasks:
        with bars(f"{task.name} {name}") as progress:
            tasks |= zero_shot(
                model, tokenizer, [task], limit=options.limit, batch_size=options.batch_size, progress=progress
            )
    with bars(f"write {name}"):
        samples = {
            prompt: sample_text(model, tokenizer, prompt, new_tokens=options.new_tokens) for prompt in options.prompts
        }
    return ModelEvaluation(name, tuple(perplexity), tasks, samples, weight_bytes(model), file_bytes)


def as_json(evaluations: Sequence[ModelEvaluation]) -> dict[str, Any]:
    """Plain data, as `secateur evaluate --json` writes it; every model but the first stands beside the first.

    >>> as_json([ModelEvaluation("demo")])["results"][0]["model"]
    'demo'
    """
    return {"results": [_as_json(each, evaluations[0] if number else None) for number, each in enumerate(evaluations)]}


def _as_json(evaluation: ModelEvaluation, first: ModelEvaluation | None) -> dict[str, Any]:
    perplexity = [each.to_json() for each in evaluation.perplexity]
    tasks = {name: result.to_json() for name, result in evaluation.tasks.items()}
    if first is not None:
        for entry, each in zip(perplexity, evaluation.perplexity, strict=True):
            like = first.perplexity_like(each)
            if (difference := loss_difference(each, like)) is not None:
                entry["against"] = {"model": first.model, **asdict(difference)}
            elif (bits := bits_difference(each, like)) is not None:
                entry["against"] = {"model": first.model, "bits_per_byte": bits}
        for name, result in evaluation.tasks.items():
            if (difference := task_difference(result, first.tasks.get(name))) is not None:
                tasks[name]["against"] = {"model": first.model, **asdict(difference)}
    return {
        "model": evaluation.model,
        "perplexity": perplexity,
        "tasks": tasks,
        "tasks_mean": mean_accuracy(evaluation.tasks, first.tasks if first is not None else None),
        "samples": [{"prompt": prompt, "text": text} for prompt, text in evaluation.samples.items()],
        "weight_bytes": evaluation.weight_bytes,
        "file_bytes": evaluation.file_bytes,
    }
