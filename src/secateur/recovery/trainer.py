"""Model and rows -> trained weights in checkpoints: transformers' Trainer, with a fixed order of rows and our loss."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, patch_environment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from secateur import processes
from secateur.data.rows import IGNORED, Rows, collate, length_sorted_batches
from secateur.errors import TrainingError
from secateur.evaluation.inference import evaluation_mode
from secateur.evaluation.perplexity import perplexity
from secateur.evaluation.protocols import Protocol
from secateur.models.precision import bfloat16_products, width_multiple
from secateur.models.silence import quiet
from secateur.progress import Progress, free_at_once
from secateur.recovery import checkpoints
from secateur.recovery.callbacks import (
    PERPLEXITY,
    SCORE,
    VALIDATION,
    Checkpoints,
    DivergedError,
    ReportProgress,
    SeedSteps,
    StopTraining,
    best_step,
    stopped_early,
)
from secateur.recovery.distillation import distillation_loss, nll_loss
from secateur.recovery.options import EVAL_WINDOW, RecoverOptions
from secateur.recovery.packing import check_packing
from secateur.recovery.teacher_cache import TeacherCache

VALIDATION_TOKENS = 1024  # of a batch of validation rows
GATHERED_BYTES = 2**20  # and more are what layers are gathered into


@dataclass(frozen=True, slots=True, eq=False)
class TrainingInputs:
    """Rows in their order, rows and texts to evaluate on, and the outputs of a teacher."""

    rows: Rows
    order_SB: Tensor  # int64, steps x rows of a step
    validation: Rows
    texts: Mapping[str, Tensor]  # held-out: name -> ids_T
    teacher: TeacherCache | None = None
    validation_teacher: TeacherCache | None = None
    pad: int = 0  # token id


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The best checkpoint, and what was measured on the way."""

    checkpoint: Path  # the best by held-out text or validation; the last where nothing was measured
    best_step: int
    steps: int  # done; fewer than planned after early stopping
    loss: tuple[tuple[int, float], ...]  # (step, nats per token)
    evaluations: tuple[Mapping[str, Any], ...]  # step, validation, perplexity by text, score
    diverged: str | None = None  # what became NaN or Inf after the last checkpoint


def train(
    model: nn.Module,
    inputs: TrainingInputs,
    options: RecoverOptions,
    folder: Path,
    *,
    bf16: bool = False,
    logs: Path | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train the weights of the model that require a gradient; resumes from the last checkpoint in the folder.

    `options` have their defaults resolved (`resolve_options`). With `bf16`, products are taken in bfloat16. TensorBoard
    writes into the folder `logs`. The result is in the checkpoints; the model is left as the last step leaves it. A
    loss or gradient that is NaN or Inf ends the training: `diverged` says so, and where there is no checkpoint yet,
    `DivergedError` is raised. Raises `TrainingError` for a model that cannot be trained so.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, ids = AutoModelForCausalLM.from_config(config), torch.arange(8, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 4 > 0, torch.tensor([0, 4, 8]), torch.zeros(2, dtype=torch.int32))
    >>> inputs = TrainingInputs(rows, torch.tensor([[0, 1], [1, 0]]), validation=rows, texts={})
    >>> options = RecoverOptions(method="full", global_batch_size=2, micro_batch_size=1, warmup_steps=0, eval_steps=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = train(model, inputs, options, Path(folder))
    ...     checkpoints.load_weights_in_place(model, result.checkpoint)
    >>> result.steps, [entry["step"] for entry in result.evaluations]
    (2, [0, 1, 2])
    """
    checkpoint = checkpoints.last_checkpoint(folder)
    if checkpoint is not None:
        state = checkpoints.load_state(checkpoint)
        if state.global_step >= len(inputs.order_SB) or stopped_early(state, options.patience):
            return _result(folder, state)
    check_packing(model, inputs.rows)
    if options.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    saving = Checkpoints(folder, checkpoint, every=options.eval_steps or len(inputs.order_SB))
    callbacks: list[TrainerCallback] = [SeedSteps(options.seed), StopTraining(options), saving]
    if progress is not None:
        callbacks.append(ReportProgress(inputs.rows.lengths_R[inputs.order_SB].sum(dim=1), progress))
    environment = {  # which TensorBoard and accelerate read; a launcher may have set another precision
        "TENSORBOARD_LOGGING_DIR": os.environ.get("TENSORBOARD_LOGGING_DIR", str(logs or folder / "runs")),
        "ACCELERATE_MIXED_PRECISION": "bf16" if bf16 and processes.sharded() else "no",
    }
    with quiet(), patch_environment(**environment):
        arguments = _training_arguments(model, inputs, options, folder, bf16, resumed=checkpoint is not None)
        _shard_on_cpus(arguments)
        arguments._n_gpu = min(1, arguments.n_gpu)  # of those seen; Trainer would copy the model to all of them
        trainer = RecoveryTrainer(model, inputs, options, arguments, callbacks, bf16=bf16)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except DivergedError as error:
            if (checkpoint := checkpoints.last_checkpoint(folder)) is None:
                raise
            return replace(_result(folder, checkpoints.load_state(checkpoint)), diverged=str(error))
    return _result(folder, trainer.state)


class RecoveryTrainer(Trainer):
    """Trainer with a fixed order of rows, a loss that may have a teacher, and checkpoints without pickles."""

    def __init__(
        self,
        model: nn.Module,
        inputs: TrainingInputs,
        options: RecoverOptions,
        arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
        *,
        bf16: bool,
    ) -> None:
        self.inputs, self.options, self.bf16 = inputs, options, bf16
        self.width_multiple = multiple = width_multiple(arguments.device.type, bf16=bf16)
        self._base = _base_model(model)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self._base.forward).parameters
        order: Any = inputs.order_SB.flatten().tolist()  # numbers of rows, which the collator reads from `inputs`
        unused: Any = range(len(inputs.validation))  # Trainer wants to have a data set; `evaluate` reads `inputs`
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=order,
            eval_dataset=unused,
            data_collator=lambda numbers: _batch(
                inputs.rows, numbers, inputs.teacher, pad=inputs.pad, multiple=multiple
            ),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # The loss below is a sum, divided by the tokens of the whole step: Trainer must count them, and not divide.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[int]:
        """Read rows in the given order: it is shuffled already, and the same after a resume."""
        order: Any = self.train_dataset
        loader: DataLoader[int] = self.accelerator.prepare(
            DataLoader(
                order,
                batch_size=self.args.per_device_train_batch_size,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )
        return loader

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch, per label of the whole step."""
        total = self._summed_loss(model, inputs)
        # Trainer averages gradients over processes, and counts labels over all of them.
        loss = total * self.accelerator.num_processes / max(float(num_items_in_batch), 1.0)
        return (loss, None) if return_outputs else loss

    def _summed_loss(self, model: nn.Module, batch: Any) -> Tensor:
        batch = dict(batch)
        batch.pop("shift_labels")
        labels_BT = batch.pop("labels")
        teacher = {name: batch.pop(name) for name in ("tokens", "logp", "rest") if name in batch}
        if self._takes_logits_to_keep:
            # Logits before the first label of all rows are not needed: for prompts, most of the output layer's work.
            columns = torch.nonzero((labels_BT != IGNORED).any(dim=0))
            first = int(columns[0]) if len(columns) else labels_BT.shape[1] - 1
            labels_BT = labels_BT[:, first:]
            batch["logits_to_keep"] = labels_BT.shape[1]
        with self._precision():
            logits_BTV = model(**batch, use_cache=False).logits
        if not teacher:
            return nll_loss(logits_BTV, labels_BT)
        options = self.options
        return distillation_loss(
            logits_BTV, labels_BT, teacher, teacher_weight=options.teacher_weight, temperature=options.temperature
        )

    def _precision(self) -> AbstractContextManager[None]:
        # Trainer's own would copy all logits to float32; shards it gathers in bfloat16.
        return bfloat16_products(self.args.device.type, enabled=self.bf16)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Measure the validation loss and the perplexity of held-out texts; every process measures all of it."""
        inputs = self.inputs
        model: Any = self.model
        metrics: dict[str, float] = {}
        nlls = []
        with evaluation_mode(model), torch.no_grad(), self._precision():
            if len(inputs.validation):
                metrics[VALIDATION] = self._validation_loss(model)
            for name, ids_T in inputs.texts.items():
                measured = perplexity(model, ids_T, data=name, protocol=Protocol(EVAL_WINDOW))
                metrics[f"{PERPLEXITY}{name}"] = measured.ppl
                nlls.append(measured.nll)
        # Held-out text shows overfitting to the rows, which rows of the same kind do not.
        metrics[SCORE] = sum(nlls) / len(nlls) if nlls else metrics[VALIDATION]
        if not math.isfinite(metrics[SCORE]):
            raise DivergedError(
                f"the loss on validation rows is {metrics[SCORE]} after step {self.state.global_step}. Expected a "
                "finite one; train with a smaller learning rate (--learning-rate), or with --dtype float32"
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self, model: nn.Module) -> float:
        """Return the loss in nats per label."""
        inputs, device = self.inputs, self.args.device
        rows = inputs.validation
        total, count = 0.0, 0
        for numbers in length_sorted_batches(rows, range(len(rows)), VALIDATION_TOKENS):
            batch = _batch(rows, numbers, inputs.validation_teacher, pad=inputs.pad, multiple=self.width_multiple)
            count += int((batch["labels"] != IGNORED).sum())
            total += float(self._summed_loss(model, {name: x.to(device) for name, x in batch.items()}))
        return total / max(count, 1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer has no public hook for the format of checkpoints; `Checkpoints` loads the weights, too.
        pass


def _shard_on_cpus(arguments: TrainingArguments) -> None:
    """Have accelerate shard over processes on CPUs where FSDP is asked for; it does so over accelerators alone."""
    if not processes.sharded() or arguments.device.type != "cpu":
        return
    state: Any = arguments.distributed_state
    state.distributed_type = DistributedType.MULTI_GPU
    free_at_once(GATHERED_BYTES)


def _training_arguments(
    model: nn.Module, inputs: TrainingInputs, options: RecoverOptions, folder: Path, bf16: bool, *, resumed: bool
) -> TrainingArguments:
    evaluates = bool(len(inputs.validation) or inputs.texts)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=len(inputs.order_SB),
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.global_batch_size // (options.micro_batch_size * processes.count()),
        learning_rate=options.rate(),
        warmup_steps=options.warmup_steps or 0,
        lr_scheduler_type=options.lr_scheduler,
        weight_decay=options.weight_decay,
        bf16=bf16 and processes.sharded(),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_steps,
        eval_on_start=evaluates and not resumed,
        save_strategy="no",  # `Checkpoints` saves
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=options.track or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )


def _batch(
    rows: Rows, numbers: Sequence[int], teacher: TeacherCache | None, *, pad: int, multiple: int
) -> dict[str, Tensor]:
    batch = collate(rows, numbers, pad=pad, multiple=multiple)
    batch["shift_labels"] = batch["labels"]  # this name tells Trainer that labels stand where they are predicted
    return batch if teacher is None else batch | teacher.read(numbers)


def _base_model(model: nn.Module) -> Any:
    """Return the model without an adapter around it."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    base = _base_model(model)
    try:
        if hasattr(base, "activation_checkpointing_enable"):  # newer transformers
            base.activation_checkpointing_enable()
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise TrainingError(
            f"{type(base).__name__} has no gradient checkpointing; leave out --gradient-checkpointing"
        ) from error


def _result(folder: Path, state: TrainerState) -> TrainingResult:
    best = best_step(state) or state.global_step
    evaluations = tuple(
        {
            "step": entry["step"],
            "validation": entry.get(VALIDATION),
            "perplexity": {
                name.removeprefix(PERPLEXITY): value for name, value in entry.items() if name.startswith(PERPLEXITY)
            },
            "score": entry[SCORE],
        }
        for entry in state.log_history
        if SCORE in entry
    )
    loss = tuple((int(entry["step"]), entry["loss"]) for entry in state.log_history if "loss" in entry)
    return TrainingResult(folder / f"checkpoint-{best}", best, state.global_step, loss, evaluations)
