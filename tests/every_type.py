"""A tiny random model of every type that an auto class knows, with sizes that differ from each other.

A type alone is that of AutoModelForCausalLM; "AutoModel/bert" is that of another auto class. The settings come from the
type's own config class: each one that it accepts and that SIZES names takes the size found there. EXCEPTIONS holds what
a type needs besides, and why.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from class_types import CLASS_SETTINGS
from secateur.models.classes import AUTO_CLASSES
from secateur.models.loading import EXPERTS

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
CAUSAL = "AutoModelForCausalLM"
LAYERS = 3

# One entry per size; the names are what the config classes call it.
SIZES_AND_NAMES: tuple[tuple[Any, str], ...] = (
    (101, "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id cls_token_id"),
    (2, "eos_token_id sep_token_id forced_eos_token_id"),
    (64, "max_position_embeddings original_max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (64, "max_target_positions max_source_positions"),
    (48, "hidden_size n_embd d_model emb_dim"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (LAYERS, "encoder_layers num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers"),
    (6, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (6, "num_decoder_attention_heads encoder_attention_heads num_encoder_attention_heads"),
    (4, "swa_num_attention_heads"),
    (3, "num_key_value_heads num_kv_heads kv_n_heads"),
    (2, "swa_num_key_value_heads"),
    (10, "head_dim dim_head d_head attention_head_size kv_channels query_pre_attn_scalar"),
    (12, "swa_head_dim"),
    (4, "rotary_dim"),
    (84, "intermediate_size ffn_dim n_inner d_inner dff dim_ff decoder_ffn_dim ffn_hidden_size feed_forward_size"),
    (92, "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size encoder_ffn_dim"),
    (40, "embedding_size word_embed_proj_dim input_embedding_size"),
    (44, "output_embedding_size"),
    # experts: five, two at a time, after one dense layer
    (5, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group zero_expert_num"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    ([0], "mlp_only_layers"),
    (28, "moe_intermediate_size expert_ffn_hidden_size"),
    (36, "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size"),
    (36, "moe_shared_expert_intermediate_size"),
    (0, "num_mtp_layers num_nextn_predict_layers"),
    # latent attention, and the indexer that picks its keys
    (26, "q_lora_rank"),
    (22, "kv_lora_rank"),
    (14, "qk_nope_head_dim"),
    (8, "qk_rope_head_dim"),
    (18, "v_head_dim"),
    (4, "index_n_heads indexer_n_heads"),
    (16, "index_head_dim indexer_head_dim"),
    (4, "index_topk indexer_budget"),
    (1, "indexer_kv_heads"),
    (2, "indexer_compress_ratio"),
    # windows, and which layers have attention, experts or no rotary embedding
    (4, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size local_attention"),
    (2, "attn_layer_period"),
    (1, "attn_layer_offset"),
    ([1], "attn_layer_indices moe_layers cross_attention_layers"),
    ([1, 0, 1], "no_rope_layers"),
    (1, "n_input_layers n_output_layers"),
    # state spaces and linear attention
    (11, "mamba_d_state state_size ssm_state_size"),
    (4, "mamba_d_conv conv_kernel conv1d_width linear_conv_kernel_dim short_conv_kernel_size conv_kernel_size"),
    (2, "mamba_expand expand mamba_n_groups n_groups mamba_ngroups"),
    (7, "time_step_rank mamba_dt_rank"),
    (8, "mamba_n_heads n_mamba_heads mamba_num_heads"),
    (12, "mamba_d_head mamba_head_dim"),
    (96, "mamba_d_ssm"),
    (4, "mamba_chunk_size chunk_size"),
    (2, "linear_num_key_heads"),
    (8, "linear_num_value_heads"),
    (7, "linear_num_heads"),
    (13, "linear_key_head_dim linear_head_dim"),
    (15, "linear_value_head_dim"),
    # low ranks, streams and what else would be large
    (9, "adapter_rank d_rel"),
    (31, "rel_extent"),
    (66, "lru_width"),
    (13, "loop_gate_rank"),
    (17, "laurel_rank hc_lowrank o_lora_rank"),
    (19, "gated_norm_rank router_hidden_size"),
    (3, "type_vocab_size num_codebooks hc_mult hc_count"),
    (20, "hidden_size_per_layer_input"),
    (52, "backbone_hidden_size"),
    (72, "hidden_size_global"),
    (16, "image_size"),
    (8, "patch_size"),
    (53, "shape_vocab_size"),
    (59, "pronunciation_vocab_size audio_vocab_size"),
    (21, "shape_embed_dim"),
    (23, "pronunciation_embed_dim prompt_mid_dim"),
    (True, "is_decoder"),
    (False, "use_mamba_kernels"),
    (None, "begin_suppress_tokens"),
    ("original_full", "attention_type"),
)
SIZES: dict[str, Any] = {name: size for size, names in SIZES_AND_NAMES for name in names.split()}
# Sizes of the parts that see or hear.
TOWER_SIZES: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "embed_dim": 32,
    "mm_embed_dim": 32,
    "audio_embed_dim": 32,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 32,
    "output_channels": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "output_proj_dims": 48,
    "adapter_out_dim": 48,
    "num_hidden_layers": 1,
    "num_blocks": 1,
    "depth": 1,
    "conf_num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "conf_num_attention_heads": 2,
    "head_dim": 16,
    "intermediate_size": 56,
    "mlp_dim": 56,
    "mm_posemb_size": 12,
    "position_embedding_size": 12,
    "crop_size": 16,
}
# What a setting asks of another one.
DERIVED: dict[str, dict[str, Any]] = {
    "kv_lora_rank": {"num_key_value_heads": 6},  # latent attention gives every head its own keys
}


@dataclass(frozen=True, slots=True)
class Exception_:
    """What one type needs besides the sizes that all share; a dict stands for the settings of a config inside."""

    settings: dict[str, Any]
    reason: str


SEVERAL_ROWS = ("musicgen", "musicgen_melody")  # one row of tokens for each codebook
ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
FULL, SLIDING, LINEAR, HYBRID = "full_attention", "sliding_attention", "linear_attention", "hybrid"
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

EXCEPTIONS: dict[str, Exception_] = {
    "blt": Exception_(
        {
            "patch_in_forward": False,
            "encoder_hash_byte_group_size": [3, 4],
            "encoder_hash_byte_group_vocab": 67,
            "global_config": {"hidden_size": 72, "intermediate_size": 76},
        },
        "data decides its patches unless they are one byte each; half a million rows per table; a wider global part",
    ),
    "codegen": Exception_({"n_head": 8}, "its code splits the heads into four parts"),
    "cohere_compass_text": Exception_(
        {"rope_parameters": {FULL: {**PLAIN_ROPE, "mrope_section": [2, 1, 1]}}},
        "its rotary embedding reads one entry for each kind of layer, and the default has none",
    ),
    "dbrx": Exception_(
        {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
        "its attention needs a rotary base, which its config lacks, and a clip",
    ),
    "deepseek_v4": Exception_(
        {
            "num_key_value_heads": 1,
            "head_dim": 20,
            "partial_rotary_factor": 0.4,
            "o_groups": 3,
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
        },
        "all its heads share one key; the output groups divide the heads; blocks of keys shorter than the text",
    ),
    "diffllama": Exception_({"num_key_value_heads": 2}, "it splits the values into two halves along the KV heads"),
    "dots3_note": Exception_(
        {"vision_config": {"mlp_layer_types": ["dense"]}}, "its vision tower gives each of 17 layers its own experts"
    ),
    "dots3_note_text": Exception_(
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 29,
            "swa_kv_lora_rank": 21,
            "swa_head_dim": 19,
            "swa_qk_nope_head_dim": 13,
            "swa_v_head_dim": 17,
        },
        "its sliding layers have sizes of their own, which are no settings of the class",
    ),
    "gemma3n_text": Exception_(
        {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2},
        "the last layers use the keys of earlier layers of the same kind, so each kind comes twice",
    ),
    "gemma4_assistant": Exception_(
        {"text_config": {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0}},
        "it allows no embeddings per layer",
    ),
    "gemma4_text": Exception_({"global_head_dim": 14}, "the heads of full attention have a size of their own"),
    "gemma4_unified_text": Exception_({"global_head_dim": 14}, "the heads of full attention have a size of their own"),
    "gpt_neo": Exception_(
        {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}, "its kinds of layer come as a pattern"
    ),
    "granitemoehybrid": Exception_(
        {"layer_types": [LINEAR, FULL, LINEAR]}, "without one attention layer it cannot count the tokens"
    ),
    "helium": Exception_({"head_dim": 8}, "its output projection takes hidden_size = heads x head_dim"),
    "inkling2_loop_text": Exception_(
        {
            "num_hidden_layers": 6,
            "layer_types": ["hybrid_sliding", "hybrid"] * 3,
            "n_layers_per_attn_res_block": 2,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_num_passes": 2,
        },
        "it repeats whole blocks of layers in the middle",
    ),
    "inkling2_text": Exception_({"n_layers_per_attn_res_block": 2}, "a block of layers shorter than the model"),
    "kolibri1_1": Exception_(
        {"head_dim": 16, "index_num_heads": 2, "index_pool_size": 4, "index_compression": 2},
        "it rounds keys and values in blocks of 16; its indexer has the query heads of one key head at most",
    ),
    "lfm2": Exception_({"layer_types": ["conv", FULL, "conv"]}, "its default has attention only"),
    "lfm2_moe": Exception_({"layer_types": ["conv", FULL, "conv"]}, "its default names no kinds of layer"),
    "longcat_flash": Exception_({"head_dim": 8}, "its rotary embedding takes its size from head_dim"),
    "mamba2": Exception_({"num_heads": 8, "head_dim": 12}, "its heads are the state's: expand x hidden_size in all"),
    "mellum": Exception_({"layer_types": [SLIDING, FULL, FULL]}, "its default has full attention only"),
    "ministral": Exception_({"layer_types": [SLIDING, FULL, FULL]}, "its default has sliding attention only"),
    "nemotron_h": Exception_(
        {"layers_block_type": [LINEAR, "moe", FULL, "mlp"], "num_hidden_layers": 4}, "it has four kinds of layer"
    ),
    "qwen4_exp_text": Exception_(
        {
            "ple_layer_ids": [1],
            "ple_embed_dim": 24,
            "heads_per_ngram": 3,
            "ngram_vocab_size_base": 31,
            "make_ngram_vocab_size_divisible_by": 1,
            "split_ngram_parts": 1,
        },
        "its tables of n-grams have millions of rows",
    ),
    "reformer": Exception_(
        {
            "attn_layers": ["local", "lsh", "local"],
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [20, 28],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
        },
        "positions are a grid, kinds of layer a list, and hashing draws random numbers",
    ),
    "xlnet": Exception_({"d_head": 8}, "it checks that d_model = n_head x d_head"),
    "xmod": Exception_({"default_language": "en_XX"}, "it asks for the language of the text"),
    "zamba": Exception_(
        {"num_hidden_layers": 4, "layers_block_type": [LINEAR, LINEAR, HYBRID, HYBRID]},
        "it shares one attention block, so two layers must use it",
    ),
    "zamba2": Exception_(
        {"num_hidden_layers": 4, "layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID]},
        "it shares one attention block, so two layers must use it",
    ),
    "zaya": Exception_({"num_experts_per_tok": 1}, "it accepts one expert per token only"),
}
NOT_BUILT: dict[str, str] = {"gemma3n": "its vision tower is one of timm, on which we do not depend"}
# Types whose code fails in float64; their models are float32 where float64 is asked for.
FLOAT32: dict[str, str] = {
    "blt": "its softmax is in float32, where the lowest float64 of its mask is an infinity",
    "inkling2_loop_text": "its router multiplies float32 tokens with its weight",
    "inkling2_text": "its router multiplies float32 tokens with its weight",
    "xglm": "its attention makes a mask in torch's default type, which cannot hold float64's lowest number",
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny config of a type, as AutoModelForCausalLM takes it; for a decoder inside a type, the decoder's."""
    auto, model_type = auto_and_type(model_type)
    config_class: Any = CONFIG_MAPPING[model_type]
    if auto == CAUSAL and "decoder" in config_class.sub_configs:
        config_class = _model_class(model_type).config_class
    settings = _settings(config_class, model_type)
    if auto != CAUSAL:
        settings["is_decoder"] = False
    config: PreTrainedConfig = config_class(**settings)
    if auto != CAUSAL:
        config.architectures = [_model_class(f"{auto}/{model_type}").__name__]
    return config


def auto_and_type(name: str) -> tuple[str, str]:
    """The auto class and the type of a name."""
    auto, _, model_type = name.rpartition("/")
    return auto or CAUSAL, model_type


def initial_model(model_type: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the type as transformers makes it, with eager attention; it may be made on `meta`."""
    if auto_and_type(model_type)[0] == CAUSAL and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:  # the config of a part, such as a decoder
        model = _model_class(model_type)._from_config(config, attn_implementation="eager")
    return model


def tiny_type_model(
    model_type: str, config: PreTrainedConfig | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A model of the type, in evaluation mode, with random weights large enough for each to matter."""
    config = tiny_config(model_type) if config is None else copy.deepcopy(config)
    if dtype == torch.float64 and model_type in FLOAT32:
        dtype = torch.float32
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = EXPERTS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = initial_model(model_type, config)
    model.eval().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.numel() == max(parameter.shape, default=1):  # a vector, whatever the number of dimensions
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def tiny_inputs(
    model_type: str, config: PreTrainedConfig, *, batch: int = 2, length: int = 9, seed: int = 0
) -> dict[str, Any]:
    """Random tokens, none of them special, or what else the type takes."""
    generator = torch.Generator().manual_seed(seed)
    if model_type in ASSISTANTS:
        return _assistant_inputs(config, batch, length, generator)
    rows = batch * config.num_codebooks if model_type in SEVERAL_ROWS else batch
    vocabulary = config.get_text_config().vocab_size
    return {"input_ids": torch.randint(5, vocabulary, (rows, length), generator=generator)}


def _assistant_inputs(config: PreTrainedConfig, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    """What an assistant takes from the model that it assists to draft one token: embeddings, keys and values."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    text = config.get_text_config()
    shared = {}
    for kind in text.layer_types:
        layer = text.per_layer_config[kind]
        heads = (layer.num_key_value_heads, length, layer.head_dim)
        shared[kind] = numbers(*heads), numbers(*heads)
    return {"inputs_embeds": numbers(1, 2 * config.backbone_hidden_size), "shared_kv_states": shared}


def _model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that its auto class picks for a type."""
    auto, model_type = auto_and_type(model_type)
    found: Any = AUTO_CLASSES[auto][CONFIG_MAPPING[model_type]]
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
    return model_class


def _settings(config_class: type[PreTrainedConfig], model_type: str, *, tower: bool = False) -> dict[str, Any]:
    """Every setting of a config class that has a tiny size, those of the configs inside it too."""
    accepted = inspect.signature(config_class).parameters
    sizes = TOWER_SIZES if tower else SIZES
    settings = {name: sizes[name] for name in accepted if name in sizes}
    if tower:
        return settings
    for name in settings.keys() & DERIVED.keys():
        settings |= DERIVED[name]
    settings |= _layer_kinds(config_class, accepted)
    specs = getattr(config_class, "sub_configs_defaults", None) or {}  # new releases alone have it
    for name, named_class in config_class.sub_configs.items():
        inner: Any = CONFIG_MAPPING[specs[name].model_type] if named_class is AutoConfig else named_class
        settings[name] = _settings(inner, inner.model_type, tower=name.startswith(("vision", "audio", "vq")))
    special = EXCEPTIONS[model_type].settings if model_type in EXCEPTIONS else CLASS_SETTINGS.get(model_type, {})
    for name, value in special.items():
        settings[name] = settings[name] | value if name in config_class.sub_configs else value
    return settings


def _layer_kinds(config_class: type[PreTrainedConfig], accepted: Container[str]) -> dict[str, list[str]]:
    """Each kind of layer that the type has by default, and a dense layer before those with experts."""
    settings = {}
    for name in LAYER_KINDS:
        if name in accepted and (default := getattr(config_class(), name, None)):
            kinds = ["dense", "sparse", "sparse"] if "sparse" in default else list(dict.fromkeys(default))
            settings[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    return settings
