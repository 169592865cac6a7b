"""Models + random prompts -> the speed of prefill and decoding, and the peak of memory.

Speeds are only comparable when they were measured side by side, so all models are timed in one call, in turns
(A B A B ...), and the median is reported.

Tensor names end in their axes: B batch, T token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.evaluation.inference import decode_steps, evaluation_mode, input_device, position_errors, random_ids
from secateur.evaluation.memory import activation_bytes, weight_bytes
from secateur.evaluation.options import ProfileOptions
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
    for model in models.values():
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
    return {
        name: Speed(median(prefills[name]), _quartiles(prefills[name]), batch / median(decodes[name]), peaks[name])
        for name in models
    }


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return low, high


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
        timer = _timer(model)
        timer.mark()
        for _ in range(1 + new_tokens):
            next(steps)
            timer.mark()
    return timer.seconds()


class _HostTimer:
    """Reads the computer's clock when all of the accelerators named have finished their work.

    `mark` is the end of a step and the start of the next; `seconds` are those from each mark to the next.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.devices = devices
        self.at: list[float] = []

    def mark(self) -> None:
        for device in self.devices:
            torch.accelerator.synchronize(device)
        self.at.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.at)]


class _EventTimer:
    """Records events on an accelerator's stream: nothing waits for the device before the last has been recorded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: list[Any] = []
        torch.accelerator.synchronize(device)  # what came before is not to count

    def mark(self) -> None:
        event, stream = _event_and_stream(self.device)
        event.record(stream)
        self.at.append(event)

    def seconds(self) -> list[float]:
        self.at[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.at)]


def _event_and_stream(device: torch.device) -> tuple[Any, Any]:
    """An event that takes the time, and the stream of the device's work."""
    if device.type == "cuda":
        return torch.cuda.Event(enable_timing=True), torch.cuda.current_stream(device)
    return torch.Event(device, enable_timing=True), torch.accelerator.current_stream(device)


def _timer(model: nn.Module) -> _HostTimer | _EventTimer:
    """Events where all weights are on one accelerator; the clock on a CPU, over several devices, and where they move.

    Weights that accelerate moves in and out lie on `meta` between layers; what they wait for is not on the stream.
    """
    devices = {weight.device for weight in model.parameters()}
    accelerators = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
    if len(devices) == 1 and accelerators:
        return _EventTimer(accelerators[0])
    return _HostTimer(accelerators)
