"""Which models fit an architecture of llama.cpp, and the metadata of those that do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_cases import CASES, EVEN, GPT2, LLAMA3, WIDE, WINDOWS, case_model, fields, rope, uneven, write
from torch import nn
from transformers import AutoConfig

import contract
from families import family_model
from secateur import prune
from secateur.errors import ExportError, ModelError
from secateur.export.fitting import pad_layers
from secateur.export.mapping import map_model
from secateur.models.llama_cpp_architectures import TABLE, architecture, known_types, type_of
from secateur.models.silence import quiet
from tiny import names, tiny_model


def test_the_table_and_the_cases_have_the_same_model_types() -> None:
    assert {case.split()[0] for case in CASES} == set(known_types())


def test_every_entry_of_the_table_is_used() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    used = {name for entry in table["types"].values() for name in entry["architectures"]}
    assert set(table["architectures"]) == used
    for name in used:
        assert name in gguf.MODEL_ARCH_NAMES.values()
        assert architecture(name).rotary in ("halves", "pairs", "none")


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be written to a GGUF file: .* with 'silu'"),
        ("qwen3", {"attention_bias": True}, "it has no bias for attn_k, attn_output, attn_q, attn_v"),
        ("gemma2", {"query_pre_attn_scalar": 10, **WINDOWS}, "query_pre_attn_scalar = 10 .* by the root of 24"),
        (
            "gemma2",
            {"attn_logit_softcapping": None, **WINDOWS},
            "attn_logit_softcapping = None .* with a number there",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True, "query_pre_attn_scalar": 24, **WINDOWS},
            "use_bidirectional_attention = True",
        ),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 4}, "norm_topk_prob = False .* computes with True"),
        ("stablelm", {"qk_layernorm": True, "head_dim": None}, "GGUF has no name for the weight .*layernorm"),
        ("llama", rope("dynamic", factor=2.0), "rope_type 'dynamic' cannot be written .* 'llama'"),
        ("qwen3", LLAMA3, "rope_type 'llama3' cannot be written to a GGUF file for the architecture 'qwen3'"),
        (
            "llama",
            rope("yarn", factor=2.0, beta_fast=16, original_max_position_embeddings=64),
            "rope_type 'yarn' that sets beta_fast cannot be written",
        ),
        (
            "gemma",
            {"tie_word_embeddings": False},
            "its output matrix is the embedding, and the model has one of its own",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (
            "opt",
            {},
            r"model type 'opt' cannot be written as GGUF: .* Expected one of cohere, gemma, .*convert_hf_to_gguf",
        ),
    ],
)
def test_a_setting_that_a_file_cannot_describe_is_refused(
    family: str, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    base = GPT2 if family == "gpt2" else WIDE
    with quiet():
        config = AutoConfig.for_model(family, **{**base, **changes})
        model = family_model(config, dtype=torch.float32)
    with pytest.raises(ExportError, match=match):
        write(model, tmp_path / "m.gguf")
    assert names(tmp_path) == []


def test_settings_that_change_no_output_are_ignored() -> None:
    config = AutoConfig.for_model("llama", **WIDE, attention_dropout=0.5, initializer_range=1.0, own_note="hello")
    assert type_of(config).name == "llama"


def test_custom_code_is_refused() -> None:
    class LlamaConfig(type(AutoConfig.for_model("llama"))):  # type: ignore[misc]
        pass

    with pytest.raises(ExportError, match="the model's code is its own, LlamaConfig"):
        type_of(LlamaConfig())


def test_a_quantized_model_is_refused() -> None:
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"'llama' is quantized \(gptq\)"):
        type_of(config)


def test_a_weight_without_a_name_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_submodule("model.layers.0").register_parameter("gift", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ExportError, match=r"GGUF has no name for the weight model\.layers\.0\.gift of a model of type"):
        write(model, tmp_path / "m.gguf")


def test_heads_of_two_sizes_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_submodule("model.layers.0.self_attn").head_dim = 8  # type: ignore[assignment]
    with pytest.raises(ExportError, match=r"the heads of all layers one size, and this model has \[8, 16\]"):
        write(model, tmp_path / "m.gguf")


def test_query_heads_that_do_not_divide_by_kv_heads_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    attention: Any = model.get_submodule("model.layers.2.self_attn")
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :80])
    with pytest.raises(ExportError, match="layer 2: query width 80 and key width 48 do not divide into heads of 16"):
        write(model, tmp_path / "m.gguf")


def test_values_narrower_than_keys_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    cut = prune(model, contract.uneven(model, ("head_dim",)))
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.v_proj leaves out .* without the axis head_dim"):
        write(cut, tmp_path / "m.gguf")
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    attention.v_proj.weight = nn.Parameter(attention.v_proj.weight[:36])
    with pytest.raises(
        ExportError, match=r"layer 1: attn_v has 36 rows for 3 heads of 16; .* without the axis head_dim"
    ):
        write(model, tmp_path / "m.gguf")


def test_layers_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2", **EVEN)
    model = family_model(config, dtype=torch.float32)
    model.config.sliding_window, model.config.layer_types = 8, ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ExportError, match="no key for layers of the kind chunked_attention"):
        write(model, tmp_path / "m.gguf")


def test_heads_rotated_differently_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_submodule("model.layers.0").register_buffer("inv_freq", torch.ones(3))
    with pytest.raises(ExportError, match=r"all rotated alike, and the model's differ: \[6, 16\] numbers"):
        write(model, tmp_path / "m.gguf")


def test_heads_that_never_fill_the_hidden_width_are_refused() -> None:
    mapped = map_model(case_model("starcoder2"), type_of(case_model("starcoder2").config))
    narrow = dataclasses.replace(mapped, head_dim=25)
    with pytest.raises(ExportError, match=r"of size 25, cannot be padded to the hidden width of 96; .*--axes mlp"):
        pad_layers(narrow, architecture("starcoder2"))


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_of_different_sizes_are_refused(case: str, tmp_path: Path) -> None:
    model = case_model(case)
    cut = prune(model, uneven(model))
    with pytest.raises(ExportError) as refused:
        write(cut, tmp_path / "m.gguf")
    assert "--pad" not in str(refused.value)
    with pytest.raises(ExportError, match="every layer the same number of experts"):
        write(cut, tmp_path / "m.gguf", pad=True)


def test_padding_heads_under_a_norm_of_all_heads_is_refused(tmp_path: Path) -> None:
    model = case_model("olmo2")
    with pytest.raises(ExportError, match="layer 1: attn_q_norm normalises all heads together"):
        write(prune(model, uneven(model)), tmp_path / "m.gguf", pad=True)


def test_a_window_that_the_architecture_lacks_becomes_the_context(tmp_path: Path) -> None:
    written = write(case_model("mistral window"), tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 64
    assert written.notes[0].startswith("llama.cpp has no windows for llama: the file's context is the window, 64 ")


def test_windows_are_written(tmp_path: Path) -> None:
    write(case_model("gemma3_text"), tmp_path / "m.gguf")
    keys = fields(tmp_path / "m.gguf")
    assert keys["gemma3.attention.sliding_window"] == 8
    assert keys["gemma3.attention.sliding_window_pattern"] == [True, False, True]
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    assert keys["gemma3.context_length"] == 256
