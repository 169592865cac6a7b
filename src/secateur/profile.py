"""Models -> bytes of weights, peak memory, and the speed of reading and of writing.

Speeds are only comparable when they were measured side by side, so all models are timed in one call, in turns
(A B A B ...), and the median is reported.

Tensor names end in their axes: B batch, T token.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from secateur.axes import count_macs, count_parameters, discover
from secateur.errors import DataError
from secateur.evaluate import evaluation_mode, greedy_steps, input_device, known_positions, vocabulary_size
from secateur.models import plain_tensors


@dataclass(frozen=True, slots=True)
class Profile:
    """What one model costs: the row that `secateur profile` prints.

    >>> Profile("demo", 134515008, 106203456, 8607793152, 538060032, 560000000, 0.03, 25.0).weight_bytes
    538060032
    """

    model: str  # the name the caller gave it
    parameters: int
    non_embedding_parameters: int
    macs: int  # of one forward pass over `seq_len` tokens
    weight_bytes: int
    peak_bytes: int  # weights + the most that one forward pass over `seq_len` tokens holds besides
    prefill_seconds: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Speed:
    """The measured part of a profile, at batch size 1.

    >>> Speed(prefill_seconds=0.03, decode_tokens_per_second=25.0, peak_bytes=560000000).peak_bytes
    560000000
    """

    prefill_seconds: float  # median of one forward pass over the prompt
    decode_tokens_per_second: float  # 1 / median of one greedy step with the cache
    peak_bytes: int


def profile(
    models: Mapping[str, PreTrainedModel],
    *,
    seq_len: int = 64,
    new_tokens: int = 16,
    seed: int = 0,
) -> list[Profile]:
    """Count and measure all models side by side; sizes and MACs come from the discovery of each model's config.

    Raises as `measure_speed` does.

    >>> profile({})
    []
    """
    speeds = measure_speed(models, seq_len=seq_len, new_tokens=new_tokens, seed=seed)
    rows = []
    for name, model in models.items():
        discovery = discover(model, name=name)
        rows.append(
            Profile(
                model=name,
                parameters=count_parameters(discovery),
                non_embedding_parameters=count_parameters(discovery, embeddings=False),
                macs=sum(count_macs(discovery, tokens=seq_len).values()),
                weight_bytes=weight_bytes(model),
                peak_bytes=speeds[name].peak_bytes,
                prefill_seconds=speeds[name].prefill_seconds,
                decode_tokens_per_second=speeds[name].decode_tokens_per_second,
            )
        )
    return rows


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers; a tied weight counts once, a packed one as packed.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    >>> weight_bytes(model)  # 2 x 16 float32
    128
    >>> model[1].weight = model[0].weight
    >>> weight_bytes(model)
    64
    """
    state = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    tensors = [plain for tensor in state for plain in plain_tensors(tensor)]
    # Two parameters may share memory without being one object; on `meta` there is no address, and the object counts.
    sizes = {(tensor.device, tensor.data_ptr() or id(tensor), tensor.shape): tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    seq_len: int = 64,
    new_tokens: int = 16,
    repeats: int = 5,
    vocabulary: int | None = None,
    seed: int = 0,
) -> dict[str, Speed]:
    """Time reading a prompt of `seq_len` random tokens and writing `new_tokens` after it, for all models in turns.

    Every model reads the same prompt, drawn with `seed` from the first `vocabulary` ids (None: those that all models
    have). Each model runs once to warm up and once to measure memory; then `repeats` rounds over all models are
    timed. Prefill is one forward pass over the prompt, with all its logits; decode is one greedy token per forward
    pass with the keys and values kept. A model is on its own device; timers wait for the device to finish. Weights on
    the CPU are copied first: mapped from a file, as loaders leave them, they lie unaligned and are slower to read.

    `peak_bytes` = weights + the most that the prefill holds besides. On CUDA the allocator counts it. Elsewhere we
    count the bytes of all live tensors after each operator, which gives the same number each time; what an operator
    allocates and frees within itself is not seen.

    Raises DataError if a count is below 1, there are fewer than `vocabulary` ids, or the text is longer than a
    model's table of positions; ModelError if weights are not loaded.

    >>> from transformers import PretrainedConfig
    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> class Uniform(PreTrainedModel):
    ...     def forward(self, input_ids, **_):
    ...         return CausalLMOutput(logits=torch.zeros(*input_ids.shape, 8))
    >>> speeds = measure_speed({"uniform": Uniform(PretrainedConfig(vocab_size=8))}, repeats=1)
    >>> speeds["uniform"].peak_bytes  # no weights; 64 x 8 float32 logits, then one int64 token and 4 bytes
    2056
    """
    for name, count in {"seq_len": seq_len, "new_tokens": new_tokens, "repeats": repeats}.items():
        if count < 1:
            raise DataError(
                f"{name}={count}: expected at least 1. seq_len=64, new_tokens=16, repeats=5 are the defaults."
            )
    if not models:
        return {}
    prompt_BT = _random_prompt(models, seq_len=seq_len, vocabulary=vocabulary, seed=seed)
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            _copy_weights_in_place(model)
            stack.enter_context(evaluation_mode(model))
            with known_positions(model, seq_len + new_tokens, flag="--seq-len plus --new-tokens"):
                _time_steps(model, prompt_BT, new_tokens=new_tokens)
            peaks[name] = weight_bytes(model) + _prefill_bytes(model, prompt_BT)
        for _ in range(repeats):
            for name, model in models.items():
                prefill, *steps = _time_steps(model, prompt_BT, new_tokens=new_tokens)
                prefills[name].append(prefill)
                decodes[name].extend(steps)
    return {name: Speed(median(prefills[name]), 1 / median(decodes[name]), peaks[name]) for name in models}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators allocate while it is entered: `live` now, and their `peak`.

    Final. Views and in-place results share their input's storage and count nothing; a storage stops counting when
    its last tensor is gone. Run it under `torch.no_grad()`, not `torch.inference_mode()`: there, composite operators
    (matmul, attention) arrive whole, and what they allocate within is not seen.

    >>> with torch.no_grad(), LiveBytes() as memory:
    ...     first = torch.zeros(10)
    ...     second = first.view(2, 5) + 1
    ...     del first
    >>> memory.live, memory.peak
    (40, 80)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        borrowed = {id(storage) for storage in _storages((args, kwargs))}
        # torch keeps the Python object of a storage as long as the storage, so its id is a name for it
        fresh = {id(storage): storage for storage in _storages(outputs) if id(storage) not in borrowed}
        for storage in fresh.values():
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _forget(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def _copy_weights_in_place(model: nn.Module) -> None:
    """Give every weight on the CPU memory of its own; a tied weight is one tensor and stays one."""
    for weight in model.parameters():
        for plain in plain_tensors(weight):
            if plain.device.type == "cpu":
                plain.data = plain.data.clone()


def _random_prompt(models: Mapping[str, PreTrainedModel], *, seq_len: int, vocabulary: int | None, seed: int) -> Tensor:
    """Draw one prompt for all models; returns ids_BT (1 x seq_len), int64, on the CPU."""
    smallest = min(models, key=lambda name: vocabulary_size(models[name]))
    known = vocabulary_size(models[smallest])
    if vocabulary is None:
        vocabulary = known
    if not 1 <= vocabulary <= known:
        raise DataError(
            f"vocabulary={vocabulary}: {smallest} has {known} token ids; vocabulary={known} takes them all."
        )
    return torch.randint(vocabulary, (1, seq_len), generator=torch.Generator().manual_seed(seed))


def _time_steps(model: PreTrainedModel, prompt_BT: Tensor, *, new_tokens: int) -> list[float]:
    """Return the seconds of the prefill, then of each of `new_tokens` greedy steps."""
    device = input_device(model)
    seconds = []
    with torch.inference_mode():
        steps = greedy_steps(model, prompt_BT.to(device))
        for _ in range(1 + new_tokens):
            _wait(device)
            start = time.perf_counter()
            next(steps)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return seconds


def _prefill_bytes(model: PreTrainedModel, prompt_BT: Tensor) -> int:
    """Return the most bytes that one forward pass over the prompt holds besides the weights."""
    device = input_device(model)
    steps = greedy_steps(model, prompt_BT.to(device))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode():
            next(steps)
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    memory = LiveBytes()
    with torch.no_grad(), memory:
        next(steps)
    return memory.peak


def _wait(device: torch.device) -> None:
    """Wait until an accelerator has done all it was given; the CPU already has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
