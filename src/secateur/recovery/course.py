"""What a training is given, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.data.rows import Rows
from secateur.recovery.distillation import KeptTeacher


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train."""

    steps: int
    global_batch_size: int  # rows of a step, over all processes
    micro_batch_size: int  # rows that one process computes at once
    learning_rate: float  # the highest
    warmup_steps: int  # steps over which the rate rises
    lr_scheduler: str = "cosine"  # how it falls afterwards: cosine or linear, to 0
    weight_decay: float = 0.0
    eval_steps: int = 10  # steps between evaluations, which are also checkpoints
    patience: int | None = 3  # evaluations without a better one, after which it stops; None: it does not
    bf16: bool = False  # products in bfloat16, everything that adds up in float32
    gradient_checkpointing: bool = False  # layers once more in the backward pass, for less memory
    teacher_weight: float = 1.0  # of the teacher in the loss, where there is one
    temperature: float = 1.0
    hidden_states_weight: float = 0.0  # the weight of the teacher's hidden states in the loss
    seed: int = 0
    track: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """What is read in a training: rows in their order, rows and texts that judge it, and what a teacher gave."""

    rows: Rows
    order: Tensor  # steps x batch, numbers of rows
    validation: Rows
    texts: Mapping[str, Tensor]  # name -> token ids of a held-out text
    window: int = 128  # tokens, of a text's windows
    teacher: KeptTeacher | None = None
    validation_teacher: KeptTeacher | None = None
    compared: tuple[str, ...] = ()  # layers whose hidden states are to be the teacher's, which has kept them
    pad: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to."""

    checkpoint: Path  # the best, by held-out text or validation; the last where nothing was measured
    best_step: int
    steps: int  # that were done, fewer than planned where it stopped early
    loss: tuple[tuple[int, float], ...]  # after every step
    evaluations: tuple[Mapping[str, Any], ...]  # step, validation, perplexity by text, score
