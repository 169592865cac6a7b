"""Weights are counted once, live bytes are exact, and models are timed in turns."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from secateur.errors import DataError, ModelError
from secateur.profile import LiveBytes, Speed, _random_prompts, measure_speed, weight_bytes

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
    monkeypatch.setattr(sys.modules["secateur.profile"], "_time_steps", lambda *_, **__: next(seconds))
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
