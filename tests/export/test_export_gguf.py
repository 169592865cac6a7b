"""GGUF files: every model type that is written gives torch's logits in llama.cpp, its layers alike or not.

What runs files is skipped where llama-cpp-python is not installed; what writes and reads them is not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

import secateur.export.check
import secateur.export.gguf_file
import secateur.export.llama_cpp
import secateur.export.tensors
from families import family_model
from secateur import CutOptions, discover, export_gguf, load, load_tokenizer, prune, save
from secateur.cli.main import run
from secateur.data.calibration import demo_texts
from secateur.errors import CheckpointError, ExportError
from secateur.export.architectures import TABLE, architecture, known_types, type_of
from secateur.export.gguf_file import GgufResult as Exported
from secateur.export.mapping import map_model as take_apart
from secateur.export.options import GgufOptions
from secateur.export.padding import pad_layers as resize
from secateur.export.tensors import TYPES
from secateur.export.vocabulary import known_pre_tokenizers, vocabulary
from secateur.models.silence import quiet
from secateur.planning.plan import Plan, PlannedGroup
from tiny import names, tiny_model, tiny_tokenizer, write_tiny

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
# Name -> the architecture of the file, of one with layers of many sizes (None: only with zeros), and the config.
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
    "stablelm biases": ("stablelm", None, {**EVEN, "use_qkv_bias": True}),
    "stablelm parallel": ("stablelm", None, {**EVEN, "use_parallel_residual": True}),
    "olmo": ("olmo", None, EVEN),
    "olmo clip": ("olmo", None, {**EVEN, "clip_qkv": 0.5}),
    "olmo2": ("olmo2", None, EVEN),
    "mixtral": ("llama", None, {**WIDE, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3moe",
        None,
        {**WIDE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "gpt2": ("gpt2", None, GPT2),
    "starcoder2": ("starcoder2", None, {**EVEN, "sliding_window": None}),
    "granite": (
        "granite",
        None,
        {
            **WIDE,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
        },
    ),
    "granite biases": ("granite", None, {**EVEN, "attention_bias": True, "mlp_bias": True}),
    "phi": ("phi2", None, {**EVEN, **HALF}),
    "cohere": ("command-r", None, {**EVEN, "tie_word_embeddings": True}),
}
EXACT = 2e-3  # of the spread of logits: llama.cpp looks GELU up in a table of 16 bits, all else is nearer
# Of these, transformers reads a file back as the model that it was; of the others less than llama.cpp does.
READ_BACK = (
    "llama",
    "llama tied",
    "mistral",
    "qwen2",
    "stablelm",
    "stablelm biases",
    "stablelm parallel",
    "starcoder2",
)
NOT_UNEVEN = ("mixtral", "qwen3_moe")  # all layers have as many experts
NORM_OF_ALL_HEADS = ("olmo2",)


FAST = ("llama", "qwen2", "qwen3 tied", "phi3 half", "gemma3_text", "gpt_neox")


def some(cases: Iterable[str]) -> list[Any]:
    """A few of the cases for every run, and the others for the slow ones."""
    return [pytest.param(case, marks=() if case in FAST else (pytest.mark.slow,)) for case in cases]


@pytest.fixture
def engine() -> None:
    """Skips where llama.cpp cannot be asked."""
    pytest.importorskip("llama_cpp_py_sync", reason="runs files in llama.cpp: pip install 'secateur[gguf]'")


@functools.cache
def case_model(case: str) -> PreTrainedModel:
    with quiet():
        return family_model(AutoConfig.for_model(case.split()[0], **CASES[case][2]), dtype=torch.float32)


def write(model: PreTrainedModel, out: Path, **options: Any) -> Exported:
    rest = {name: options.pop(name) for name in ("overwrite", "progress") if name in options}
    if "dtype" in options:
        options["gguf"] = options.pop("dtype")
    return export_gguf(model, tiny_tokenizer(), out, GgufOptions(**{"gguf": "f32", "check": False, **options}), **rest)


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
    return Plan("tiny", CutOptions(ratio=0.3, shape="free", scope="global", sublayers=True), planned, {}, {})


def agree(written: Exported) -> None:
    """llama.cpp computed what torch computes."""
    checked = written.checked
    assert checked is not None
    assert checked.difference < EXACT
    assert checked.prompts == len(secateur.export.check.PROMPTS)
    assert checked.new_tokens == checked.prompts * secateur.export.check.NEW_TOKENS
    assert checked.same_tokens == checked.new_tokens or checked.ties
    assert checked.other_tokens == ()


def fields(file: Path) -> dict[str, Any]:
    """What a file says, but for the tokens."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items() if "tokens" not in key}


def test_the_table_and_the_cases_are_of_the_same_types() -> None:
    assert {case.split()[0] for case in CASES} == set(known_types())


def test_every_entry_of_the_table_is_used() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    used = {name for entry in table["types"].values() for name in entry["architectures"]}
    assert set(table["architectures"]) == used
    for name in used:
        assert name in gguf.MODEL_ARCH_NAMES.values()
        assert architecture(name).rotary in ("halves", "pairs", "none")


class TestUniform:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.usefixtures("engine")
    def test_llama_cpp_gives_torchs_logits(self, case: str, tmp_path: Path) -> None:
        written = write(case_model(case), tmp_path / "m.gguf", check=True)
        assert written.architecture == CASES[case][0]
        assert (written.added, written.plain) == (0, ())
        agree(written)

    @pytest.mark.parametrize("case", READ_BACK)
    def test_transformers_reads_the_file(self, case: str, tmp_path: Path) -> None:
        model = case_model(case)
        write(model, tmp_path / "m.gguf")
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            apart = load(str(tmp_path / "m.gguf"), device="cpu")(ids).logits - model(ids).logits
        assert apart.abs().max() < 1e-3

    @pytest.mark.parametrize("case", CASES)
    def test_every_number_is_in_the_file(self, case: str, tmp_path: Path) -> None:
        model = case_model(case)
        write(model, tmp_path / "m.gguf")
        tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
        extra = {"rope_freqs.weight"} if "llama3" in case else set()
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        in_file = sum(int(t.n_elements) for name, t in tensors.items() if name not in extra)
        assert in_file == sum(weight.numel() for weight in model.parameters())
        assert ("output.weight" in tensors) == (not tied)

    def test_a_copy_of_a_tied_matrix_where_the_file_must_have_one(self, engine: None, tmp_path: Path) -> None:
        config = AutoConfig.for_model("stablelm", **{**EVEN, "tie_word_embeddings": True})
        written = write(family_model(config, dtype=torch.float32), tmp_path / "m.gguf", check=True)
        agree(written)
        assert "output.weight" in {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}

    def test_a_window_becomes_the_context(self, tmp_path: Path) -> None:
        written = write(case_model("mistral window"), tmp_path / "m.gguf")
        assert fields(tmp_path / "m.gguf")["llama.context_length"] == 64
        assert written.notes[0].startswith("llama.cpp has no windows for llama: the file's context is the window, 64 ")

    def test_windows_are_said(self, tmp_path: Path) -> None:
        write(case_model("gemma3_text"), tmp_path / "m.gguf")
        said = fields(tmp_path / "m.gguf")
        assert said["gemma3.attention.sliding_window"] == 8
        assert said["gemma3.attention.sliding_window_pattern"] == [True, False, True]
        assert (said["gemma3.rope.freq_base"], said["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
        assert said["gemma3.context_length"] == 256


class TestSizes:
    """Layers of different sizes."""

    @pytest.mark.parametrize("case", some(case for case, (_, free, _) in CASES.items() if free))
    @pytest.mark.usefixtures("engine")
    def test_an_architecture_that_knows_them(self, case: str, tmp_path: Path) -> None:
        model = case_model(case)
        plan = uneven(model)
        save(prune(model, plan), tmp_path / "cut", plan=plan, tokenizer=tiny_tokenizer())
        cut = load(str(tmp_path / "cut"), device="cpu")
        written = write(cut, tmp_path / "m.gguf", check=True)
        assert written.architecture == CASES[case][1]
        factors = 12 if "llama3" in case else 0
        assert written.parameters == sum(weight.numel() for weight in cut.parameters()) + written.added + factors
        assert written.added < 0.1 * written.parameters
        agree(written)

    @pytest.mark.parametrize(
        "case",
        some(c for c, (_, free, _) in CASES.items() if not free and c not in NOT_UNEVEN + NORM_OF_ALL_HEADS),
    )
    @pytest.mark.usefixtures("engine")
    def test_zeros_fill_them_up_when_asked(self, case: str, tmp_path: Path) -> None:
        model = case_model(case)
        cut = prune(model, uneven(model))
        with pytest.raises(ExportError, match=r"no architecture of llama\.cpp holds this model.*--pad \(pad=True\)"):
            write(cut, tmp_path / "m.gguf")
        assert names(tmp_path) == []
        written = write(cut, tmp_path / "m.gguf", pad=True, check=True)
        assert written.architecture == CASES[case][0]
        assert written.parameters == sum(weight.numel() for weight in cut.parameters()) + written.added
        assert f"{written.added:,} zeros pad layers" in written.notes[-1]
        agree(written)

    @pytest.mark.parametrize("case", NOT_UNEVEN)
    def test_experts_of_different_sizes(self, case: str, tmp_path: Path) -> None:
        model = case_model(case)
        cut = prune(model, uneven(model))
        with pytest.raises(ExportError) as refused:
            write(cut, tmp_path / "m.gguf")
        assert "--pad" not in str(refused.value)
        with pytest.raises(ExportError, match="every layer the same number of experts"):
            write(cut, tmp_path / "m.gguf", pad=True)

    def test_a_norm_of_all_heads(self, tmp_path: Path) -> None:
        model = case_model("olmo2")
        with pytest.raises(ExportError, match="layer 1: attn_q_norm normalises all heads together"):
            write(prune(model, uneven(model)), tmp_path / "m.gguf", pad=True)

    def test_sizes_are_said_for_each_layer(self, tmp_path: Path) -> None:
        model = case_model("llama")
        write(prune(model, uneven(model)), tmp_path / "m.gguf")
        said = fields(tmp_path / "m.gguf")
        assert said["deci.feed_forward_length"] == [160, 128, 96]  # of 153, 113 and 73
        assert said["deci.attention.head_count"] == [6, 4, 6]
        assert said["deci.attention.head_count_kv"] == [3, 2, 3]
        assert {said[f"deci.{key}"] for key in ("attention.key_length", "attention.value_length")} == {24}
        assert said["deci.rope.dimension_count"] == 24

    @pytest.mark.parametrize(
        "groups",
        [
            ("layers.1.attention",),
            ("layers.1.mlp",),
            ("layers.2.attention", "layers.2.mlp"),
            ("layers.0.mlp", "layers.1.attention"),
        ],
        ids=" ".join,
    )
    @pytest.mark.parametrize("case", some(["llama", "llama biases", "qwen2", "phi3", "qwen3 tied"]))
    @pytest.mark.usefixtures("engine")
    def test_sublayers_that_are_skipped(self, case: str, groups: tuple[str, ...], tmp_path: Path) -> None:
        model = case_model(case)
        plan = without(model, *groups)
        save(prune(model, plan), tmp_path / "cut", plan=plan, tokenizer=tiny_tokenizer())
        written = write(load(str(tmp_path / "cut"), device="cpu"), tmp_path / "m.gguf", check=True)
        assert written.architecture == CASES[case][1]
        agree(written)

    @pytest.mark.parametrize("case", some(["qwen3", "gemma2", "gpt_neox", "starcoder2", "olmo2"]))
    @pytest.mark.usefixtures("engine")
    def test_zeros_for_sublayers_that_are_skipped(self, case: str, tmp_path: Path) -> None:
        model = case_model(case)
        cut = prune(model, without(model, "layers.0.mlp", "layers.1.attention"))
        agree(write(cut, tmp_path / "m.gguf", pad=True, check=True))

    def test_layers_without_attention_take_no_room(self, tmp_path: Path) -> None:
        model = case_model("llama")
        write(prune(model, without(model, "layers.1.attention")), tmp_path / "m.gguf")
        assert not [t.name for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name.startswith("blk.1.attn")]
        assert fields(tmp_path / "m.gguf")["deci.attention.head_count"] == [6, 0, 6]

    def test_values_narrower_than_keys(self, tmp_path: Path) -> None:
        model = tiny_model()
        attention: Any = model.get_submodule("model.layers.1.self_attn")
        attention.v_proj.weight = nn.Parameter(attention.v_proj.weight[:36])
        with pytest.raises(
            ExportError, match=r"layer 1: attn_v has 36 rows for 3 heads of 16; .* without the axis head_dim"
        ):
            write(model, tmp_path / "m.gguf")


class TestTypes:
    @pytest.mark.parametrize("case", ["qwen3", "gpt2", "gemma3_text", "phi3"])
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.usefixtures("engine")
    def test_llama_cpp_computes_with_them(self, dtype: str, case: str, tmp_path: Path) -> None:
        config = AutoConfig.for_model(case, **CASES[case][2])
        with quiet():
            model = family_model(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5 if weight.dim() > 1 else 1.0)  # or rounding decides everything
        written = write(model, tmp_path / "m.gguf", dtype=dtype, check=True)
        assert written.checked is not None
        assert written.checked.difference < 0.01 + 3 * written.checked.rounding
        assert (written.checked.rounding == 0) == (dtype == "f32")
        kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
        assert {kind for name, kind in kinds.items() if "norm" in name or name.endswith(".bias")} == {"f32"}
        assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up.weight"] == dtype

    def test_rows_that_do_not_divide_into_blocks(self, tmp_path: Path) -> None:
        written = write(case_model("llama"), tmp_path / "m.gguf", dtype="q8_0")
        assert written.plain == tuple(f"blk.{layer}.attn_output.weight" for layer in range(3))  # rows of 6 heads of 24
        assert written.notes[-1].startswith(
            "3 matrices stay in f16, since their rows are no multiples of 32: blk.0.attn_"
        )
        kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
        assert (kinds["blk.0.attn_output.weight"], kinds["blk.0.attn_q.weight"]) == ("F16", "Q8_0")

    @pytest.mark.usefixtures("engine")
    def test_mlps_are_filled_up_to_whole_blocks(self, tmp_path: Path) -> None:
        config = AutoConfig.for_model("llama", **{**WIDE, "intermediate_size": 149})
        model = family_model(config, dtype=torch.float32)
        written = write(model, tmp_path / "m.gguf", dtype="q8_0", check=True)
        assert fields(tmp_path / "m.gguf")["llama.feed_forward_length"] == 160
        assert written.added == 3 * 3 * 96 * 11
        assert "blk.0.ffn_down.weight" not in written.plain

    def test_no_row_divides_into_blocks(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"q8_0 stores rows in blocks of 32 numbers, and the hidden width is 50,"):
            write(
                tiny_model(hidden_size=50, num_attention_heads=5, num_key_value_heads=5),
                tmp_path / "m.gguf",
                dtype="q8_0",
            )

    def test_numbers_that_16_bits_do_not_hold(self, tmp_path: Path) -> None:
        model = tiny_model(dtype=torch.bfloat16)
        with torch.no_grad():
            model.get_parameter("model.layers.2.mlp.up_proj.weight")[0, 0] = 1e5
        with pytest.raises(
            ExportError, match=r"blk\.2\.ffn_up\.weight holds 9\.98e\+04, more than f16 can; write --gguf bf16"
        ):
            write(model, tmp_path / "m.gguf", dtype="f16")
        assert names(tmp_path) == []
        write(model, tmp_path / "m.gguf", dtype="bf16")
        tensor = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.2.ffn_up.weight")
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kept = model.get_parameter("model.layers.2.mlp.up_proj.weight").detach()
        assert np.array_equal(wide[: len(kept)], kept.float().numpy())
        assert not wide[len(kept) :].any()  # the channels that fill up the last block

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, bad: float, tmp_path: Path) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[3] = bad
        with pytest.raises(ExportError, match=r"output_norm\.weight holds NaN or Inf"):
            write(model, tmp_path / "m.gguf")
        assert names(tmp_path) == []

    def test_one_tensor_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No weight is read before the file is open, and none twice."""
        read: list[str] = []
        plain = secateur.export.tensors.encode

        def note(name: str, values: torch.Tensor, kind: str) -> Any:
            assert names(tmp_path) == [f".m.gguf.{os.getpid()}.partial"]
            read.append(name)
            return plain(name, values, kind)

        monkeypatch.setattr(secateur.export.gguf_file, "encode", note)
        done: list[tuple[int, int]] = []
        write(tiny_model(), tmp_path / "m.gguf", progress=lambda *step: done.append(step))
        assert len(read) == len(set(read)) == 3 * 9 + 3
        assert done == [(n, 30) for n in range(1, 31)]


class TestRefused:
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
    def test_a_setting(self, family: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
        base = GPT2 if family == "gpt2" else WIDE
        with quiet():
            config = AutoConfig.for_model(family, **{**base, **changes})
            model = family_model(config, dtype=torch.float32)
        with pytest.raises(ExportError, match=match):
            write(model, tmp_path / "m.gguf")
        assert names(tmp_path) == []

    def test_settings_that_change_nothing(self) -> None:
        config = AutoConfig.for_model("llama", **WIDE, attention_dropout=0.5, initializer_range=1.0, own_note="hello")
        assert type_of(config).name == "llama"

    def test_code_of_its_own(self) -> None:
        class LlamaConfig(type(AutoConfig.for_model("llama"))):  # type: ignore[misc]
            pass

        with pytest.raises(ExportError, match="the model's code is its own, LlamaConfig"):
            type_of(LlamaConfig())

    def test_a_quantised_model(self) -> None:
        config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(ExportError, match="the model is quantized already"):
            type_of(config)

    def test_a_type(self, tmp_path: Path) -> None:
        with pytest.raises(
            ExportError, match=r"--gguf q4_k_m: no such type. Expected f32, .* or q4_0; .*llama-quantize"
        ):
            write(tiny_model(), tmp_path / "m.gguf", dtype="q4_k_m")

    def test_a_weight_without_a_name(self, tmp_path: Path) -> None:
        model = tiny_model()
        model.get_submodule("model.layers.0").register_parameter("gift", nn.Parameter(torch.zeros(2)))
        with pytest.raises(
            ExportError, match=r"GGUF has no name for the weight model\.layers\.0\.gift of a model of type"
        ):
            write(model, tmp_path / "m.gguf")

    def test_heads_of_two_sizes(self, tmp_path: Path) -> None:
        model = tiny_model()
        model.get_submodule("model.layers.0.self_attn").head_dim = 8  # type: ignore[assignment]
        with pytest.raises(ExportError, match=r"the heads of all layers one size, and this model has \[8, 16\]"):
            write(model, tmp_path / "m.gguf")

    def test_query_heads_that_do_not_divide(self, tmp_path: Path) -> None:
        model = tiny_model()
        attention: Any = model.get_submodule("model.layers.2.self_attn")
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :80])
        with pytest.raises(
            ExportError, match="layer 2: query width 80 and key width 48 do not divide into heads of 16"
        ):
            write(model, tmp_path / "m.gguf")

    def test_layers_of_another_kind(self, tmp_path: Path) -> None:
        config = AutoConfig.for_model("qwen2", **EVEN)
        model = family_model(config, dtype=torch.float32)
        model.config.sliding_window, model.config.layer_types = 8, ["full_attention", "chunked_attention"] * 2
        with pytest.raises(ExportError, match="no key for layers of the kind chunked_attention"):
            write(model, tmp_path / "m.gguf")

    def test_heads_rotated_by_two_tables(self, tmp_path: Path) -> None:
        model = tiny_model()
        model.get_submodule("model.layers.0").register_buffer("inv_freq", torch.ones(3))
        with pytest.raises(ExportError, match=r"all rotated alike, and the model's differ: \[6, 16\] numbers"):
            write(model, tmp_path / "m.gguf")

    def test_heads_that_never_fill_the_hidden_width(self) -> None:
        parts = take_apart(case_model("starcoder2"), type_of(case_model("starcoder2").config))
        narrow = dataclasses.replace(parts, head_dim=25)
        with pytest.raises(ExportError, match=r"of size 25, cannot be padded to the hidden width of 96; .*--axes mlp"):
            resize(narrow, architecture("starcoder2"))


class TestFile:
    def test_it_exists(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_text("before")
        with pytest.raises(CheckpointError, match=r"m\.gguf exists; name another file, or replace it with --overwrite"):
            write(tiny_model(), tmp_path / "m.gguf")
        assert (tmp_path / "m.gguf").read_text() == "before"
        write(tiny_model(), tmp_path / "m.gguf", overwrite=True)
        assert GGUFReader(tmp_path / "m.gguf").tensors

    def test_it_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").mkdir()
        with pytest.raises(CheckpointError, match="is a folder, and a file is to be written"):
            write(tiny_model(), tmp_path / "m.gguf", overwrite=True)

    def test_it_lies_nowhere(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist; make it first: mkdir -p"):
            write(tiny_model(), tmp_path / "no" / "m.gguf")

    def test_it_is_named_otherwise(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"m\.bin does not end in \.gguf; name it .*m\.bin\.gguf"):
            write(tiny_model(), tmp_path / "m.bin")

    def test_it_cannot_be_written(self) -> None:
        with pytest.raises(CheckpointError, match=r"/proc/m\.gguf cannot be written: "):
            write(tiny_model(), Path("/proc/m.gguf"))

    def test_a_failure_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "m.gguf").write_text("before")
        monkeypatch.setattr(secateur.export.gguf_file, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tiny_model(), tmp_path / "m.gguf", overwrite=True)
        assert names(tmp_path) == ["m.gguf"]
        assert (tmp_path / "m.gguf").read_text() == "before"

    def test_what_a_killed_process_left_goes(self, tmp_path: Path) -> None:
        gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        (tmp_path / f".m.gguf.{int(gone.stdout)}.partial").write_text("half")
        write(tiny_model(), tmp_path / "m.gguf")
        assert names(tmp_path) == ["m.gguf"]

    def test_the_same_model_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            write(tiny_model(), tmp_path / folder / "m.gguf")
        assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()

    @pytest.mark.slow
    def test_a_kill_at_any_moment(self, tmp_path: Path) -> None:
        """OUT is either not there or whole."""
        write_tiny(tmp_path / "tiny", num_hidden_layers=12)
        code = (
            "import sys; from secateur import load, load_tokenizer, export_gguf\n"
            "model, tokenizer = load('tiny', device='cpu'), load_tokenizer('tiny')\n"
            "print('go', flush=True)\n"
            "while True: export_gguf(model, tokenizer, 'm.gguf', check=False, overwrite=True)\n"
        )
        sizes = set()
        for moment in (0.01, 0.07, 0.13, 0.31, 0.52, 0.9):
            with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(moment)
                os.kill(process.pid, signal.SIGKILL)
            if (tmp_path / "m.gguf").exists():
                sizes.add((tmp_path / "m.gguf").stat().st_size)
                assert len(GGUFReader(tmp_path / "m.gguf").tensors) == 12 * 9 + 3
        assert len(sizes) == 1
        write(tiny_model(), tmp_path / "m.gguf", overwrite=True)
        assert not [name for name in names(tmp_path) if "partial" in name]


class TestCheck:
    """A file that computes something else is refused."""

    @pytest.mark.usefixtures("engine")
    def test_heads_that_are_rotated_wrongly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.export.tensors, "_paired", lambda recipe, heads: recipe)
        with pytest.raises(ExportError, match=r"llama\.cpp computes something else from the file than torch does"):
            write(case_model("llama"), tmp_path / "m.gguf", check=True)
        assert names(tmp_path) == []

    @pytest.mark.usefixtures("engine")
    def test_norms_without_their_offset(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.export.tensors, "_with_offset", lambda name, recipe, model_type: recipe)
        with pytest.raises(ExportError, match=r"llama\.cpp computes something else"):
            write(case_model("gemma3_text"), tmp_path / "m.gguf", dtype="q8_0", check=True)
        assert names(tmp_path) == []

    @pytest.mark.usefixtures("engine")
    def test_a_file_that_does_not_load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = secateur.export.tensors.file_tensors

        def forget(*arguments: Any) -> dict[str, Any]:
            found = plain(*arguments)
            del found["blk.1.ffn_up.weight"]
            return found

        monkeypatch.setattr(secateur.export.gguf_file, "file_tensors", forget)
        with pytest.raises(ExportError, match=r"llama\.cpp does not load the file"):
            write(case_model("llama"), tmp_path / "m.gguf", check=True)
        assert names(tmp_path) == []

    @pytest.mark.usefixtures("engine")
    def test_words_that_are_split_otherwise(self, tmp_path: Path) -> None:
        tokenizer = level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        with pytest.raises(ExportError, match=r"llama\.cpp splits '.*' into other tokens .*--pre NAME"):
            export_gguf(
                tiny_model(vocab_size=400), tokenizer, tmp_path / "m.gguf", GgufOptions(pre="smollm", check=True)
            )
        assert names(tmp_path) == []

    @pytest.mark.usefixtures("engine")
    def test_the_model_is_left_as_it_was(self, tmp_path: Path) -> None:
        model = tiny_model(dtype=torch.bfloat16)
        before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
        written = write(model, tmp_path / "m.gguf", dtype="bf16", check=True)
        assert written.checked is not None
        assert written.checked.rounding == 0  # bfloat16 holds what it held
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_nobody_to_ask(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ExportError, match=r"which is not installed: pip install 'secateur\[gguf\]'"):
            write(tiny_model(), tmp_path / "m.gguf", check=True)
        assert write(tiny_model(), tmp_path / "m.gguf", check=None).checked is None


def level_tokenizer(splits: Any, **model: Any) -> PreTrainedTokenizerFast:
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


def piece_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Sentencepiece's pairs, with bytes for what has no token, and a token before every text."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    words.train_from_iterator([demo_texts()[0][:40_000]], trainer)
    spec = json.loads(words.to_str())
    whole = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        whole.normalizer = normalizers.Sequence(steps)
    elif kind == "plain":
        whole.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    told = json.loads(whole.to_str())
    told["model"] |= {"vocab": spec["model"]["vocab"], "merges": spec["model"]["merges"]}
    found = Tokenizer.from_str(json.dumps(told))
    found.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def split_by(expression: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WORDS: Mapping[str, Any] = {
    "gpt-2": lambda: level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: level_tokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "llama-bpe": lambda: level_tokenizer(split_by(LLAMA3_WORDS), ignore_merges=True),
    "smaug-bpe": lambda: level_tokenizer(split_by(LLAMA3_WORDS)),
    "qwen2": lambda: level_tokenizer(split_by(QWEN2_WORDS)),
}


class TestVocabulary:
    @pytest.mark.parametrize("name", WORDS)
    @pytest.mark.usefixtures("engine")
    def test_words_are_split_alike(self, name: str, tmp_path: Path) -> None:
        tokenizer = WORDS[name]()
        written = export_gguf(
            tiny_model(vocab_size=410), tokenizer, tmp_path / "m.gguf", GgufOptions("f32", check=True)
        )
        assert written.pre == name
        agree(written)
        assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name

    @pytest.mark.parametrize(("kind", "prefix"), [("prepend", True), ("plain", False), ("first", True)])
    @pytest.mark.usefixtures("engine")
    def test_pieces(self, kind: str, prefix: bool, tmp_path: Path) -> None:
        model = tiny_model(vocab_size=640)
        written = export_gguf(model, piece_tokenizer(kind), tmp_path / "m.gguf", GgufOptions("f32", check=True))
        assert written.checked is not None
        # A text that begins with a space gets no second one from the scheme "first", and from llama.cpp it does.
        assert all(text.startswith(" ") for text in written.checked.other_tokens)
        assert bool(written.checked.other_tokens) == (kind == "first")
        said = fields(tmp_path / "m.gguf")
        assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_space_prefix"]) == (True, prefix)
        assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
        kinds = said["tokenizer.ggml.token_type"]
        assert (kinds[:4], kinds[-1]) == ([2, 3, 3, 6], 5)

    def test_names_that_are_found(self) -> None:
        assert set(WORDS) <= set(known_pre_tokenizers())
        for name, make in WORDS.items():
            assert vocabulary(make(), 400).pre == name

    def test_tokens_and_their_kinds(self) -> None:
        tokenizer = level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
        tokenizer.add_tokens(["<own>"])
        tokenizer.chat_template = "{{ messages }}"
        found = vocabulary(tokenizer, 405, stops=(0, 7))
        assert (found.tokens[0], found.tokens[400], found.tokens[404]) == ("<end>", "<own>", "[unused404]")
        assert (found.types[0], found.types[1], found.types[400], found.types[404]) == (3, 1, 4, 5)
        assert found.special == {"eos": 0, "eot": 7}
        assert (found.add_bos, found.add_eos, found.chat_template) == (False, False, "{{ messages }}")
        assert found.notes == ()

    def test_what_is_not_carried_is_noted(self) -> None:
        tokenizer = level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens([AddedToken("<own>", rstrip=True)])
        notes = vocabulary(tokenizer, 410).notes
        assert notes == ("the NFC form of text is not taken", "space beside <own> is kept as it is")

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (
                lambda: level_tokenizer(split_by("own")),
                r"in a way that we do not know: it splits by 'own'\. Say which of llama\.cpp's it is with --pre NAME",
            ),
            (
                lambda: level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
                "it splits by 'a space put before the text'",
            ),
            (
                lambda: level_tokenizer(pre_tokenizers.Whitespace()),
                "neither of byte-level pairs nor of sentencepiece's",
            ),
            (
                lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
                "a tokenizer of the kind WordLevel cannot be written",
            ),
            (
                lambda: PreTrainedTokenizerFast(
                    tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>"))
                ),
                "whose tokens carry a prefix or suffix within words",
            ),
        ],
    )
    def test_refused(self, make: Any, match: str) -> None:
        with pytest.raises(ExportError, match=match):
            vocabulary(make(), 400)

    def test_a_name_that_is_said(self) -> None:
        assert vocabulary(level_tokenizer(split_by("own")), 400, pre="qwen2").pre == "qwen2"

    def test_text_that_is_changed_first(self) -> None:
        tokenizer = tiny_tokenizer()
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["normalizer"] = {"type": "Lowercase"}
        lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
        with pytest.raises(ExportError, match=r"it normalises text \(Lowercase\), splits by 'bytes'"):
            vocabulary(lower, 300)

    def test_other_tokens_around_a_text(self) -> None:
        tokenizer = piece_tokenizer("plain")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> <s> $A", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        with pytest.raises(ExportError, match=r"makes \[2, 1, \d+\] of 'a': other tokens around a text"):
            vocabulary(tokenizer, 600)

    def test_a_tokenizer_of_another_model(self) -> None:
        with pytest.raises(
            ExportError, match="tokens up to 299, and the model's embedding 200 rows; they do not belong"
        ):
            vocabulary(tiny_tokenizer(), 200)

    def test_a_slow_tokenizer(self) -> None:
        class Slow:
            pass

        with pytest.raises(ExportError, match=r"the tokenizer Slow has no tokenizer\.json"):
            vocabulary(Slow(), 10)  # type: ignore[arg-type]


class TestCommand:
    def test_what_it_prints_and_writes(self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, told = tmp_path / "m.gguf", tmp_path / "m.json"
        assert run(["export", str(tiny), str(out), "--no-check", "--json", str(told)]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert "f16, " in shown.out
        assert "not compared with torch: pip install 'secateur[gguf]'" in shown.out
        data = json.loads(told.read_text())
        assert data.keys() == {field.name for field in dataclasses.fields(Exported)}
        assert (data["out"], data["architecture"], data["dtype"], data["checked"]) == (str(out), "llama", "f16", None)
        assert data["bytes"] == out.stat().st_size

    @pytest.mark.usefixtures("engine")
    def test_the_comparison(self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["export", str(tiny), str(tmp_path / "m.gguf"), "--gguf", "f32", "--json", str(tmp_path / "m.json")]
        assert run(command) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert "texts tokenized alike    │ 15 of 15" in shown.out
        checked = json.loads((tmp_path / "m.json").read_text())["checked"]
        assert checked["difference"] < 1e-4
        assert run([*command, "--overwrite", "--quiet"]) == 0
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (
                ("out.bin",),
                r"out\.bin: no format to write\. Expected --gguf TYPE or --int8, or a file named out\.bin\.gguf",
            ),
            (("out.bin", "--gguf", "f16"), r"out\.bin does not end in \.gguf"),
            (("out.gguf", "--gguf", "f17"), "--gguf f17: no such type"),
            (("no/out.gguf",), "does not exist; make it first: mkdir -p"),
        ],
    )
    def test_refused_before_weights_are_read(
        self,
        arguments: tuple[str, ...],
        match: str,
        tiny: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("secateur.export.source.load", lambda *_, **__: pytest.fail("weights were read"))
        assert run(["export", str(tiny), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("secateur: error: ")
        assert error.count("\n") == 1
        assert re.search(match, error)
        assert names(tmp_path) == []

    def test_a_model_without_a_tokenizer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with quiet():
            tiny_model().save_pretrained(tmp_path / "bare")
        assert run(["export", str(tmp_path / "bare"), str(tmp_path / "m.gguf"), "--no-check"]) == 2
        assert "no tokenizer can be loaded" in capsys.readouterr().err
        assert not (tmp_path / "m.gguf").exists()


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_demo_cut_to_layers_of_many_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pruned, written and continued: llama.cpp's tokens are those of torch's own `generate`, from five prompts.

    torch computes in float32 with the matrices rounded to float16, as the file holds them.
    """
    pytest.importorskip("llama_cpp_py_sync", reason="runs files in llama.cpp: pip install 'secateur[gguf]'")
    cut = str(tmp_path / "cut")
    assert run(["prune", "demo", cut, "--preset", "fast", "--shape", "free", "--quiet"]) == 0
    for dtype in ("f16", "q8_0"):
        out, told = str(tmp_path / f"{dtype}.gguf"), str(tmp_path / f"{dtype}.json")
        assert run(["export", cut, out, "--gguf", dtype, "--check", "--json", told, "--quiet"]) == 0
        data = json.loads(Path(told).read_text())
        assert data["architecture"] == "deci"
        assert data["checked"]["other_tokens"] == []
        assert data["checked"]["difference"] < (0.005 if dtype == "f16" else 0.1)
    assert Path(tmp_path / "q8_0.gguf").stat().st_size < 0.56 * Path(tmp_path / "f16.gguf").stat().st_size
    model, tokenizer = load(cut, device="cpu"), load_tokenizer(cut)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.half().float())
    engine = secateur.export.llama_cpp.Engine(tmp_path / "f16.gguf", context=64)
    try:
        for prompt in secateur.export.check.PROMPTS:
            ids = tokenizer(prompt).input_ids
            assert engine.tokens(prompt) == ids
            plain: Any = model
            torchs = plain.generate(
                torch.tensor([ids]), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
            assert engine.greedy(ids, 16)[0] == torchs
    finally:
        engine.close()
    assert capsys.readouterr().err == ""
