"""Weights are counted once, live bytes are exact, and models are timed in turns."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from secateur.errors import DataError, ModelError
from secateur.evaluation.profile import (
    Against,
    LiveBytes,
    Profile,
    Speed,
    _random_prompts,
    measure_speed,
    profile,
    profile_models,
    weight_bytes,
)
from secateur.pipeline.run import plan_model

VOCABULARY = 97


def tiny(intermediate_size: int, *, tied: bool = False, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def small() -> LlamaForCausalLM:
    return tiny(48)


@pytest.fixture
def large() -> LlamaForCausalLM:
    return tiny(480)


def test_weight_bytes_count_parameters_in_their_dtype(small: LlamaForCausalLM) -> None:
    assert weight_bytes(small) == 4 * sum(weight.numel() for weight in small.parameters())
    assert weight_bytes(small.bfloat16()) == 2 * sum(weight.numel() for weight in small.parameters())


def test_weight_bytes_count_tied_weights_once(small: LlamaForCausalLM) -> None:
    assert weight_bytes(small) - weight_bytes(tiny(48, tied=True)) == VOCABULARY * 32 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weight_bytes_count_one_parameter_under_two_names_once(device: str) -> None:
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to(device)
    assert weight_bytes(layers) == 2 * 256
    layers[1].weight = layers[0].weight
    assert weight_bytes(layers) == 256


def test_weight_bytes_count_two_parameters_in_one_memory_once() -> None:
    first = nn.Linear(8, 8, bias=False)
    second = nn.Linear(8, 8, bias=False)
    second.weight = nn.Parameter(first.weight.detach())
    assert weight_bytes(nn.Sequential(first, second)) == 256


def test_weight_bytes_count_buffers_of_the_checkpoint_only() -> None:
    layer = nn.Module()
    layer.register_buffer("saved", torch.zeros(3))
    layer.register_buffer("computed", torch.zeros(5), persistent=False)
    assert weight_bytes(layer) == 12


def test_live_bytes_of_operators() -> None:
    weight = torch.zeros(16, 16)
    with torch.no_grad(), LiveBytes() as memory:
        view = weight.t()[2:]
        assert memory.live == 0  # the weight's own memory
        product = view @ weight  # 14 x 16 float32
        product.add_(1)
        assert (memory.live, memory.peak) == (896, 896)
        half = product.to(torch.bfloat16)
        assert (memory.live, memory.peak) == (1344, 1344)
        del product
        assert (memory.live, memory.peak) == (448, 1344)
        del half
    assert (memory.live, memory.peak) == (0, 1344)


def test_live_bytes_see_inside_a_composite_operator() -> None:
    scores_in = torch.zeros(1, 2, 8, 4)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), LiveBytes() as memory:
        out = nn.functional.scaled_dot_product_attention(scores_in, scores_in, scores_in)
    assert memory.live == out.nbytes
    assert memory.peak >= out.nbytes + 2 * 8 * 8 * 4  # the scores, 2 heads x 8 x 8


def test_speed_is_positive_and_every_name_has_one(small: LlamaForCausalLM, large: LlamaForCausalLM) -> None:
    speeds = measure_speed({"small": small, "large": large}, seq_len=16, new_tokens=3, repeats=2)
    assert list(speeds) == ["small", "large"]
    for speed in speeds.values():
        assert speed.prefill_seconds > 0
        assert speed.decode_tokens_per_second > 0
    assert measure_speed({}) == {}


def test_peak_bytes_are_weights_and_live_tensors(small: LlamaForCausalLM, large: LlamaForCausalLM) -> None:
    def peaks(seq_len: int) -> dict[str, int]:
        speeds = measure_speed({"small": small, "large": large}, seq_len=seq_len, new_tokens=1, repeats=1)
        return {name: speed.peak_bytes for name, speed in speeds.items()}

    first = peaks(16)
    assert first == peaks(16)  # counted, not sampled
    extra = {name: first[name] - weight_bytes(model) for name, model in {"small": small, "large": large}.items()}
    # At the peak, two results of 16 x intermediate_size float32 are alive, besides hidden states and the cache.
    assert extra["large"] - extra["small"] == pytest.approx(2 * 16 * (480 - 48) * 4, rel=0.5)
    assert peaks(32)["large"] > first["large"]


def test_peak_bytes_hold_what_composite_operators_allocate(small: LlamaForCausalLM) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        peak = measure_speed({"m": small}, seq_len=128, new_tokens=1, repeats=1)["m"].peak_bytes
    assert peak - weight_bytes(small) > 2 * 4 * 128 * 128 * 4  # scores and their softmax, 4 heads


def test_peak_bytes_halve_in_bfloat16(large: LlamaForCausalLM) -> None:
    full = measure_speed({"m": large}, seq_len=32, new_tokens=1, repeats=1)["m"].peak_bytes
    half = measure_speed({"m": large.bfloat16()}, seq_len=32, new_tokens=1, repeats=1)["m"].peak_bytes
    assert half / full == pytest.approx(0.5, abs=0.05)


def test_models_are_timed_in_turns_on_one_prompt(small: LlamaForCausalLM, large: LlamaForCausalLM) -> None:
    calls: list[tuple[str, list[int]]] = []
    models = {"a": small, "b": large}
    for name, model in models.items():

        def note(_: nn.Module, __: Any, kwargs: dict[str, Any], name: str = name) -> None:
            calls.append((name, kwargs["input_ids"][0].tolist()))

        model.register_forward_pre_hook(note, with_kwargs=True)
    measure_speed(models, seq_len=6, new_tokens=2, repeats=3, vocabulary=10, seed=4)
    prompts = [ids for _, ids in calls if len(ids) > 1]
    turns = [name for name, ids in calls if len(ids) > 1]
    assert turns == ["a", "a", "b", "b"] + ["a", "b"] * 3  # warm-up and memory, then the rounds
    assert all(ids == prompts[0] for ids in prompts)
    assert len(prompts[0]) == 6
    assert max(prompts[0]) < 10
    assert [len(ids) for _, ids in calls[-6:]] == [6, 1, 1] * 2  # one token a step after the prompt


def test_the_prompt_follows_the_seed_and_the_smallest_vocabulary() -> None:
    models = {"wide": tiny(8), "narrow": tiny(8, vocabulary=11)}
    draw = [_random_prompts(models, seq_len=200, batch=1, vocabulary=None, seed=seed).tolist() for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert set(draw[0][0]) == set(range(11))


def test_medians_are_reported(small: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([[9.0, 9.0, 9.0], [1.0, 0.5, 0.25], [3.0, 0.5, 4.0], [2.0, 0.5, 0.125]])
    monkeypatch.setattr(sys.modules["secateur.evaluation.profile"], "_time_steps", lambda *_, **__: next(seconds))
    speed = measure_speed({"m": small}, seq_len=4, new_tokens=2, repeats=3)["m"]
    assert speed == Speed(2.0, 2.0, speed.peak_bytes, (1.5, 2.5))


def test_training_mode_comes_back(small: LlamaForCausalLM) -> None:
    small.train()
    measure_speed({"m": small}, seq_len=4, new_tokens=1, repeats=1)
    assert small.training
    assert not any(weight.is_inference() for weight in small.parameters())


@pytest.mark.parametrize("name", ["seq_len", "new_tokens", "repeats"])
def test_errors_of_counts(small: LlamaForCausalLM, name: str) -> None:
    arguments: dict[str, Any] = {name: 0}
    with pytest.raises(
        DataError, match=rf"{name}=0: expected at least 1\. seq_len=64, batch=1, new_tokens=16, repeats=5"
    ):
        measure_speed({"m": small}, **arguments)


@pytest.mark.parametrize("vocabulary", [0, 98])
def test_error_of_a_vocabulary_that_a_model_lacks(small: LlamaForCausalLM, vocabulary: int) -> None:
    with pytest.raises(DataError, match=rf"vocabulary={vocabulary}: m has 97 token ids; vocabulary=97 takes them all"):
        measure_speed({"m": small}, vocabulary=vocabulary)


def test_error_of_too_few_positions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(DataError, match=r"16 positions, but reads 18 tokens at once\. --seq-len plus --new-tokens"):
        measure_speed({"m": model}, seq_len=14, new_tokens=4)


def test_error_of_weights_on_meta() -> None:
    with torch.device("meta"):
        model = tiny(48)
    with pytest.raises(ModelError, match="its weights are on device='meta'"):
        measure_speed({"m": model}, seq_len=4)


class Ticks:
    """Steps that take a known time, and who took them."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds
        self.calls: list[tuple[str, int, int]] = []
        self.memory: list[tuple[str, int, int]] = []

    def install(self, models: dict[str, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
        names = {id(model): name for name, model in models.items()}

        def time_steps(model: nn.Module, prompts: torch.Tensor, *, new_tokens: int) -> list[float]:
            batch, seq_len = prompts.shape
            self.calls.append((names[id(model)], batch, seq_len))
            prefill, decode = self.seconds[names[id(model)]]
            return [prefill * batch * seq_len, *[decode] * new_tokens]

        def prefill_bytes(model: nn.Module, prompts: torch.Tensor) -> int:
            batch, seq_len = prompts.shape
            self.memory.append((names[id(model)], batch, seq_len))
            return 1000 * batch * seq_len

        module = sys.modules["secateur.evaluation.profile"]
        monkeypatch.setattr(module, "_time_steps", time_steps)
        monkeypatch.setattr(module, "_prefill_bytes", prefill_bytes)


def test_every_cell_of_the_grid_is_warmed_up_and_timed_in_turns(
    small: LlamaForCausalLM, large: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"dense": large, "cut": small}
    ticks = Ticks({"dense": [0.5, 0.25], "cut": [0.25, 0.125]})
    ticks.install(models, monkeypatch)
    shown: list[tuple[int, int]] = []
    rows = profile(
        models,
        seq_len=[8, 4],
        batch=[1, 3],
        new_tokens=2,
        repeats=2,
        progress=lambda done, total: shown.append((done, total)),
    )
    cells = [(1, 8), (3, 8), (1, 4), (3, 4)]
    expected = [(name, *cell) for cell in cells for name in ["dense", "cut"] * 3]  # warm-up, then two rounds
    assert ticks.calls == expected
    assert ticks.memory == [(name, *cell) for cell in cells for name in ("dense", "cut")]
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    dense, cut = rows
    assert [(cell.batch, cell.seq_len) for cell in cut.grid] == cells
    assert [cell.prefill_seconds for cell in dense.grid] == [0.5 * batch * seq_len for batch, seq_len in cells]
    assert [cell.decode_tokens_per_second for cell in dense.grid] == [4, 12, 4, 12]  # of all rows of a batch
    assert [cell.peak_bytes for cell in cut.grid] == [weight_bytes(small) + 1000 * b * n for b, n in cells]
    assert {cell.prefill_speedup for cell in cut.grid} == {2.0}
    assert {cell.decode_speedup for cell in cut.grid} == {2.0}
    assert {cell.prefill_speedup for cell in dense.grid} == {None}
    assert [cell.macs_ratio for cell in cut.grid] == [
        cell.macs / first.macs for cell, first in zip(cut.grid, dense.grid, strict=True)
    ]
    assert cut.against == Against("dense", cut.macs / dense.macs, cut.weight_bytes / dense.weight_bytes, 2.0, 2.0)
    assert (cut.prefill_seconds, cut.peak_bytes) == (cut.grid[0].prefill_seconds, cut.grid[0].peak_bytes)
    assert "against" not in dense.to_json()
    assert cut.to_json()["against"]["model"] == "dense"
    assert "prefill_speedup" not in dense.to_json()["grid"][0]


def test_a_batch_takes_more_memory_and_its_cache(small: LlamaForCausalLM) -> None:
    [row] = profile({"m": small}, seq_len=[16, 32], batch=[1, 4], new_tokens=1, repeats=1)
    one, four, longer, _ = row.grid
    assert (four.kv_cache_bytes, longer.kv_cache_bytes) == (
        4 * (row.kv_cache_bytes or 0),
        2 * (row.kv_cache_bytes or 0),
    )
    assert row.kv_cache_bytes == one.kv_cache_bytes == 2 * 2 * 2 * 8 * 16 * 4  # layers, K and V, KV heads, size, tokens
    extra = [(cell.peak_bytes or 0) - weight_bytes(small) for cell in (one, four)]
    assert extra[1] == pytest.approx(4 * extra[0], rel=0.1)


class FakeEvent:
    """An event of a device whose clock moves by one millisecond with each."""

    log: ClassVar[list[str]] = []
    clock: ClassVar[int] = 0

    def record(self, stream: str) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock
        FakeEvent.log.append(f"record on {stream}")

    def elapsed_time(self, later: FakeEvent) -> float:
        return float(later.at - self.at)

    def synchronize(self) -> None:
        FakeEvent.log.append("wait for the last")


def test_on_an_accelerator_events_mark_the_steps_and_nobody_waits_between(
    small: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeEvent.log.clear()
    module = sys.modules["secateur.evaluation.profile"]
    monkeypatch.setattr(module, "_event_and_stream", lambda device: (FakeEvent(), f"{device}'s stream"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: FakeEvent.log.append(f"wait for {device}"))
    monkeypatch.setattr(module, "_timer", lambda model: module._Events(torch.device("cuda", 1)))
    seconds = module._time_steps(small, torch.zeros(1, 4, dtype=torch.long), new_tokens=2)
    assert seconds == [0.001, 0.001, 0.001]
    assert FakeEvent.log == ["wait for cuda:1", *["record on cuda:1's stream"] * 4, "wait for the last"]


@pytest.mark.parametrize(
    ("devices", "timer"),
    [
        (["cpu"], "clock of []"),
        ([], "clock of []"),
        (["cuda:0"], "events of cuda:0"),
        (["mps:0"], "events of mps:0"),
        (["cuda:0", "cuda:1"], "clock of ['cuda:0', 'cuda:1']"),
        (["cuda:0", "cpu"], "clock of ['cuda:0']"),
        (["cuda:0", "meta"], "clock of ['cuda:0']"),  # weights that accelerate moves in
    ],
)
def test_which_timer_a_model_gets(devices: list[str], timer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    weights = [SimpleNamespace(device=torch.device(device)) for device in devices]
    found = sys.modules["secateur.evaluation.profile"]._timer(SimpleNamespace(parameters=lambda: iter(weights)))
    events = hasattr(found, "device")
    assert timer == (f"events of {found.device}" if events else f"clock of {[str(d) for d in found.devices]}")


def test_the_clock_waits_for_every_accelerator_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module, log = sys.modules["secateur.evaluation.profile"], []
    times = iter([1.0, 3.0, 3.5])

    def tick() -> float:
        log.append("clock")
        return next(times)

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append(str(device)))
    monkeypatch.setattr(module.time, "perf_counter", tick)
    clock = module._Clock([torch.device("cuda", 0), torch.device("cuda", 1)])
    for _ in range(3):
        clock.mark()
    monkeypatch.undo()
    assert clock.seconds() == [2.0, 0.5]
    assert log == ["cuda:0", "cuda:1", "clock"] * 3


def test_models_by_name_are_read_once_and_cut_as_a_plan_says(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of sizes alone: speed does not depend on which units stay."""
    decided = plan_model(str(tiny), cut={"ratio": 0.3}, sizes_only=True)
    dense, cut = profile_models([str(tiny), str(tiny)], plan=decided, seq_len=8, new_tokens=1, repeats=1)
    assert isinstance(cut, Profile)
    assert (dense.model, cut.model) == (str(tiny), f"{tiny} + plan")
    assert (cut.parameters, cut.non_embedding_parameters) == (
        decided.parameters["pruned"],
        decided.parameters["pruned_non_embedding"],
    )
    monkeypatch.setattr(
        sys.modules["secateur.evaluation.profile"], "load", lambda *_, **__: pytest.fail("weights were read")
    )
    counted = profile_models([str(tiny)], plan=decided, sizes_only=True, seq_len=8)
    assert [row.macs for row in counted] == [dense.macs, cut.macs]
    assert [row.kv_cache_bytes for row in counted] == [dense.kv_cache_bytes, cut.kv_cache_bytes]
    assert [row.weight_bytes for row in counted] == [dense.weight_bytes, cut.weight_bytes]
    assert "prefill_seconds" not in counted[0].to_json()


@pytest.mark.parametrize("name", ["seq_len", "batch"])
def test_errors_of_counts_without_weights(tiny: Path, name: str) -> None:
    counts: dict[str, Any] = {name: [4, 0]}
    with pytest.raises(DataError, match=f"{name}=0: expected at least 1"):
        profile_models([str(tiny / "config.json")], **counts)
