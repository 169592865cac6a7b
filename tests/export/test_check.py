"""llama.cpp beside torch: files of every model type give torch's logits, and a file that does not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_cases import (
    CASES,
    assert_agrees,
    byte_level_tokenizer,
    case_model,
    fields,
    needs_llama_cpp,
    stored,
    uneven,
    without,
    write,
)
from tokenizers import pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import secateur.export.gguf_file
import secateur.export.tensors
from families import family_model
from secateur import export_gguf, load, prune, save
from secateur.errors import ExportError
from secateur.export.check import PROMPTS
from secateur.export.llama_cpp import Engine
from secateur.export.options import GGUF_TYPES, GgufOptions
from secateur.models.silence import quiet
from tiny import names, tiny_model, tiny_tokenizer

pytestmark = needs_llama_cpp

# transformers reads files of these back as the model that was written; of the others it reads less than llama.cpp.
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
FAST = ("llama", "qwen2", "qwen3 tied", "phi3 half", "gemma3_text", "gpt_neox")
ALIKE = ("mixtral", "qwen3_moe", "olmo2", "stablelm tied")  # the first three cannot differ: `test_fitting`
SKIPPED = ("layers.0.mlp", "layers.1.attention", "layers.2.attention", "layers.2.mlp")
SKIPPING = (
    "llama",
    "llama biases",
    "qwen2",
    "phi3",
    "qwen3 tied",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "starcoder2",
    "olmo2",
)


def fast_ones(cases: Any) -> list[Any]:
    return [pytest.param(case, marks=() if case in FAST else (pytest.mark.slow,)) for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_every_model_type_gives_torchs_logits(case: str, tmp_path: Path) -> None:
    model, file = case_model(case), tmp_path / "m.gguf"
    written = write(model, file, check=True)
    assert_agrees(written)
    assert (written.architecture, written.added, written.plain) == (CASES[case][0], 0, ())
    tensors = stored(file)
    extra = {"rope_freqs.weight"} if "llama3" in case else {"output.weight"} if case == "stablelm tied" else set()
    in_file = sum(int(tensor.n_elements) for name, tensor in tensors.items() if name not in extra)
    assert in_file == sum(weight.numel() for weight in model.parameters())  # each number is in the file, once
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert ("output.weight" in tensors) == (not tied or case == "stablelm tied")
    if case in READ_BACK:
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert (load(str(file), device="cpu")(ids).logits - model(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize("case", fast_ones(case for case in CASES if case not in ALIKE))
def test_layers_of_different_sizes_give_torchs_logits(case: str, tmp_path: Path) -> None:
    per_layer = CASES[case][1]
    cut = prune(case_model(case), uneven(case_model(case)))
    if per_layer is None:
        with pytest.raises(ExportError, match=r"no architecture of llama\.cpp holds this model.*--pad \(pad=True\)"):
            write(cut, tmp_path / "m.gguf")
        assert names(tmp_path) == []
    written = write(cut, tmp_path / "m.gguf", pad=per_layer is None, check=True)
    assert_agrees(written)
    assert written.architecture == (per_layer or CASES[case][0])
    factors = 12 if "llama3" in case else 0
    assert written.parameters == sum(weight.numel() for weight in cut.parameters()) + written.added + factors
    if per_layer is None:
        assert f"{written.added:,} zeros pad layers" in written.notes[-1]
    else:
        assert written.added < 0.1 * written.parameters


@pytest.mark.parametrize("case", fast_ones(SKIPPING))
def test_skipped_sublayers_give_torchs_logits(case: str, tmp_path: Path) -> None:
    cut = prune(case_model(case), without(case_model(case), *SKIPPED))
    assert_agrees(write(cut, tmp_path / "m.gguf", pad=CASES[case][1] is None, check=True))
    if case == "llama":  # layers without attention take no room
        assert not [name for name in stored(tmp_path / "m.gguf") if name.startswith("blk.1.attn")]
        assert fields(tmp_path / "m.gguf")["deci.attention.head_count"] == [6, 0, 0]


def test_a_per_layer_folder_gives_torchs_logits(tmp_path: Path) -> None:
    model = case_model("llama")
    plan = uneven(model)
    save(prune(model, plan), tmp_path / "cut", plan=plan, tokenizer=tiny_tokenizer())
    assert_agrees(write(load(str(tmp_path / "cut"), device="cpu"), tmp_path / "m.gguf", check=True))
    sizes = fields(tmp_path / "m.gguf")
    assert sizes["deci.feed_forward_length"] == [160, 128, 96]  # of 153, 113 and 73
    assert sizes["deci.attention.head_count"] == [6, 4, 6]
    assert sizes["deci.attention.head_count_kv"] == [3, 2, 3]
    assert {sizes[f"deci.{key}"] for key in ("attention.key_length", "attention.value_length")} == {24}
    assert sizes["deci.rope.dimension_count"] == 24


@pytest.mark.parametrize(
    ("case", "gguf"),
    [*(("qwen3", gguf) for gguf in GGUF_TYPES), ("gpt2", "q4_0"), ("gemma3_text", "q4_1"), ("phi3", "q5_0")],
)
def test_every_type_differs_by_rounding_alone(case: str, gguf: Any, tmp_path: Path) -> None:
    with quiet():
        model = family_model(AutoConfig.for_model(case, **CASES[case][2]), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5 if weight.dim() > 1 else 1.0)  # or rounding decides everything
    checked = write(model, tmp_path / "m.gguf", gguf=gguf, check=True).checked
    assert checked is not None
    assert checked.difference < 0.01 + 3 * checked.rounding
    assert (checked.rounding == 0) == (gguf == "f32")
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in stored(tmp_path / "m.gguf").items()}
    assert {kind for name, kind in kinds.items() if "norm" in name or name.endswith(".bias")} == {"f32"}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up.weight"] == gguf


class TestRefused:
    """A file that computes something else does not get its name."""

    def refused(
        self, match: str, place: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        with pytest.raises(ExportError, match=match):
            export_gguf(model, tokenizer, place / "m.gguf", GgufOptions(**{"gguf": "f32", "check": True, **options}))
        assert names(place) == []

    def test_heads_that_are_rotated_wrongly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.export.tensors, "_paired", lambda tensor, heads: tensor)
        match = r"llama\.cpp computes something else from the file than torch does"
        self.refused(match, tmp_path, case_model("llama"), tiny_tokenizer())

    def test_norms_without_their_offset(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.export.tensors, "_with_offset", lambda name, tensor, model_type: tensor)
        match = r"llama\.cpp computes something else"
        self.refused(match, tmp_path, case_model("gemma3_text"), tiny_tokenizer(), gguf="q8_0")

    def test_a_file_that_lacks_a_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = secateur.export.tensors.file_tensors

        def forget(*arguments: Any) -> dict[str, Any]:
            return {name: tensor for name, tensor in whole(*arguments).items() if name != "blk.1.ffn_up.weight"}

        monkeypatch.setattr(secateur.export.gguf_file, "file_tensors", forget)
        self.refused(r"llama\.cpp does not load the file", tmp_path, case_model("llama"), tiny_tokenizer())

    def test_another_pre_tokenizer(self, tmp_path: Path) -> None:
        tokenizer = byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        match = r"llama\.cpp splits '.*' into other tokens .*--pre NAME"
        self.refused(match, tmp_path, tiny_model(vocab_size=400), tokenizer, pre="smollm")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    written = write(model, tmp_path / "m.gguf", gguf="bf16", check=True)
    assert written.checked is not None
    assert written.checked.rounding == 0  # bfloat16 holds what it held
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_demo_cut_unevenly_is_continued_as_torch_continues_it(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Torch generates in float32 with the matrices rounded to float16, as the file holds them."""
    cut = prune(demo_model, uneven(demo_model))
    written = export_gguf(cut, demo_tokenizer, tmp_path / "m.gguf", GgufOptions("f16", check=True))
    assert written.checked is not None
    assert (written.architecture, written.checked.other_tokens) == ("deci", ())
    assert written.checked.difference < 0.005
    generating: Any = cut
    with torch.no_grad():
        for weight in cut.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.half().float())
    engine = Engine(tmp_path / "m.gguf", context=64)
    try:
        for prompt in PROMPTS:
            ids = demo_tokenizer(prompt).input_ids
            assert engine.tokens(prompt) == ids
            settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
            expected = generating.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
            assert engine.greedy(ids, 16)[0] == expected
    finally:
        engine.close()
