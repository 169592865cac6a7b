"""Costs by arithmetic: a config's cache is that of its model, and the sizes of a plan are those of what it cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from every_type import tiny_config
from families import family_config, family_model
from secateur import CutOptions, discover, plan, prune, score
from secateur.discovery.counting import count_macs
from secateur.errors import PlanError
from secateur.evaluation.flops import cache_bytes_by_layer, count_macs_by_kind, sizes_of, sizes_of_model
from secateur.evaluation.profile import profile_models
from secateur.models.loading import skeleton
from secateur.models.silence import quiet
from secateur.planning.options import options_for
from secateur.report.formatting import format_macs

TOKENS = 9
# grouped queries; a window that slides; learned positions; latent attention; a state space; states beside attention;
# one KV head; linear attention beside full; parallel residual
TYPES = ("llama", "gemma2", "gpt2", "deepseek_v3", "mamba2", "jamba", "gpt_bigcode", "qwen3_next", "gpt_neox")


def real_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    model.eval()
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_the_cache_of_a_config_is_that_of_its_model(model_type: str) -> None:
    model = real_model(model_type)
    with quiet():
        on_meta = cache_bytes_by_layer(skeleton(model.config).float(), seq_len=TOKENS)
    assert on_meta == cache_bytes_by_layer(model, seq_len=TOKENS)
    assert len(on_meta) == model.config.get_text_config().num_hidden_layers
    assert all(on_meta)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "deepseek_v3", "gpt_bigcode", "gpt_neox"])
def test_the_bytes_are_those_of_the_keys_and_values(model_type: str) -> None:
    """Beside transformers' own cache, layer by layer; of a window that slides, what is in it."""
    model = real_model(model_type)
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    kept = [layer.keys.numel() * 4 + layer.values.numel() * 4 for layer in cache.layers]
    assert cache_bytes_by_layer(model, seq_len=TOKENS) == tuple(kept)


def test_a_window_that_slides_keeps_what_is_in_it() -> None:
    model = family_model(family_config("gemma2"), dtype=torch.float32)  # windows of 4 in the first and last layer
    token = 2 * 3 * 10 * 4  # keys and values, KV heads, head size, float32
    assert cache_bytes_by_layer(model, seq_len=3) == (3 * token, 3 * token, 3 * token)
    assert cache_bytes_by_layer(model, seq_len=TOKENS) == (3 * token, TOKENS * token, 3 * token)


def test_latent_attention_keeps_the_latents() -> None:
    """One latent for all heads, and the part of the keys that is rotated."""
    config = tiny_config("deepseek_v3")
    [layer, *_] = cache_bytes_by_layer(real_model("deepseek_v3"), seq_len=TOKENS)
    assert layer == TOKENS * (config.kv_lora_rank + config.qk_rope_head_dim) * 4


def test_a_recurrent_state_does_not_grow() -> None:
    model = real_model("mamba2")
    assert cache_bytes_by_layer(model, seq_len=8) == cache_bytes_by_layer(model, seq_len=40)


def test_a_cache_in_bfloat16_is_half_as_large() -> None:
    config = family_config("llama")
    full, half = (sizes_of(config, discover(config), name="m", dtype=d) for d in (torch.float32, torch.bfloat16))
    assert full.kv_cache_bytes == 2 * (half.kv_cache_bytes or 0) > 0
    assert full.weight_bytes == 2 * half.weight_bytes


CUTS: dict[str, dict[str, Any]] = {
    "free": {"ratio": 0.4, "scope": "global", "shape": "free", "at_least": 0.1},
    "layers": {"ratio": 0.4, "axes": ("layers",)},
    "uniform": {"ratio": 0.34, "of": "units"},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_sizes_of_a_plan_are_those_of_the_model_that_it_cuts(family: str, cut: str) -> None:
    """All counts, also by kind where one head is left, which is no group of the smaller model."""
    config = family_config(family)
    discovery, model = discover(config), family_model(config, dtype=torch.float32)
    options = CutOptions(score="l2", **CUTS[cut])
    decided = plan(discovery, options, config=config, scores=score(model, discovery=discovery, name="l2"))
    smaller = prune(model, decided)
    planned = sizes_of(
        config, discovery, name="m", plan=decided, seq_lens=[TOKENS, 5], batches=[1, 3], dtype=torch.float32
    )
    found = sizes_of_model(smaller, discover(smaller, name="m"), name="m", seq_lens=[TOKENS, 5], batches=[1, 3])
    assert planned == found
    assert planned.parameters == decided.parameters["pruned"]
    assert planned.grid[1].macs == 3 * planned.grid[0].macs


def test_a_plan_that_says_only_how_many_will_do() -> None:
    config = family_config("llama")
    discovery = discover(config)
    decided = plan(discovery, CutOptions(ratio=0.3), config=config)
    assert not decided.decided
    assert sizes_of(config, discovery, name="m", plan=decided).parameters == decided.parameters["pruned"]


def test_a_plan_of_another_model_is_refused() -> None:
    config = family_config("llama", intermediate_size=80)
    decided = plan(discover(config), CutOptions(ratio=0.3), config=config)
    other = family_config("llama")
    with pytest.raises(PlanError, match=r"the plan counts 80 units of layers\.0\.mlp, the model has 84"):
        sizes_of(other, discover(other), name="m", plan=decided)


@pytest.mark.parametrize("model_type", [*TYPES, "dbrx", "bloom"])
def test_macs_by_kind_are_macs_by_operator(model_type: str) -> None:
    with quiet():
        discovery = discover(tiny_config(model_type))
    by_kind, by_operator = count_macs_by_kind(discovery, tokens=7), count_macs(discovery, tokens=7)
    assert sum(by_kind.values()) == sum(by_operator.values())
    assert "frozen" not in by_kind


def test_macs_of_a_layer_by_hand() -> None:
    """Grouped queries: 6 heads of 10 over 3 KV heads, hidden 48, MLP 84, 3 layers, 101 tokens in the vocabulary."""
    found = count_macs_by_kind(discover(family_config("llama")), tokens=TOKENS)
    attention = 48 * 60 + 2 * 48 * 30 + 60 * 48  # projections, for each token
    scores = 2 * 60 * TOKENS + 6 * TOKENS  # products, and one of the softmax for each score
    rotary = 2 * (60 + 30)
    assert found["attention"] == 3 * TOKENS * (attention + scores + rotary)
    assert found["mlp"] == 3 * TOKENS * (3 * 48 * 84 + 84)
    assert found["vocabulary"] == TOKENS * 48 * 101
    assert found["hidden"] == (2 * 3 + 1) * 2 * 48 * TOKENS


def test_the_published_macs_of_a_7b_model(tmp_path: Path) -> None:
    """LLM-Pruner's table: 424.02 G, and 339.60 G after the 20 % block cut; 64 tokens, on `meta`."""
    config = AutoConfig.for_model("llama")  # its defaults are LLaMA-7B's sizes
    config.save_pretrained(tmp_path)
    discovery = discover(config)
    decided = plan(discovery, options_for("llm-pruner", discovery, {}), config=config)
    dense, cut = profile_models([str(tmp_path / "config.json")], plan=decided, plan_name="plan.json")
    assert (format_macs(dense.macs), format_macs(cut.macs)) == ("424.02 G", "339.60 G")
    assert cut.model == f"{tmp_path / 'config.json'} + plan.json"
    assert dense.kv_cache_bytes == 32 * 2 * 4096 * 64 * 4
    assert cut.kv_cache_bytes == (6 * 32 + 26 * 24) * 128 * 2 * 64 * 4  # heads of 6 whole and 26 cut layers
