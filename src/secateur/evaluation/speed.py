"""Models + random prompts -> the speed of prefill and decoding, and the peak of memory.

Speeds are only comparable when they were measured side by side, so all models are timed in one call, in turns
(A B A B ...), and the median is reported.

Tensor names end in their axes: B batch, T token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.evaluation.inference import decode_steps, evaluation_mode, input_device, position_errors, random_ids
from secateur.evaluation.memory import activation_bytes, weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.significance import quantiles
from secateur.models.classes import config_of
from secateur.models.config import check_writes_text
from secateur.models.tensors import plain_tensors
from secateur.progress import Progress


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of one model on one batch of prompts."""

    prefill_seconds: float  # median of one forward pass over the prompts
    prefill_quartiles: tuple[float, float]
    decode_tokens_per_second: float  # of all prompts of the batch together; by the median of a greedy step
    peak_bytes: int  # weights + the most that the prefill holds besides


def measure_speed(
    models: Mapping[str, PreTrainedModel], options: ProfileOptions, *, progress: Progress | None = None
) -> list[dict[str, Speed]]:
    """Time prefill and decoding of all models in turns; returns name -> speed for every pair of `options.grid`.

    All models read the same random prompts. Each runs once to warm up and once to measure memory; then `repeats` runs
    of each are timed. Prefill is one forward pass over the prompts, with all its logits; decoding is one greedy token
    for each prompt per forward pass, with the cache. Weights on the CPU are copied first: mapped from a file, as
    loaders leave them, they lie unaligned and are slower to read. `progress` counts pairs of the grid.

    Raises DataError if the text is longer than a model's table of positions; ModelError if weights are not loaded.
    """
    if not models:
        return []
    for name, model in models.items():
        check_writes_text(config_of(model), name=name, doing="measuring speed")
        input_device(model)  # weights on `meta` are refused before anything is measured
        _copy_weights_in_place(model)
    speeds = []
    for done, (seq_len, batch) in enumerate(options.grid, start=1):
        prompts_BT = random_ids(models.values(), batch, seq_len, seed=options.seed)
        speeds.append(_time_models(models, prompts_BT, options))
        if progress is not None:
            progress(done, len(options.grid))
    return speeds


def _time_models(
    models: Mapping[str, PreTrainedModel], prompts_BT: Tensor, options: ProfileOptions
) -> dict[str, Speed]:
    batch, seq_len = prompts_BT.shape
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(evaluation_mode(model))
            with position_errors(model, seq_len + options.new_tokens, flag="--seq-len plus --new-tokens"):
                _time_steps(model, prompts_BT, new_tokens=options.new_tokens)
            peaks[name] = weight_bytes(model) + activation_bytes(model, prompts_BT)
        for _ in range(options.repeats):
            for name, model in models.items():
                prefill, *steps = _time_steps(model, prompts_BT, new_tokens=options.new_tokens)
                prefills[name].append(prefill)
                decodes[name].extend(steps)
    speeds = {}
    for name in models:
        low, middle, high = quantiles(prefills[name], (0.25, 0.5, 0.75))
        speeds[name] = Speed(middle, (low, high), batch / median(decodes[name]), peaks[name])
    return speeds


def _copy_weights_in_place(model: nn.Module) -> None:
    """Give every weight on the CPU memory of its own; a tied weight is one tensor and stays one."""
    for weight in model.parameters():
        for plain in plain_tensors(weight):
            if plain.device.type == "cpu":
                plain.data = plain.data.clone()


def _time_steps(model: PreTrainedModel, prompts_BT: Tensor, *, new_tokens: int) -> list[float]:
    """Return the seconds of the prefill, then of each of `new_tokens` greedy steps."""
    with torch.inference_mode():
        steps = decode_steps(model, prompts_BT.to(input_device(model)))
        timer = _Timer(model)
        timer.mark()
        for _ in range(1 + new_tokens):
            next(steps)
            timer.mark()
    return timer.seconds()


class _Timer:
    """Takes the time between marks: the end of a step, and the start of the next.

    Where all weights are on one accelerator, a mark is an event on its stream, and nothing waits for the device before
    the last has been recorded. On a CPU, over several devices and where accelerate moves weights (they lie on `meta`
    between layers, and what they wait for is not on the stream), it is the clock when all accelerators have finished.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {weight.device for weight in model.parameters()}
        self.accelerators = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
        self.by_events = len(devices) == 1 and bool(self.accelerators)
        self.marks: list[Any] = []
        self._wait()  # what came before is not to count

    def mark(self) -> None:
        if self.by_events:
            event, stream = _event_and_stream(self.accelerators[0])
            event.record(stream)
            self.marks.append(event)
        else:
            self._wait()
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.by_events:
            self.marks[-1].synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.marks)]
        return [after - before for before, after in pairwise(self.marks)]

    def _wait(self) -> None:
        for device in self.accelerators:
            torch.accelerator.synchronize(device)


def _event_and_stream(device: torch.device) -> tuple[Any, Any]:
    """An event that takes the time, and the stream of the device's work."""
    if device.type == "cuda":
        return torch.cuda.Event(enable_timing=True), torch.cuda.current_stream(device)
    return torch.Event(device, enable_timing=True), torch.accelerator.current_stream(device)
