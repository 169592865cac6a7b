"""Weights count once, the cache of a config is that of its model, and live bytes are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from every_type import TYPES as EVERY_TYPE
from every_type import tiny_config, tiny_type_model
from families import family_config, family_model
from known import BUILT
from secateur.evaluation.memory import LiveBytes, activation_bytes, cache_bytes_by_layer, weight_bytes
from secateur.models.loading import skeleton
from secateur.models.silence import quiet
from tiny import tiny_model

ROOT = Path(__file__).parents[2]
TOKENS = 9
# learned positions; a window that slides; latent attention; a state space; states beside attention; one KV head;
# linear attention beside full
TYPES = ("gpt2", "gemma2", "deepseek_v3", "mamba2", "jamba", "gpt_bigcode", "qwen3_next")


def real_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    model.eval()
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_the_cache_of_a_config_is_that_of_its_model(model_type: str) -> None:
    """And that of transformers' own count, where its layers hold keys and values alone."""
    model = real_model(model_type)
    with quiet(), torch.no_grad():
        on_meta = cache_bytes_by_layer(skeleton(model.config).float(), seq_len=TOKENS)
        outputs = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True)
    assert on_meta == cache_bytes_by_layer(model, seq_len=TOKENS)
    assert on_meta is not None
    assert len(on_meta) == model.config.get_text_config().num_hidden_layers
    assert all(on_meta)
    if model_type in ("gpt2", "gemma2", "deepseek_v3", "gpt_bigcode"):
        assert on_meta == tuple(layer.keys.nbytes + layer.values.nbytes for layer in outputs.past_key_values.layers)


@pytest.mark.long
def test_the_cache_of_every_config_is_that_of_its_model() -> None:
    """But where a model does not run without weights, or does not run on token ids alone (docs/efficiency.md)."""
    found = {}
    for model_type in BUILT:
        with quiet():
            model = tiny_type_model(model_type, dtype=torch.float32)
            on_meta = cache_bytes_by_layer(skeleton(model.config).float(), seq_len=TOKENS)
            found[model_type] = (on_meta, cache_bytes_by_layer(model, seq_len=TOKENS))
    same = [name for name, (on_meta, real) in found.items() if on_meta == real is not None]
    assert f"models of {len(same)} of the {len(EVERY_TYPE)} types" in (ROOT / "docs" / "efficiency.md").read_text()
    other = {name: counts for name, counts in found.items() if name not in same}
    assert [name for name, counts in other.items() if counts != (None, None)] == ["inkling2_loop_text"]
    assert other["inkling2_loop_text"][0] is None


def test_a_window_that_slides_keeps_what_is_in_it() -> None:
    model = family_model(family_config("gemma2"), dtype=torch.float32)  # windows of 4 in the first and last layer
    token = 2 * 3 * 10 * 4  # keys and values, KV heads, head size, float32
    assert cache_bytes_by_layer(model, seq_len=3) == (3 * token, 3 * token, 3 * token)
    assert cache_bytes_by_layer(model, seq_len=TOKENS) == (3 * token, TOKENS * token, 3 * token)


def test_latent_attention_keeps_the_latents() -> None:
    """One latent for all heads, and the part of the keys that is rotated."""
    config = tiny_config("deepseek_v3")
    [layer, *_] = cache_bytes_by_layer(real_model("deepseek_v3"), seq_len=TOKENS) or ()
    assert layer == TOKENS * (config.kv_lora_rank + config.qk_rope_head_dim) * 4


def test_a_recurrent_state_does_not_grow() -> None:
    model = real_model("mamba2")
    assert cache_bytes_by_layer(model, seq_len=8) == cache_bytes_by_layer(model, seq_len=40)


def test_weight_bytes_count_parameters_in_their_dtype() -> None:
    small = tiny_model()
    assert weight_bytes(small) == 4 * sum(weight.numel() for weight in small.parameters())
    assert weight_bytes(small.bfloat16()) == 2 * sum(weight.numel() for weight in small.parameters())


def test_weight_bytes_count_tied_weights_once() -> None:
    untied, tied = (tiny_model(tie_word_embeddings=tied) for tied in (False, True))
    assert weight_bytes(untied) - weight_bytes(tied) == untied.get_input_embeddings().weight.nbytes


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


def test_activations_are_counted_in_proportion_to_the_prompts_and_to_the_dtype() -> None:
    ids_BT = torch.zeros(4, 32, dtype=torch.long)
    full = activation_bytes(tiny_model(), ids_BT)
    assert full == activation_bytes(tiny_model(), ids_BT)  # counted, not sampled
    assert full == pytest.approx(4 * activation_bytes(tiny_model(), ids_BT[:1]), rel=0.1)
    assert activation_bytes(tiny_model(dtype=torch.bfloat16), ids_BT) == pytest.approx(full / 2, rel=0.1)


def test_activations_hold_the_widest_layer_and_what_composite_operators_allocate() -> None:
    ids_BT = torch.zeros(1, 64, dtype=torch.long)
    wide, narrow = (activation_bytes(tiny_model(intermediate_size=size), ids_BT) for size in (2000, 1000))
    # At the peak, three results of 64 x intermediate_size float32 are alive, besides hidden states and the cache.
    assert wide - narrow == 3 * 64 * 1000 * 4
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert activation_bytes(tiny_model(), ids_BT) > 2 * 6 * 64 * 64 * 4  # scores and their softmax, 6 heads
