"""Seconds -> how many optimizer steps fit into them, by timing what a step does on rows of the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import processes
from secateur.data.rows import IGNORED, Rows, collate
from secateur.evaluation.inference import evaluation_mode, input_device
from secateur.models.precision import bfloat16_products, half_products, width_multiple
from secateur.recovery.distillation import distillation_loss, nll_loss
from secateur.recovery.setup import TrainingSetup, evaluations_of
from secateur.recovery.teacher_cache import TeacherOutputs, save_teacher_outputs

TIMED_STEPS = 4
RESERVE = 0.05  # of the time, for what is not timed: optimizer steps and checkpoints
LOADS = 3  # what is left to do but to train, in times that the model takes to load: it is loaded twice, and written


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds per token: of training on it, of the trained model and of the teacher reading it; and to load a model."""

    training: float
    reading: float
    teaching: float
    loading: float

    def steps(self, seconds: float, setup: TrainingSetup, *, taught: bool) -> int:
        """How many steps of `setup` fit into so many seconds, at least one; of several processes the slowest counts.

        All evaluations are taken off, and unless the rows are `taught`, what the teacher takes for them.
        """
        teaching = 0.0 if taught else self.teaching
        left = seconds * (1 - RESERVE) - LOADS * self.loading
        left -= int(setup.data.validation.lengths_R.sum()) * teaching
        evaluation = setup.evaluated * self.reading
        left -= evaluation * (evaluations_of(left, evaluation) + 1)  # and the one before the first step
        in_step = setup.data.tokens_per_row * setup.options.global_batch_size / processes.count()  # in each process
        return max(1, -processes.largest(-int(left / (in_step * (self.training + teaching)))))


def pace_of(
    setup: TrainingSetup, student: Callable[[], nn.Module], teacher: Callable[[], PreTrainedModel] | None
) -> Pace:
    """Time the student with its gradients, the student alone, and what the teacher reads and saves.

    On the rows of the first steps; the weights do not change. The two are loaded one after the other, as a training
    has them in memory.
    """
    rows = setup.data.train
    numbers = setup.order_SB[:TIMED_STEPS].flatten().unique()
    chosen = rows.select(numbers[rows.lengths_R[numbers].argsort(descending=True)])  # as within a step
    top_k = 0 if teacher is None else setup.options.top_k
    training, reading, loading = _student_pace(setup, student, chosen, top_k)
    teaching = 0.0
    if teacher is not None:
        dense, outputs = teacher(), TeacherOutputs(top_k, setup.options.temperature)
        with TemporaryDirectory() as folder:
            teaching = _seconds_per_token(
                lambda: save_teacher_outputs(lambda: dense, chosen, Path(folder), outputs), chosen
            )
    return Pace(training, reading, teaching, loading)


def _student_pace(
    setup: TrainingSetup, student: Callable[[], nn.Module], rows: Rows, top_k: int
) -> tuple[float, float, float]:
    """Seconds per token of training and of reading, and seconds to load the student, which is gone afterwards."""
    start = time.monotonic()
    model, batch = student(), setup.options.micro_batch_size
    loading = time.monotonic() - start
    some = rows.select(torch.arange(min(batch, len(rows))))
    multiple = width_multiple(input_device(model).type, bf16=setup.bf16)
    with bfloat16_products(input_device(model).type, enabled=setup.bf16), half_products(model):
        _train(model, some, batch, top_k, multiple)  # until memory is there
        training = _seconds_per_token(lambda: _train(model, rows, batch, top_k, multiple), rows)
        with evaluation_mode(model), torch.no_grad():
            reading = _seconds_per_token(lambda: _loss(model, some, range(len(some)), top_k, multiple), some)
    return training, reading, loading


def _train(model: nn.Module, rows: Rows, micro_batch_size: int, top_k: int, multiple: int) -> None:
    for first in range(0, len(rows), micro_batch_size):
        loss: Any = _loss(model, rows, range(first, min(first + micro_batch_size, len(rows))), top_k, multiple)
        loss.backward()
    model.zero_grad()


def _loss(model: nn.Module, rows: Rows, numbers: range, top_k: int, multiple: int) -> Tensor:
    """The loss beside a teacher that has so many top tokens, all alike; none: that of the labels."""
    device = input_device(model)
    batch = {name: tensor.to(device) for name, tensor in collate(rows, numbers, pad=0, multiple=multiple).items()}
    labels_BT = batch.pop("labels")
    logits_BTV, count = model(**batch, use_cache=False).logits, int((labels_BT != IGNORED).sum())
    if not top_k:
        return nll_loss(logits_BTV, labels_BT) / max(1, count)
    tokens_K = torch.arange(min(top_k, logits_BTV.shape[-1]), device=device)
    logp_K = torch.full_like(tokens_K, -math.log(len(tokens_K)), dtype=torch.float32)
    teacher = {"tokens": tokens_K.expand(count, -1), "logp": logp_K.expand(count, -1), "rest": logp_K.new_zeros(count)}
    return distillation_loss(logits_BTV, labels_BT, teacher, teacher_weight=0.5) / max(1, count)


def _seconds_per_token(run: Callable[[], object], rows: Rows) -> float:
    """Seconds that it takes, per token of the rows."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / int(rows.lengths_R.sum())
