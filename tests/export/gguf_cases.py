"""Tiny models of every model type that is written as GGUF, with what the tests do to them."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from families import family_model
from secateur import CutOptions, discover, export_gguf
from secateur.data.text import demo_texts
from secateur.export.check import NEW_TOKENS, PROMPTS
from secateur.export.gguf_file import GgufResult
from secateur.export.options import GgufOptions
from secateur.models.silence import quiet
from secateur.planning.plan import Plan, PlannedGroup
from tiny import tiny_tokenizer

TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 256}
WIDE: dict[str, Any] = {  # heads that are together wider than the hidden states
    **TOKENS,
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
}
EVEN = {n: v for n, v in WIDE.items() if n != "head_dim"} | {"num_attention_heads": 4, "num_key_value_heads": 2}
SINGLE = {n: v for n, v in EVEN.items() if n != "num_key_value_heads"}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
GPT2 = {**TOKENS, "n_layer": 3, "n_embd": 64, "n_head": 4, "n_inner": 96, "n_positions": 256}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
HALF = rope("default", partial_rotary_factor=0.5)
SCALES = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 3.0}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
# Name -> the architecture of the file, that of a file with per-layer sizes (None: only with padding), and the config.
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", "deci", WIDE),
    "llama tied": ("llama", "deci", {**WIDE, "tie_word_embeddings": True}),
    "llama biases": ("llama", "deci", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama rope llama3": ("llama", "deci", {**WIDE, **LLAMA3}),
    "llama rope linear": ("llama", "deci", {**WIDE, **rope("linear", factor=4.0)}),
    "llama rope yarn": ("llama", "deci", {**WIDE, **rope("yarn", factor=4.0, original_max_position_embeddings=64)}),
    "mistral": ("llama", "deci", {**WIDE, "sliding_window": None}),
    "mistral window": ("llama", "deci", {**WIDE, "sliding_window": 64}),
    "qwen2": ("qwen2", "deci", EVEN),
    "qwen2 wide": ("deci", "deci", WIDE),
    "qwen2 rope llama3": ("deci", "deci", {**EVEN, **LLAMA3}),
    "qwen3": ("qwen3", None, WIDE),
    "qwen3 tied": ("qwen3", "openelm", {**WIDE, "tie_word_embeddings": True}),
    "phi3": ("phi3", "deci", EVEN),
    "phi3 half": ("phi3", None, {**EVEN, **HALF}),
    "gemma": ("gemma", None, {**WIDE, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", None, {**WIDE, **WINDOWS, "query_pre_attn_scalar": 24}),
    "gemma3_text": ("gemma3", None, {**WIDE, **WINDOWS, "query_pre_attn_scalar": 24}),
    "gpt_neox": ("gptneox", None, {**SINGLE, "rotary_pct": 0.5}),
    "gpt_neox in turn": ("gptneox", None, {**SINGLE, "rotary_pct": 0.5, "use_parallel_residual": False}),
    "stablelm": ("stablelm", None, EVEN),
    "stablelm tied": ("stablelm", None, {**EVEN, "tie_word_embeddings": True}),
    "stablelm biases": ("stablelm", None, {**EVEN, "use_qkv_bias": True}),
    "stablelm parallel": ("stablelm", None, {**EVEN, "use_parallel_residual": True}),
    "olmo": ("olmo", None, EVEN),
    "olmo clip": ("olmo", None, {**EVEN, "clip_qkv": 0.5}),
    "olmo2": ("olmo2", None, EVEN),
    "mixtral": ("llama", None, {**WIDE, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3moe", None, {**WIDE, **EXPERTS}),
    "gpt2": ("gpt2", None, GPT2),
    "starcoder2": ("starcoder2", None, {**EVEN, "sliding_window": None}),
    "granite": ("granite", None, {**WIDE, **SCALES}),
    "granite biases": ("granite", None, {**EVEN, "attention_bias": True, "mlp_bias": True}),
    "phi": ("phi2", None, {**EVEN, **HALF}),
    "cohere": ("command-r", None, {**EVEN, "tie_word_embeddings": True}),
}
EXACT = 2e-3  # of the spread of logits: llama.cpp looks GELU up in a table of 16 bits, all else is nearer

needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp_py_sync") is None, reason="runs files in llama.cpp: pip install 'secateur[gguf]'"
)


@functools.cache
def case_model(case: str) -> PreTrainedModel:
    """Shared, so it must not be changed."""
    with quiet():
        return family_model(AutoConfig.for_model(case.split()[0], **CASES[case][2]), dtype=torch.float32)


def write(
    model: PreTrainedModel, out: Path, *, gguf: Any = "f32", check: bool | None = False, pad: bool = False, **more: Any
) -> GgufResult:
    return export_gguf(model, tiny_tokenizer(), out, GgufOptions(gguf, check=check, pad=pad), **more)


def uneven(model: PreTrainedModel) -> Plan:
    """A plan that leaves every layer other sizes."""
    groups = []
    for group in discover(model).groups:
        if group.kind in ("attention", "mlp") and group.layer is not None and group.units > 1:
            kept = group.units - (group.layer % 2 if group.units < 10 else 7 + 40 * group.layer)
            keep = tuple(range(group.units))[group.units - kept :] if group.layer % 2 else tuple(range(kept))
            groups.append(PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep))
    return Plan("tiny", CutOptions(ratio=0.3, of="units"), tuple(g for g in groups if g.kept < g.units), {}, {})


def without(model: PreTrainedModel, *groups: str) -> Plan:
    """A plan that leaves nothing of some sub-layers."""
    gone = [discover(model).group(name) for name in groups]
    planned = tuple(PlannedGroup(group.name, group.kind, group.layer, group.units, 0, ()) for group in gone)
    return Plan("tiny", CutOptions(ratio=0.3, of="units"), planned, {}, {})


def assert_agrees(written: GgufResult) -> None:
    """llama.cpp computed what torch computes."""
    checked = written.checked
    assert checked is not None
    assert checked.difference < EXACT
    assert checked.prompts == len(PROMPTS)
    assert checked.new_tokens == checked.prompts * NEW_TOKENS
    assert checked.same_tokens == checked.new_tokens or checked.ties
    assert checked.other_tokens == ()


def fields(file: Path) -> dict[str, Any]:
    """A file's metadata, but for the tokens."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items() if "tokens" not in key}


def stored(file: Path) -> dict[str, Any]:
    """A file's tensors by name."""
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def byte_level_tokenizer(splits: Any, **model: Any) -> PreTrainedTokenizerFast:
    """Byte-level pairs after the given splits."""
    pairs = Tokenizer(models.BPE(**model))
    pairs.pre_tokenizer = splits
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs.train_from_iterator([demo_texts()[0][:40_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>")
