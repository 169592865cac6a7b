"""A discovery counts the parameters and multiply-accumulates that a cut leaves, as the smaller model has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.discover import discover
from secateur.models.silence import quiet
from small_models import CONFIGS, llama, small_discovery


def parameters(config: PreTrainedConfig) -> int:
    """Of a real model of that config."""
    with quiet():
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_counts_once(family: str) -> None:
    discovery = small_discovery(family)
    tables = sum(torch.Size(w.shape).numel() for w in discovery.weights if w.embedding)
    assert count_parameters(discovery) == parameters(CONFIGS[family])
    assert count_parameters(discovery, embeddings=False) == parameters(CONFIGS[family]) - tables


@pytest.mark.parametrize(
    ("kept", "smaller"),
    [
        ({"mlp": 16}, llama(intermediate_size=16)),
        ({"attention": 1}, llama(num_attention_heads=2, num_key_value_heads=1)),
        ({"query": 1}, llama(num_attention_heads=2)),
        ({"hidden": 8}, llama(hidden_size=8)),
        (
            {"mlp": 8, "attention": 1, "query": 1, "hidden": 12},
            llama(intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, hidden_size=12),
        ),
    ],
)
def test_a_cut_counts_as_the_smaller_model_does(kept: dict[str, int], smaller: LlamaConfig) -> None:
    discovery = small_discovery("llama")
    sizes = {g.name: kept[g.kind] for g in discovery.groups if g.kind in kept}
    assert count_parameters(discovery, sizes) == parameters(smaller)
    assert count_macs(discovery, sizes) == count_macs(discover(smaller))


def test_a_dropped_layer_counts_as_the_shallower_model_does() -> None:
    discovery, shallower = discover(llama(num_hidden_layers=3)), llama(num_hidden_layers=2)
    assert count_parameters(discovery, dropped_layers=frozenset({1})) == parameters(shallower)
    assert count_macs(discovery, dropped_layers=frozenset({1})) == count_macs(discover(shallower))


def test_multiply_accumulates_of_a_layer_by_hand() -> None:
    discovery = discover(llama(num_hidden_layers=1))
    tokens, hidden, inner, heads, kv, dim, vocabulary = 3, 16, 24, 4, 2, 4, 50
    projections = tokens * hidden * (2 * heads * dim + 2 * kv * dim + 3 * inner + vocabulary)
    assert count_macs(discovery, tokens=tokens) == {
        "matmul": projections + 2 * heads * tokens * tokens * dim,
        "norm": 3 * 2 * tokens * hidden,
        "softmax": heads * tokens * tokens,
        "activation": tokens * inner,
        "rotary": 2 * tokens * (heads + kv) * dim,
    }
