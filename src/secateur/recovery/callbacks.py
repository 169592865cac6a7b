"""What happens beside the steps of a training: seeds, stops, and the line that says how it goes."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from secateur import processes
from secateur.errors import TrainingError
from secateur.progress import Progress
from secateur.recovery.course import Course, Settings

SCORE = "eval_score"  # what the best checkpoint has least of


class Steady(TrainerCallback):
    """Seeds every step, and stops where the loss is no number or nothing gets better."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seed the step by its number."""
        torch.manual_seed((self.settings.seed * 1_000_003 + state.global_step) * 1009 + processes.rank())

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Raise `TrainingError` for a loss or gradient that is no number."""
        for name, called in (("loss", "loss"), ("grad_norm", "gradient")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"the {called} is {value} at step {state.global_step}. Expected a finite one; train with a smaller "
                    f"rate (--learning-rate {self.settings.learning_rate / 3:.1g}), or with --dtype float32"
                )

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where nothing has become better for too long."""
        if got_stuck(state, self.settings.patience):
            control.should_training_stop = True


class Shown(TrainerCallback):
    """Says after every step how it goes."""

    def __init__(self, course: Course, settings: Settings, report: Progress | None) -> None:
        lengths = course.rows.lengths[course.order].sum(dim=1)
        self.tokens = [0, *lengths.cumsum(0).tolist()]  # that are read before each step
        self.settings, self.report = settings, report
        self.began, self.first = 0.0, 0
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note where it begins, which need not be the first step."""
        self.began, self.first = time.perf_counter(), state.global_step
        for entry in state.log_history:  # of a training that goes on
            self.latest.update(entry)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Say what was measured last."""
        if self.report is None:
            return
        latest = self.latest
        latest.update(logs or {})
        said = []
        if "loss" in latest:
            rate = (self.tokens[state.global_step] - self.tokens[self.first]) / (time.perf_counter() - self.began)
            said += [f"loss {latest['loss']:.3f}", f"{rate:,.0f} tokens/s"]
        said += [
            f"{name.removeprefix('eval_perplexity_')} {value:.1f}"
            for name, value in latest.items()
            if name.startswith("eval_perplexity_")
        ]
        if "eval_validation" in latest:
            said.append(f"validation {latest['eval_validation']:.3f}")
        self.report(state.global_step, self.settings.steps, "  ".join(said))


def got_stuck(state: TrainerState, patience: int | None) -> bool:
    """Whether so many evaluations came after the best one; the one before the first step counts."""
    scores = [entry[SCORE] for entry in state.log_history if SCORE in entry]
    return patience is not None and len(scores) - 1 - scores.index(min(scores)) >= patience if scores else False
