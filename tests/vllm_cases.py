"""Tiny models that are served by vLLM: one of each structure that its transformers backend runs, and what it does not.

Heads have 32 numbers, the fewest that vLLM's kernels for CPUs take.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from contract import uneven
from every_type import tiny_type_model
from secateur import discover, prune, save
from secateur.models.loading import load
from secateur.models.silence import quiet
from secateur.planning.plan import Plan, PlannedGroup
from tiny import tiny_tokenizer

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, WINDOW = 300, 192, 6, 3, 32, 3, 8
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 120),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts"), 5),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "shared_expert_intermediate_size": 36,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
LATENT = {
    "num_key_value_heads": HEADS,
    "head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "q_lora_rank": 26,
    "kv_lora_rank": 22,
    "n_routed_experts": 5,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS = ("attention", "mlp", "expert", "expert_mlp", "shared_mlp")


@dataclass(frozen=True)
class Case:
    """A model type, its settings and the kinds of groups that are cut."""

    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("attention", "mlp")
    backend: str = ""  # what vLLM's backend says; the plug-in serves it all the same


CASES: dict[str, Case] = {
    "llama": Case("grouped queries"),
    "mistral": Case("a window in every layer", {"sliding_window": WINDOW}),
    "qwen2": Case("biases of queries, keys and values"),
    "qwen3": Case("norms of queries and keys"),
    "gemma": Case("tied embeddings, scaled by a buffer"),
    "gemma2": Case("two kinds of layer, scores and logits capped, four norms", WINDOWS),
    "gemma3_text": Case("two kinds of layer with rotations of their own", WINDOWS),
    "phi": Case("all heads rotated in part, biases, attention beside the MLP"),
    "phi3": Case("fused projections"),
    "gpt_bigcode": Case("one KV head for all queries, learned positions", kinds=("query", "mlp")),
    "gpt_neox": Case("fused queries, keys and values, interleaved by head"),
    "opt": Case("matrices of the layer's own, positions with an offset"),
    "olmo2": Case("norms after the sub-layers, one over all heads"),
    "stablelm": Case("layer norms, heads rotated in part"),
    "starcoder2": Case("biases everywhere, an MLP without a gate"),
    "granite": Case("multipliers of embeddings, scores, residuals and logits"),
    "glm4": Case("fused gates, four norms, heads rotated in part"),
    "cohere": Case("interleaved rotation, attention beside the MLP, tied embeddings"),
    "mixtral": Case("experts, stacked"),
    "qwen3_moe": Case("experts, and a dense layer before them", {"mlp_only_layers": [0]}),
    "deepseek_v3": Case("latent attention, plug-in only", LATENT, backend="Head dimension 32 is not supported by MLA"),
    "gpt_oss": Case("experts with biases, sinks, two kinds of layer", WINDOWS),
}


@dataclass(frozen=True)
class Refused:
    """A model type that vLLM's backend does not run."""

    says: str
    because: str
    settings: dict[str, Any] = field(default_factory=dict)


INTERFACE = "does not dispatch through the Transformers attention interface"
REFUSED: dict[str, Refused] = {
    "bloom": Refused("Argument position_ids not found in the forward method", "positions are a bias of the scores"),
    "falcon": Refused("KeyError: 'vllm'", "its code has a class for each way to compute attention"),
    "gptj": Refused("KeyError: 'vllm'", "its code has a class for each way to compute attention", {"rotary_dim": 16}),
    "gpt2": Refused("shapes cannot be multiplied", "its code wants another shape of what attention gives"),
    "diffllama": Refused(INTERFACE, "its attention is a difference of two", {"num_key_value_heads": 2}),
    "jamba": Refused(INTERFACE, "some layers are state spaces"),
}
PROMPTS = ((5, 6, 7, 8, 9), (20, 30, 40), (11, 12, 13, 14, 15, 16, 17, 18), (50,), (33, 22, 44, 55, 21, 60, 61))
NEW_TOKENS = 32
FEWEST_KINDS = 8  # different tokens that a reference has at least: a model that repeats one says little


def settings_of(model_type: str) -> dict[str, Any]:
    """The sizes and settings of a type, by the names that its config has for them."""
    known = inspect.signature(CONFIG_MAPPING[model_type]).parameters
    return {name: size for name, size in {**SIZES, **(CASES | REFUSED)[model_type].settings}.items() if name in known}


@cache
def dense(model_type: str, **sizes: int) -> PreTrainedModel:
    """A random model of the type, in float32."""
    with quiet():
        config = CONFIG_MAPPING[model_type](**{**settings_of(model_type), **sizes})
        model = tiny_type_model(model_type, config, dtype=torch.float32)
    if model.config.tie_word_embeddings:  # else every token is followed by itself
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "norm" in name:
                    parameter.add_(2.0)
    return model


def write(
    model_type: str, out: Path, *, experts: bool = False, gone: tuple[str, ...] = (), widths: tuple[int, ...] = ()
) -> Path:
    """A folder in which every layer has other heads and widths, or other experts; groups named in `gone` are empty.

    `widths` are those of the MLPs, by layer.
    """
    model = dense(model_type, intermediate_size=192) if widths else dense(model_type)
    discovery = discover(model)
    kinds = CASES[model_type].kinds if model_type in CASES else ("attention", "mlp")
    decided = uneven(model, EXPERTS if experts else kinds, discovery=discovery)
    groups = [group for group in decided.groups if group.name not in gone]
    for name in gone:
        group = discovery.group(name)
        groups.append(PlannedGroup(name, group.kind, group.layer, group.units, 0, ()))
    for number, width in enumerate(widths):
        group = discovery.group(f"layers.{number}.mlp")
        groups = [each for each in groups if each.name != group.name]
        groups.append(PlannedGroup(group.name, group.kind, number, group.units, width, tuple(range(width))))
    plan = Plan(model_type, decided.options, tuple(groups), {}, {})
    return save(prune(model, plan, discovery=discovery), out, plan=plan, tokenizer=tiny_tokenizer())


def reference(folder: Path) -> list[list[int]]:
    """Greedy tokens by transformers, for each prompt on its own."""
    with quiet():
        model: Any = load(str(folder), device="cpu")
        ids = [torch.tensor([prompt]) for prompt in PROMPTS]
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        found = [model.generate(i, attention_mask=torch.ones_like(i), eos_token_id=None, **settings) for i in ids]
    tokens: list[list[int]] = [row[0, i.shape[1] :].tolist() for row, i in zip(found, ids, strict=True)]
    return tokens


def shortfall(folder: Path, continued: Sequence[Sequence[int]]) -> float:
    """How far at most the tokens that follow each prompt are from the best, in standard deviations of the logits."""
    with quiet():
        model: Any = load(str(folder), device="cpu", dtype="float32")
    worst = 0.0
    for prompt, new in zip(PROMPTS, continued, strict=True):
        with torch.no_grad():
            logits_TX = model(torch.tensor([[*prompt, *new[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        behind = logits_TX.max(dim=1).values - logits_TX[torch.arange(len(new)), torch.tensor(new)]
        worst = max(worst, float((behind / logits_TX.std(dim=1)).max()))
    return worst
