"""What a training reads, and what it results in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.data.rows import Rows
from secateur.recovery.teacher_cache import TeacherCache


@dataclass(frozen=True, slots=True, eq=False)
class TrainingInputs:
    """Rows in their order, rows and texts to evaluate on, and the outputs of a teacher."""

    rows: Rows
    order_SB: Tensor  # int64, steps x rows of a step
    validation: Rows
    texts: Mapping[str, Tensor]  # held-out: name -> ids_T
    teacher: TeacherCache | None = None
    validation_teacher: TeacherCache | None = None
    compared_layers: tuple[str, ...] = ()  # paths of the student's layers whose hidden states are learned
    pad: int = 0  # token id

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.order_SB)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The best checkpoint, and what was measured on the way."""

    checkpoint: Path  # the best by held-out text or validation; the last where nothing was measured
    best_step: int
    steps: int  # done; fewer than planned after early stopping
    loss: tuple[tuple[int, float], ...]  # (step, nats per token)
    evaluations: tuple[Mapping[str, Any], ...]  # step, validation, perplexity by text, score
