"""The loop is transformers' Trainer's; the order of the rows is given, and the loss may have a teacher."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from secateur import processes
from secateur.data.rows import IGNORED, Rows, collate
from secateur.errors import TrainingError
from secateur.evaluation.inference import evaluation_mode
from secateur.evaluation.perplexity import perplexity
from secateur.evaluation.protocols import Protocol
from secateur.models.silence import quiet
from secateur.progress import Progress
from secateur.recovery.callbacks import SCORE, Shown, Steady, got_stuck
from secateur.recovery.checkpoints import (
    last_checkpoint,
    put_weights_in_place,
    read_optimizer_in_place,
    read_state,
    read_weights,
    write_checkpoint,
)
from secateur.recovery.course import Course, Settings, Trained
from secateur.recovery.distillation import KeptTeacher, check_packing, learning_loss
from secateur.recovery.hidden_states import gathered, states_at, states_loss

TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}  # name -> the package it needs
EVALUATION_TOKENS = 1024  # of a batch of validation rows


def train(
    model: nn.Module,
    course: Course,
    settings: Settings,
    folder: Path,
    *,
    logs: Path | None = None,
    report: Progress | None = None,
) -> Trained:
    """Train those weights of the model that ask for a gradient; goes on from the last checkpoint in the folder.

    The model is left in whatever state it is when the training ends; what counts are the checkpoints. TensorBoard
    writes into the folder `logs`. Raises `TrainingError` for a loss or gradient that is NaN or Inf, for a model that
    cannot be trained so, and as `check_surroundings` does.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, ids = AutoModelForCausalLM.from_config(config), torch.arange(8, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 4 > 0, torch.tensor([0, 4, 8]), torch.zeros(2, dtype=torch.int32))
    >>> course = Course(rows, torch.tensor([[0, 1], [1, 0]]), validation=rows, texts={})
    >>> settings = Settings(2, 2, 1, 1e-2, warmup_steps=0, eval_steps=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trained = train(model, course, settings, Path(folder))
    ...     weights = read_weights(trained.checkpoint)
    ...     put_weights_in_place(model, weights)
    >>> trained.steps, [entry["step"] for entry in trained.evaluations], len(weights) == len([*model.parameters()])
    (2, [0, 1, 2], True)
    """
    check_surroundings(settings.track)
    last = last_checkpoint(folder)
    if last is not None and _over(state := read_state(last), settings):
        return _trained(folder, state)
    check_packing(model, course.rows)
    with quiet(), _told(settings, logs or folder / "runs"):
        trainer = RecoveryTrainer(model, course, settings, folder, report)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return _trained(folder, trainer.state)


def check_surroundings(track: str | None = None) -> None:
    """Raise `TrainingError` for a tracker that is unknown or not installed, for DeepSpeed, and for float16.

    >>> check_surroundings("paper")
    Traceback (most recent call last):
    secateur.errors.TrainingError: track='paper' is unknown. Expected one of tensorboard, trackio, wandb: ...
    """
    if track is not None and track not in TRACKERS:
        raise TrainingError(f"track={track!r} is unknown. Expected one of {', '.join(TRACKERS)}: --track tensorboard")
    if track is not None and importlib.util.find_spec(TRACKERS[track]) is None:
        raise TrainingError(f"track={track!r} needs the package {TRACKERS[track]}. Run: pip install {TRACKERS[track]}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise TrainingError(
            "DeepSpeed keeps its state in pickles, which are neither written nor read here. Expected FSDP2, which "
            "shards the same: accelerate launch --config_file docs/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise TrainingError(
            "accelerate is told to compute in fp16, which overflows in training. Expected no word on it, since "
            "secateur says: accelerate launch --mixed_precision no ... (--dtype)"
        )


class RecoveryTrainer(Trainer):
    """Trainer with an order of rows that is given, a loss that may have a teacher, and checkpoints without pickles."""

    def __init__(
        self, model: nn.Module, course: Course, settings: Settings, folder: Path, report: Progress | None
    ) -> None:
        self.course, self.settings, self.folder = course, settings, folder
        self._base = _base_of(model)
        self._names_of_logits = _logits_argument(self._base)
        measured = bool(len(course.validation) or course.texts)
        if settings.gradient_checkpointing:
            _recompute_in_place(model)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.global_batch_size // (settings.micro_batch_size * processes.count()),
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            lr_scheduler_type=settings.lr_scheduler,
            weight_decay=settings.weight_decay,
            bf16=settings.bf16,
            eval_strategy="steps" if measured else "no",
            eval_steps=settings.eval_steps,
            eval_on_start=measured and last_checkpoint(folder) is None,
            save_strategy="steps",
            save_steps=settings.eval_steps,
            metric_for_best_model=SCORE if measured else None,
            greater_is_better=False if measured else None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=settings.track or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=settings.seed,
        )
        flat = course.order.flatten().tolist()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=_Order(flat),
            eval_dataset=_Order(list(range(len(course.validation)))),
            data_collator=self._batch,
            callbacks=[Steady(settings), Shown(course, settings, report)],
        )
        self.remove_callback(PrinterCallback)
        # The loss below is a sum, divided by the tokens of the whole step: Trainer must count them, and not divide.
        self.model_accepts_loss_kwargs = True

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return _with_teacher(self.course.rows, numbers, self.course.teacher, self.course.pad)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, per token of the whole step."""
        total = self._summed_loss(model, inputs)
        # The gradients of the processes are averaged, and the tokens were counted over all of them.
        loss = total * self.accelerator.num_processes / max(float(num_items_in_batch), 1.0)
        return (loss, None) if return_outputs else loss

    def _summed_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        inputs = dict(inputs)
        inputs.pop("shift_labels")
        labels = inputs.pop("labels")
        teacher = {name: inputs.pop(name) for name in ("kept", "logp", "rest", "states") if name in inputs}
        states, learned = teacher.pop("states", None), labels != IGNORED
        if self._names_of_logits is not None:
            # What comes before the first label of all rows needs no logits: of prompts, most of the vocabulary's work.
            places = torch.nonzero((labels != IGNORED).any(dim=0))
            first = int(places[0]) if len(places) else labels.shape[1] - 1
            labels = labels[:, first:]
            inputs[self._names_of_logits] = labels.shape[1]
        compared = () if states is None else self.course.compared
        with gathered(self._base, compared) as given:
            logits = model(**inputs, use_cache=False).logits
        loss = learning_loss(
            logits,
            labels,
            teacher or None,
            share=self.settings.teacher_weight,
            temperature=self.settings.temperature,
        )
        if states is None or not learned.any():
            return loss
        return loss + self.settings.hidden_states_weight * states_loss(states_at(given, compared, learned), states)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Measure the loss on validation rows and the perplexity of held-out texts; every process measures all."""
        course = self.course
        model: Any = self.model
        metrics: dict[str, float] = {}
        with evaluation_mode(model), torch.no_grad(), self.accelerator.autocast():
            if len(course.validation):
                metrics["eval_validation"] = self._validation_loss(model)
            logs = {}
            for name, ids in course.texts.items():
                found = perplexity(model, ids, data=name, protocol=Protocol(course.window))
                metrics[f"eval_perplexity_{name}"], logs[name] = found.ppl, found.nll
        # Held-out text tells of overfitting to the rows what rows of the same kind cannot.
        metrics[SCORE] = sum(logs.values()) / len(logs) if logs else metrics["eval_validation"]
        if not math.isfinite(metrics[SCORE]):
            raise TrainingError(
                f"the loss on validation rows is {metrics[SCORE]} after step {self.state.global_step}. Expected a "
                "finite one; train with a smaller rate (--learning-rate), or with --dtype float32"
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self, model: nn.Module) -> float:
        """In nats per token that is learned."""
        course, device = self.course, self.args.device
        total, count = 0.0, 0
        for numbers in _of_size(course.validation, EVALUATION_TOKENS):
            batch = _with_teacher(course.validation, numbers, course.validation_teacher, course.pad)
            count += int((batch["labels"] != IGNORED).sum())
            total += float(self._summed_loss(model, {name: x.to(device) for name, x in batch.items()}))
        return total / max(count, 1)

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        own = self.accelerator.unwrap_model(model)
        write_checkpoint(self.folder, own, self.optimizer, self.lr_scheduler, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = self.accelerator.unwrap_model(self.model if model is None else model)
        put_weights_in_place(own, read_weights(Path(resume_from_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            own = self.accelerator.unwrap_model(self.model)
            read_optimizer_in_place(Path(checkpoint), own, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is nothing to load: every step is seeded by its number."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bfloat16 needs no scaling, and float16 is refused."""


class _Order(Dataset[int]):
    """Numbers of rows, one after the other."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> int:
        return self.numbers[place]


def _with_teacher(rows: Rows, numbers: Sequence[int], teacher: KeptTeacher | None, pad: int) -> dict[str, Tensor]:
    batch = collate(rows, numbers, pad=pad)
    # Under this name, too, which tells Trainer that they stand where they are predicted.
    batch["shift_labels"] = batch["labels"]
    return batch if teacher is None else batch | teacher.of(numbers)


def _of_size(rows: Rows, tokens: int) -> Iterator[list[int]]:
    """All rows, the longest first, in batches of at most so many tokens with the padding, or of one row."""
    lengths = rows.lengths.tolist()
    batch: list[int] = []
    for row in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _base_of(model: nn.Module) -> Any:
    """The model itself, without what an adapter puts around it."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def _logits_argument(model: nn.Module) -> str | None:
    """By which argument a model computes the logits of the last places only; None where it has none."""
    known = inspect.signature(model.forward).parameters
    return "logits_to_keep" if "logits_to_keep" in known else None


def _recompute_in_place(model: nn.Module) -> None:
    base = _base_of(model)
    enable: Callable[[], None] = getattr(base, "activation_checkpointing_enable", None) or (
        lambda: base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    )
    try:
        enable()
    except ValueError as error:
        raise TrainingError(
            f"{type(base).__name__} cannot compute layers again; leave out --gradient-checkpointing"
        ) from error


@contextmanager
def _told(settings: Settings, logs: Path) -> Iterator[None]:
    """Tell by the environment what TensorBoard and Trainer ask it for; a launcher may have said otherwise."""
    said = {
        "TENSORBOARD_LOGGING_DIR": os.environ.get("TENSORBOARD_LOGGING_DIR", str(logs)),
        "ACCELERATE_MIXED_PRECISION": "bf16" if settings.bf16 else "no",
    }
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _over(state: TrainerState, settings: Settings) -> bool:
    """Whether a training was done when its last checkpoint was written."""
    return state.global_step >= settings.steps or got_stuck(state, settings.patience)


def _trained(folder: Path, state: TrainerState) -> Trained:
    best = state.best_global_step or state.global_step
    evaluations = tuple(
        {
            "step": entry["step"],
            "validation": entry.get("eval_validation"),
            "perplexity": {
                name.removeprefix("eval_perplexity_"): value
                for name, value in entry.items()
                if name.startswith("eval_perplexity_")
            },
            "score": entry[SCORE],
        }
        for entry in state.log_history
        if SCORE in entry
    )
    loss = tuple((int(entry["step"]), entry["loss"]) for entry in state.log_history if "loss" in entry)
    return Trained(folder / f"checkpoint-{best}", best, state.global_step, loss, evaluations)
