"""Trainer callbacks: a seed for every step, errors for NaN, early stopping, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState

from secateur import processes
from secateur.errors import TrainingError
from secateur.progress import Progress
from secateur.recovery import checkpoints
from secateur.recovery.options import RecoverOptions

SCORE = "eval_score"  # the best checkpoint has the lowest
PERPLEXITY = "eval_perplexity_"  # before the name of a held-out text
VALIDATION = "eval_validation"


class DivergedError(TrainingError):
    """A loss or a gradient that is NaN or Inf."""


class SeedSteps(TrainerCallback):
    """Seed every step by its number, so that a resumed run draws the same dropout."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seed the step."""
        torch.manual_seed((self.seed * 1_000_003 + state.global_step) * 1009 + processes.rank())


class StopTraining(TrainerCallback):
    """Raise `DivergedError` for NaN or Inf; stop early where evaluations do not improve."""

    def __init__(self, options: RecoverOptions) -> None:
        self.options = options

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Check the loss and the gradient norm."""
        for key, name in (("loss", "loss"), ("grad_norm", "gradient")):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise DivergedError(
                    f"the {name} is {value} at step {state.global_step}. Expected a finite one; train with a smaller "
                    f"learning rate (--learning-rate {self.options.rate() / 3:.1g}), or with --dtype float32"
                )

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop after `patience` evaluations without improvement."""
        if stopped_early(state, self.options.patience):
            control.should_training_stop = True


class Checkpoints(TrainerCallback):
    """Save a checkpoint with every evaluation, or as often where there is none; load the one that is resumed from."""

    def __init__(self, folder: Path, resumed: Path | None, *, every: int) -> None:
        self.folder, self.resumed, self.every = folder, resumed, every

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Load the weights, the optimizer and the schedule."""
        if self.resumed is not None:
            model = _unwrapped(about["model"])
            checkpoints.load_weights_in_place(model, self.resumed)
            checkpoints.load_optimizer_in_place(self.resumed, model, about["optimizer"], about["lr_scheduler"])

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Save after the evaluation of a step."""
        if state.global_step:
            self._save(state, about)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Save after a step where nothing is evaluated."""
        is_due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if args.eval_strategy == "no" and "loss" in (about["logs"] or {}) and is_due:
            self._save(state, about)

    def _save(self, state: TrainerState, about: Mapping[str, Any]) -> None:
        model, optimizer, schedule = (about[name] for name in ("model", "optimizer", "lr_scheduler"))
        checkpoints.save_checkpoint(self.folder, _unwrapped(model), optimizer, schedule, state, best=best_step(state))


def _unwrapped(model: Any) -> Any:
    """The model without what spreads it over processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class ReportProgress(TrainerCallback):
    """Report each step with the latest loss, speed and evaluation."""

    def __init__(self, tokens_S: Tensor, progress: Progress) -> None:
        self.tokens_before = [0, *tokens_S.cumsum(0).tolist()]  # read before each step
        self.progress = progress
        self.start, self.first_step = 0.0, 0
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the first step and, of a resumed run, what was measured last."""
        self.start, self.first_step = time.perf_counter(), state.global_step
        for entry in state.log_history:
            self.latest.update(entry)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Report."""
        latest = self.latest
        latest.update(logs or {})
        parts = []
        if "loss" in latest:
            tokens = self.tokens_before[state.global_step] - self.tokens_before[self.first_step]
            parts += [f"loss {latest['loss']:.3f}", f"{tokens / (time.perf_counter() - self.start):,.0f} tokens/s"]
        parts += [
            f"{name.removeprefix(PERPLEXITY)} {value:.1f}"
            for name, value in latest.items()
            if name.startswith(PERPLEXITY)
        ]
        if VALIDATION in latest:
            parts.append(f"validation {latest[VALIDATION]:.3f}")
        self.progress(state.global_step, len(self.tokens_before) - 1, "  ".join(parts))


def best_step(state: TrainerState) -> int | None:
    """The step after the first with the lowest score; None where nothing was evaluated."""
    scores = {int(entry["step"]): entry[SCORE] for entry in state.log_history if SCORE in entry and entry["step"]}
    return min(scores, key=lambda step: scores[step]) if scores else None


def stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether `patience` evaluations came after the best one; the one before the first step counts."""
    scores = [entry[SCORE] for entry in state.log_history if SCORE in entry]
    return patience is not None and len(scores) - 1 - scores.index(min(scores)) >= patience if scores else False
