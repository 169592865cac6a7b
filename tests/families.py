"""Tiny random models of every dense decoder family, with sizes that differ from each other.

The library knows no family; these are here to hold it to what it says.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 101
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
GROUPED = {
    **TOKENS,
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
WITHOUT_HEAD_DIM = {name: value for name, value in GROUPED.items() if name != "head_dim"}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,  # biases on q, k and v
    "qwen3": GROUPED,  # norms of q and k
    "gemma": {**GROUPED, "tie_word_embeddings": True},
    "gemma2": {**GROUPED, **SLIDING_AND_FULL, "query_pre_attn_scalar": 10, "tie_word_embeddings": True},
    "gemma3_text": {**GROUPED, **SLIDING_AND_FULL, "query_pre_attn_scalar": 10, "tie_word_embeddings": True},
    "phi3": WITHOUT_HEAD_DIM,  # fused q, k and v; fused gate and up
    "gpt2": {**TOKENS, "n_layer": 3, "n_embd": 48, "n_head": 6, "n_inner": 84, "n_positions": 64},
    "gpt_neox": {**WITHOUT_HEAD_DIM, "rotary_pct": 0.5},  # interleaved q, k and v; part of a head is rotated
    "opt": {
        **TOKENS,
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "ffn_dim": 84,
        "num_attention_heads": 6,
        "word_embed_proj_dim": 48,
        "max_position_embeddings": 64,
    },
}

# One of each structure: grouped queries, norms within heads, two kinds of layer with tied embeddings, fused
# projections, transposed weights, interleaved heads that are rotated in part, biases with an MLP of the layer's own.
DISTINCT = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt")


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a family."""
    settings = {**FAMILIES[family], **changes}
    if family == "gpt_neox":
        settings.pop("num_key_value_heads", None)
    return AutoConfig.for_model(family, **settings)


def family_model(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A model of the config with random weights large enough for each to matter."""
    generator = torch.Generator().manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.dim() == 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_((around + noise).to(dtype))
    return model
