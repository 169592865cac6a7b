"""Models -> what they cost, counted (see `costs`) and measured: peak memory, the speed of reading and of writing.

Speeds are only comparable when they were measured side by side, so all models are timed in one call, in turns
(A B A B ...), and the median is reported.

Tensor names end in their axes: B batch, T token.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import DataError
from secateur.evaluation.flops import Cell, Sizes, cut_to_sizes, sizes_of, sizes_of_model
from secateur.evaluation.flops import weight_bytes as weight_bytes
from secateur.evaluation.perplexity import evaluation_mode, greedy_steps, input_device, known_positions, vocabulary_size
from secateur.models.config import load_config
from secateur.models.loading import DTYPES, LoadOptions, load
from secateur.models.tensors import plain_tensors
from secateur.models.weight_files import has_weights
from secateur.planning.plan import Plan
from secateur.progress import Progress


@dataclass(frozen=True, slots=True)
class Against:
    """A model beside the first one of the same run; ratios are this model's share, speed-ups how many times as fast.

    >>> Against("dense", macs_ratio=0.8, weight_bytes_ratio=0.81, prefill_speedup=1.21, decode_speedup=1.15).model
    'dense'
    """

    model: str
    macs_ratio: float
    weight_bytes_ratio: float
    prefill_speedup: float
    decode_speedup: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What one model costs: the row that `secateur profile` prints; single numbers are of the grid's first cell.

    >>> sizes = Sizes("demo", 134515008, 106203456, 64, 860, {"matmul": 860}, {"mlp": 860}, 538060032, 9, (9,), ())
    >>> Profile.of(sizes, (Cell(1, 64, 860, 9, 0.03, (0.03, 0.04), 25.0, 560000000),)).peak_bytes
    560000000
    """

    model: str  # the name the caller gave it
    parameters: int
    non_embedding_parameters: int
    seq_len: int
    macs: int  # of one forward pass over `seq_len` tokens
    macs_by_operator: Mapping[str, int]
    macs_by_kind: Mapping[str, int]
    weight_bytes: int
    kv_cache_bytes: int | None  # of one sequence of `seq_len` tokens
    kv_cache_bytes_by_layer: tuple[int, ...]
    grid: tuple[Cell, ...]
    peak_bytes: int  # weights + the most that one forward pass over the batch holds besides
    prefill_seconds: float
    decode_tokens_per_second: float
    against: Against | None = None  # None for the first model

    @staticmethod
    def of(sizes: Sizes, grid: Sequence[Cell], against: Against | None = None) -> Profile:
        """A model's sizes with the cells that were measured."""
        first = grid[0]
        assert first.peak_bytes is not None
        assert first.prefill_seconds is not None
        assert first.decode_tokens_per_second is not None
        known = {field.name: getattr(sizes, field.name) for field in fields(sizes)}
        return Profile(
            **{**known, "grid": tuple(grid)},
            peak_bytes=first.peak_bytes,
            prefill_seconds=first.prefill_seconds,
            decode_tokens_per_second=first.decode_tokens_per_second,
            against=against,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur profile --json` writes it."""
        data = {**asdict(self), "grid": [cell.to_json() for cell in self.grid]}
        return {name: value for name, value in data.items() if name != "against" or value is not None}


@dataclass(frozen=True, slots=True)
class Speed:
    """The measured part of a profile, of one batch of prompts.

    >>> Speed(prefill_seconds=0.03, decode_tokens_per_second=25.0, peak_bytes=560000000).peak_bytes
    560000000
    """

    prefill_seconds: float  # median of one forward pass over the prompts
    decode_tokens_per_second: float  # rows of the batch / median of one greedy step with the cache
    peak_bytes: int
    prefill_quartiles: tuple[float, float] = (0.0, 0.0)


def profile(
    models: Mapping[str, PreTrainedModel],
    *,
    seq_len: int | Sequence[int] = 64,
    batch: int | Sequence[int] = 1,
    new_tokens: int = 16,
    repeats: int = 5,
    seed: int = 0,
    discoveries: Mapping[str, Discovery] | None = None,
    progress: Progress | None = None,
) -> list[Profile]:
    """Count and measure all models side by side; sizes and MACs come from the discovery of each model's config.

    Every `seq_len` is measured with every `batch`: the grid. A model's discovery is taken from `discoveries`, if it is
    there. `progress` counts the grid's cells. Raises as `measure_speed` does.

    >>> profile({})
    []
    """
    seq_lens, batches = _several(seq_len), _several(batch)
    for name, values in {"seq_len": seq_lens, "batch": batches}.items():
        _check_counts({name: min(values, default=0)})
    _check_counts({"new_tokens": new_tokens, "repeats": repeats})
    for model in models.values():
        input_device(model)  # weights on `meta` are refused before anything is measured
        _copy_weights_in_place(model)
    work = [(n, b) for n in seq_lens for b in batches]
    speeds: dict[tuple[int, int], dict[str, Speed]] = {}
    for done, (n, b) in enumerate(work):
        speeds[n, b] = _measured(models, seq_len=n, batch=b, new_tokens=new_tokens, repeats=repeats, seed=seed)
        if progress is not None:
            progress(done + 1, len(work))
    rows: list[Profile] = []
    for name, model in models.items():
        discovery = (discoveries or {}).get(name) or discover(model, name=name)
        sizes = sizes_of_model(model, discovery, name=name, seq_lens=seq_lens, batches=batches)
        cells = [_with_speed(cell, speeds[cell.seq_len, cell.batch][name]) for cell in sizes.grid]
        if not rows:
            rows.append(Profile.of(sizes, cells))
            continue
        cells = [_beside(cell, dense) for cell, dense in zip(cells, rows[0].grid, strict=True)]
        rows.append(Profile.of(sizes, cells, _against(cells[0], rows[0], sizes)))
    return rows


def profile_models(
    models: Sequence[str],
    *,
    plan: Plan | None = None,
    plan_name: str = "plan",
    sizes_only: bool = False,
    seq_len: int | Sequence[int] = 64,
    batch: int | Sequence[int] = 1,
    new_tokens: int = 16,
    repeats: int = 5,
    seed: int = 0,
    loading: LoadOptions | None = None,
    progress: Progress | None = None,
) -> list[Profile] | list[Sizes]:
    """Profile MODEL arguments, each as it is and, with a plan, as the plan cuts it; `MODEL + plan_name` is its name.

    What is measured depends on sizes alone, so a plan that does not say which units stay will do, and nothing is
    repaired. With `sizes_only`, or where one of the models has no weights, everything is counted and nothing measured:
    weights are not read. Raises `SecateurError`.

    >>> import tempfile
    >>> from transformers import AutoConfig
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    ...     AutoConfig.for_model("opt", num_hidden_layers=2, vocab_size=9, **sizes).save_pretrained(folder)
    ...     [row] = profile_models([f"{folder}/config.json"])
    >>> row.kv_cache_bytes  # 2 layers x 2 x 12 x 64 tokens, float32
    12288
    """
    loading = loading or LoadOptions()
    trust, names = loading.trust_remote_code, list(dict.fromkeys(models))
    configs = {name: load_config(name, trust_remote_code=trust) for name in names}
    if plan is None and not sizes_only and all(has_weights(name) for name in names):
        loaded = {
            name: load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=trust) for name in names
        }
        return profile(
            loaded, seq_len=seq_len, batch=batch, new_tokens=new_tokens, repeats=repeats, seed=seed, progress=progress
        )
    found = {name: discover(name, trust_remote_code=trust) for name in names}
    if sizes_only or not all(has_weights(name) for name in names):
        seq_lens, batches = _several(seq_len), _several(batch)
        _check_counts({"seq_len": min(seq_lens, default=0), "batch": min(batches, default=0)})
        dtype = None if loading.dtype == "auto" else DTYPES[loading.dtype]
        return [
            sizes_of(
                configs[name],
                found[name],
                name=label,
                plan=cut,
                seq_lens=seq_lens,
                batches=batches,
                dtype=dtype,
                trust_remote_code=trust,
            )
            for name in names
            for label, cut in [(name, None), *([(f"{name} + {plan_name}", plan)] if plan is not None else [])]
        ]
    variants: dict[str, PreTrainedModel] = {}
    for name in names:
        variants[name] = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=trust)
        if plan is not None:
            variants[f"{name} + {plan_name}"] = cut_to_sizes(variants[name], plan, found[name])
    return profile(
        variants,
        seq_len=seq_len,
        batch=batch,
        new_tokens=new_tokens,
        repeats=repeats,
        seed=seed,
        discoveries=found,
        progress=progress,
    )


def _several(values: int | Sequence[int]) -> list[int]:
    return [values] if isinstance(values, int) else list(dict.fromkeys(values))


def _check_counts(counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise DataError(
                f"{name}={count}: expected at least 1. seq_len=64, batch=1, new_tokens=16, repeats=5 are the defaults."
            )


def _with_speed(cell: Cell, speed: Speed) -> Cell:
    return replace(
        cell,
        prefill_seconds=speed.prefill_seconds,
        prefill_quartiles=speed.prefill_quartiles,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        peak_bytes=speed.peak_bytes,
    )


def _beside(cell: Cell, first: Cell) -> Cell:
    """A cell with what it is in proportion to the first model's."""
    assert cell.prefill_seconds is not None
    assert first.prefill_seconds is not None
    assert cell.decode_tokens_per_second is not None
    assert first.decode_tokens_per_second is not None
    return replace(
        cell,
        macs_ratio=cell.macs / first.macs,
        prefill_speedup=first.prefill_seconds / cell.prefill_seconds,
        decode_speedup=cell.decode_tokens_per_second / first.decode_tokens_per_second,
    )


def _against(cell: Cell, first: Profile, sizes: Sizes) -> Against:
    assert cell.macs_ratio is not None
    assert cell.prefill_speedup is not None
    assert cell.decode_speedup is not None
    return Against(
        first.model,
        cell.macs_ratio,
        sizes.weight_bytes / first.weight_bytes,
        cell.prefill_speedup,
        cell.decode_speedup,
    )


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    seq_len: int = 64,
    batch: int = 1,
    new_tokens: int = 16,
    repeats: int = 5,
    vocabulary: int | None = None,
    seed: int = 0,
) -> dict[str, Speed]:
    """Time reading `batch` prompts of `seq_len` random tokens and writing `new_tokens` after them, all models in turns.

    Every model reads the same prompts, drawn with `seed` from the first `vocabulary` ids (None: those that all models
    have). Each model runs once to warm up and once to measure memory; then `repeats` rounds over all models are
    timed. Prefill is one forward pass over the prompts, with all its logits; decode is one greedy token for each
    prompt per forward pass, with the keys and values kept. A model is on its own device. On an accelerator, events on
    its stream mark the time between steps, so that they are not held up to be timed; elsewhere a clock is read. Weights
    on the CPU are copied first: mapped from a file, as loaders leave them, they lie unaligned and are slower to read.

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
    _check_counts({"seq_len": seq_len, "batch": batch, "new_tokens": new_tokens, "repeats": repeats})
    for model in models.values():
        _copy_weights_in_place(model)
    return _measured(
        models, seq_len=seq_len, batch=batch, new_tokens=new_tokens, repeats=repeats, vocabulary=vocabulary, seed=seed
    )


def _measured(
    models: Mapping[str, PreTrainedModel],
    *,
    seq_len: int,
    batch: int,
    new_tokens: int,
    repeats: int,
    vocabulary: int | None = None,
    seed: int = 0,
) -> dict[str, Speed]:
    """One cell of the grid; weights have been copied."""
    if not models:
        return {}
    prompts_BT = _random_prompts(models, seq_len=seq_len, batch=batch, vocabulary=vocabulary, seed=seed)
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(evaluation_mode(model))
            with known_positions(model, seq_len + new_tokens, flag="--seq-len plus --new-tokens"):
                _time_steps(model, prompts_BT, new_tokens=new_tokens)
            peaks[name] = weight_bytes(model) + _prefill_bytes(model, prompts_BT)
        for _ in range(repeats):
            for name, model in models.items():
                prefill, *steps = _time_steps(model, prompts_BT, new_tokens=new_tokens)
                prefills[name].append(prefill)
                decodes[name].extend(steps)
    return {
        name: Speed(median(prefills[name]), batch / median(decodes[name]), peaks[name], _quartiles(prefills[name]))
        for name in models
    }


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return low, high


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


def _random_prompts(
    models: Mapping[str, PreTrainedModel], *, seq_len: int, batch: int, vocabulary: int | None, seed: int
) -> Tensor:
    """Draw the prompts of all models; returns ids_BT (batch x seq_len), int64, on the CPU."""
    smallest = min(models, key=lambda name: vocabulary_size(models[name]))
    known = vocabulary_size(models[smallest])
    if vocabulary is None:
        vocabulary = known
    if not 1 <= vocabulary <= known:
        raise DataError(
            f"vocabulary={vocabulary}: {smallest} has {known} token ids; vocabulary={known} takes them all."
        )
    return torch.randint(vocabulary, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def _time_steps(model: PreTrainedModel, prompts_BT: Tensor, *, new_tokens: int) -> list[float]:
    """Return the seconds of the prefill, then of each of `new_tokens` greedy steps."""
    with torch.inference_mode():
        steps = greedy_steps(model, prompts_BT.to(input_device(model)))
        timer = _timer(model)
        timer.mark()
        for _ in range(1 + new_tokens):
            next(steps)
            timer.mark()
    return timer.seconds()


class _Timer(Protocol):
    """What takes the time between marks."""

    def mark(self) -> None:
        """The end of a step, and the start of the next."""

    def seconds(self) -> list[float]:
        """The seconds from each mark to the next."""


class _Clock:
    """Marks by the computer's clock, when all of the accelerators named have done what they were given."""

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.devices = devices
        self.at: list[float] = []

    def mark(self) -> None:
        for device in self.devices:
            torch.accelerator.synchronize(device)
        self.at.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.at[:-1], self.at[1:], strict=True)]


class _Events:
    """Marks as events on an accelerator's stream: nobody waits for the device before the last has been recorded."""

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
        return [before.elapsed_time(after) / 1000 for before, after in zip(self.at[:-1], self.at[1:], strict=True)]


def _event_and_stream(device: torch.device) -> tuple[Any, Any]:
    """An event that takes the time, and the stream of the device's work."""
    if device.type == "cuda":
        return torch.cuda.Event(enable_timing=True), torch.cuda.current_stream(device)
    return torch.Event(device, enable_timing=True), torch.accelerator.current_stream(device)


def _timer(model: nn.Module) -> _Timer:
    """Events where all weights are on one accelerator; the clock on a CPU, over several devices, and where they move.

    Weights that accelerate moves in and out lie on `meta` between layers; what they wait for is not on the stream.
    """
    devices = {weight.device for weight in model.parameters()}
    accelerators = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
    if len(devices) == 1 and accelerators:
        return _Events(accelerators[0])
    return _Clock(accelerators)


def _prefill_bytes(model: PreTrainedModel, prompts_BT: Tensor) -> int:
    """Return the most bytes that one forward pass over the prompts holds besides the weights."""
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    steps = greedy_steps(model, prompts_BT.to(input_device(model)))
    if devices:
        before = {device: torch.cuda.memory_allocated(device) for device in devices}
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode():
            next(steps)
        for device in devices:
            torch.cuda.synchronize(device)
        return sum(int(torch.cuda.max_memory_allocated(device)) - before[device] for device in devices)
    memory = LiveBytes()
    with torch.no_grad(), memory:
        next(steps)
    return memory.peak
