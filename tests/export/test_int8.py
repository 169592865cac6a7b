"""Int8: transformers without us reads the folders and computes what was in memory; what cannot be packed is told."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from every_type import tiny_type_model
from families import FAMILIES, family_config, family_model
from secateur import CutOptions, discover, evaluate, plan, profile, prune, save, score
from secateur.checkpoint.record import make_record
from secateur.data.text import demo_texts
from secateur.errors import CheckpointError, ModelError
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.export.int8 import export_int8, int8_copy
from secateur.export.linear_layers import PackedResult
from secateur.export.options import Int8Options
from secateur.files import PLAN_FILE, RECORD_FILE
from secateur.models.loading import load
from secateur.models.modeling_per_layer import PER_LAYER
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.models.weight_files import weight_file_bytes
from secateur.pipeline.run import plan_model, prune_model
from secateur.planning.plan import Plan
from stranger import NEW_TOKENS, stranger
from tiny import names, tiny_model, tiny_tokenizer, write_tiny

if importlib.util.find_spec("torchao") is None:  # a package of its own that is missing is a failure
    pytest.skip("the extra int8 is not installed", allow_module_level=True)

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
CLOSE = {"weight-only": 0.09, "dynamic": 0.12}  # of the logits' norm; all weights of these models are large and random


def dense_family(family: str, **changes: Any) -> PreTrainedModel:
    return family_model(family_config(family, **changes), dtype=torch.float32)


def bfloat16_model() -> PreTrainedModel:
    """In bfloat16 from the start: buffers that the code computes are not cast, as in a model that is loaded."""
    config = family_config("llama")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(family_model(config, dtype=torch.bfloat16).state_dict())
    return model


def uneven_cut(family: str) -> tuple[PreTrainedModel, Plan]:
    """Heads and channels of some layers cut in memory, so that layers differ."""
    dense = dense_family(family)
    options = CutOptions(ratio=0.3, of="units", axes=("attention", "mlp"), layers=(1, 3), score="l2")
    decided = plan(discover(dense), options, scores=score(dense, name="l2"))
    return prune(dense, decided), decided


def per_layer(family: str, folder: Path) -> PreTrainedModel:
    """A model loaded from a per-layer folder."""
    cut, decided = uneven_cut(family)
    return load(str(save(cut, folder, plan=decided)), device="cpu")


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def greedy(model: PreTrainedModel) -> Tensor:
    """The most likely tokens after the first row, without a cache."""
    ids, end = IDS[:1], model.generation_config.eos_token_id
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1].clone()
        logits[:, [] if end is None else end] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, IDS.shape[1] :]


MODELS: dict[str, Callable[[Path], PreTrainedModel]] = {
    **{family: lambda _, family=family: dense_family(family) for family in FAMILIES},  # type: ignore[misc]
    "bfloat16": lambda _: bfloat16_model(),
    "mixtral": lambda _: tiny_type_model("mixtral").float(),
    "bloom": lambda _: tiny_type_model("bloom").float(),
    "per-layer llama": lambda folder: per_layer("llama", folder),
    "per-layer gemma2": lambda folder: per_layer("gemma2", folder),
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "weight-only"),
        ("llama", "dynamic"),
        ("opt", "weight-only"),  # biases
        ("phi3", "dynamic"),  # fused weights
        ("gpt_neox", "weight-only"),
        ("gemma2", "dynamic"),  # tied weights
        ("bfloat16", "dynamic"),
        ("mixtral", "weight-only"),  # stacked experts
        ("bloom", "dynamic"),
        ("per-layer llama", "dynamic"),
        ("per-layer gemma2", "weight-only"),
    ],
)
def test_transformers_alone_reads_what_was_in_memory(name: str, scheme: str, tmp_path: Path) -> None:
    with quiet():
        model = MODELS[name](tmp_path / "source")
    model.set_attn_implementation("eager")
    options, dense = Int8Options(dynamic=scheme == "dynamic"), logits_of(model)
    packed, _, _ = int8_copy(model, options)
    done = export_int8(model, tmp_path / "int8", options, tokenizer=tiny_tokenizer())
    assert torch.equal(logits_of(model), dense)  # it is left as it was
    assert getattr(model.config, "quantization_config", None) is None
    expected = logits_of(packed)
    assert 0 < (expected - dense).double().norm() / dense.double().norm() < CLOSE[scheme]

    atol = 1e-5 if name == "mixtral" else 0.0  # stacked experts are computed in the order that the loader chose
    seen = stranger().use(done.out, IDS, lora=False)
    torch.testing.assert_close(seen.logits, expected, atol=atol, rtol=0)
    if name != "bfloat16":  # rounding may turn a tie
        assert torch.equal(seen.tokens, greedy(packed))
    loaded = load(str(done.out), device="cpu")
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(loaded), expected, atol=atol, rtol=0)
    assert weight_bytes(loaded) == done.weight_bytes["after"]
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(table, nn.Module)
    assert isinstance(head, nn.Module)
    assert (table.weight is head.weight) == bool(model.config.tie_word_embeddings)
    check_files(done, per_layer=name.startswith("per-layer"))


def check_files(done: PackedResult, *, per_layer: bool) -> None:
    """Every layer named is int8 in the file, with one float32 scale a row, and nothing else is int8."""
    stored: dict[str, tuple[str, list[int]]] = {}
    for file in done.out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(key)
                stored[key] = (part.get_dtype(), part.get_shape())
    packed = [key for key, (dtype, _) in stored.items() if dtype == "I8" and key.endswith("qdata")]
    assert len(packed) == len(done.layers) > 0
    for key in packed:
        assert stored[key.replace("qdata", "scale")] == ("F32", [stored[key][1][0], 1])
    assert done.file_bytes == weight_file_bytes(str(done.out))
    assert done.weight_bytes["after"] < done.file_bytes < done.weight_bytes["before"]
    config = json.loads((done.out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert str(config["model_type"]).startswith(PER_LAYER) == per_layer
    assert {"generation_config.json", "tokenizer.json"} <= set(names(done.out))


class TestLeft:
    """Weights that keep their dtype, each with its reason."""

    def left(self, model: PreTrainedModel) -> dict[str, str]:
        _, layers, left = int8_copy(model)
        matrices = [name for name, weight in model.named_parameters() if weight.dim() > 1]
        assert sorted([*left, *(f"{path}.weight" for path in layers)]) == sorted(matrices)  # each is accounted for
        return left

    def test_head_and_table(self) -> None:
        assert self.left(tiny_model()) == {
            "model.embed_tokens.weight": "Embedding is no linear layer",
            "lm_head.weight": "it gives the logits",
        }

    def test_tied(self) -> None:
        assert self.left(tiny_model(tie_word_embeddings=True)) == {
            "model.embed_tokens.weight": "it is lm_head.weight, too"
        }

    def test_experts_and_convolutions(self) -> None:
        assert self.left(tiny_type_model("mixtral").float())["model.layers.0.mlp.experts.down_proj"] == (
            "MixtralExperts is no linear layer"
        )
        assert "Conv1d is no linear layer" in self.left(tiny_type_model("mamba").float()).values()

    def test_weights_that_code_uses_itself(self) -> None:
        left = self.left(tiny_type_model("mamba").float())
        assert left["backbone.layers.0.mixer.dt_proj.weight"] == "more than a linear product is computed with it"

    def test_weights_that_the_code_keeps_in_float32(self) -> None:
        model = tiny_model()
        model._keep_in_fp32_modules = ["o_proj"]
        why = "the model's code keeps it in float32"
        assert [name for name, reason in self.left(model).items() if reason == why] == [
            f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)
        ]

    def test_a_model_without_any(self, tmp_path: Path) -> None:
        with pytest.raises(
            ModelError, match=r"GPT2LMHeadModel: only weights of linear layers can be packed, .*c_attn.*Conv1D is no"
        ):
            export_int8(dense_family("gpt2"), tmp_path / "out")
        with pytest.raises(ModelError, match="more than a linear product is computed with it"):
            export_int8(tiny_type_model("falcon").float(), tmp_path / "out")
        assert names(tmp_path) == []

    def test_sizes_that_cuda_has_no_int8_product_for(self, tmp_path: Path) -> None:
        assert export_int8(tiny_model(intermediate_size=88), tmp_path / "even").unaligned == ()
        odd = export_int8(tiny_model(intermediate_size=84), tmp_path / "odd").unaligned
        assert {path.split(".")[-1] for path in odd} == {"gate_proj", "up_proj", "down_proj"}


class TestRefused:
    def test_without_torchao(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        export_int8(tiny_model(), tmp_path / "int8")
        find = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
        )
        with pytest.raises(CheckpointError, match=r"needs the package torchao\. Run: pip install 'secateur\[int8\]'"):
            export_int8(tiny_model(), tmp_path / "out")
        with pytest.raises(
            ModelError, match=r"int8': .* needs the package torchao\. Run: pip install 'secateur\[int8\]'"
        ):
            load(str(tmp_path / "int8"), device="cpu")

    def test_quantized_already(self, tmp_path: Path) -> None:
        write_tiny(tmp_path / "tiny")
        dense = load(str(tmp_path / "tiny"), device="cpu")
        decided = plan(
            discover(dense), CutOptions(ratio=0.3, scope="local", shape="uniform"), scores=score(dense, name="l2")
        )
        int8 = str(export_int8(dense, tmp_path / "int8", tokenizer=tiny_tokenizer()).out)
        loaded = load(int8, device="cpu")
        match = r"int8' is quantized \(torchao\), .* Prune the model that it was made from and quantize the result"
        attempts: list[Callable[[], Any]] = [
            lambda: export_int8(loaded, tmp_path / "out"),
            lambda: score(loaded, name="l2"),
            lambda: prune(loaded, decided),
            lambda: prune_model(int8, tmp_path / "out"),
            lambda: plan_model(int8),
        ]
        for attempt in attempts:
            with pytest.raises(ModelError, match=match):
                attempt()
        assert (
            plan_model(int8, sizes_only=True).parameters
            == plan_model(str(tmp_path / "tiny"), sizes_only=True).parameters
        )
        assert not (tmp_path / "out").exists()

    def test_float64(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="weights of float64 are not packed; expected float32, bfloat16, float16"):
            export_int8(tiny_model(dtype=torch.float64), tmp_path / "out")

    def test_a_model_that_fails_on_tokens_alone(self, tmp_path: Path) -> None:
        with quiet():
            model = tiny_type_model("musicgen").float()
        with pytest.raises(
            ModelError,
            match=r"MusicgenForCausalLM: a forward pass over tokens alone .* it fails; RuntimeErr",
        ):
            export_int8(model, tmp_path / "out")

    def test_cut_in_memory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: its config does not have its sizes, .* folder"):
            export_int8(uneven_cut("llama")[0], tmp_path / "out")

    def test_what_transformers_cannot_read_back(self, tmp_path: Path) -> None:
        """It loads a type whose tied weights it does not tie again; the folder must not appear."""
        with quiet():
            model = tiny_type_model("youtu").float()
        with pytest.raises(CheckpointError, match="YoutuForCausalLM: transformers cannot load it with int8 weights"):
            export_int8(model, tmp_path / "out")
        assert names(tmp_path) == []

    def test_values_that_are_not_read_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.export.int8._same", lambda *_: False)
        with pytest.raises(CheckpointError, match=r"cannot load it with int8 weights; .* would have other values"):
            export_int8(tiny_model(), tmp_path / "out")
        assert names(tmp_path) == []

    def test_a_folder_that_exists(self, tmp_path: Path) -> None:
        export_int8(tiny_model(), tmp_path / "out")
        with pytest.raises(CheckpointError, match="out exists"):
            export_int8(tiny_model(), tmp_path / "out")
        export_int8(tiny_model(), tmp_path / "out", overwrite=True)


class TestAround:
    def test_plan_record_and_tokenizer_are_copied(self, tmp_path: Path) -> None:
        dense = tiny_model()
        decided = plan(
            discover(dense),
            CutOptions(ratio=0.3, scope="local", shape="uniform"),
            config=dense.config,
            scores=score(dense, name="l2"),
        )
        pruned = prune(dense, decided)
        pruned.generation_config.max_length = 77
        folder = save(pruned, tmp_path / "pruned", plan=decided, record=make_record(dense, name="tiny"))
        tokenizer = load_tokenizer(str(write_tiny(tmp_path / "tiny")))
        tokenizer.chat_template = "{{ messages[0]['content'] }}!"
        done = export_int8(load(str(folder), device="cpu"), tmp_path / "int8", tokenizer=tokenizer, source=folder)
        for name in (PLAN_FILE, RECORD_FILE):
            assert (done.out / name).read_bytes() == (folder / name).read_bytes()
        with quiet():
            assert AutoModelForCausalLM.from_pretrained(done.out).generation_config.max_length == 77
        chat = load_tokenizer(str(done.out)).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert chat == "a!"

    def test_several_files_are_read_and_a_missing_one_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.export.int8.SHARD", "20KB")
        model = tiny_model(tie_word_embeddings=True)
        done = export_int8(model, tmp_path / "out")
        assert len(list(done.out.glob("*.safetensors"))) > 3
        packed, _, _ = int8_copy(model)
        assert torch.equal(logits_of(load(str(done.out), device="cpu")), logits_of(packed))
        next(done.out.glob("*-00002-*.safetensors")).unlink()
        with pytest.raises(ModelError, match="the shard model-00002-of-"):
            load(str(done.out), device="cpu")

    def test_the_other_weights_take_the_dtype_of_loading(self, tmp_path: Path) -> None:
        done = export_int8(tiny_model(), tmp_path / "out")
        plain, other = load(str(done.out), device="cpu"), load(str(done.out), device="cpu", dtype="bfloat16")
        assert other.dtype == torch.bfloat16
        torch.testing.assert_close(logits_of(other).float(), logits_of(plain), atol=0.05, rtol=0)

    def test_it_is_measured_as_a_dense_model_is(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "tiny")
        model, tokenizer = load(str(folder), device="cpu"), load_tokenizer(str(folder))
        done = export_int8(model, tmp_path / "int8", tokenizer=tokenizer)
        int8 = load(str(done.out), device="cpu")
        before = logits_of(int8)
        options = ProfileOptions(seq_lens=(8,), new_tokens=2)
        rows = {row.model: row for row in profile({"dense": model, "int8": int8}, options)}
        assert torch.equal(logits_of(int8), before)
        assert rows["int8"].parameters == rows["dense"].parameters
        assert rows["int8"].macs == rows["dense"].macs
        assert (rows["dense"].weight_bytes, rows["int8"].weight_bytes) == (
            done.weight_bytes["before"],
            done.weight_bytes["after"],
        )
        packed, dense = rows["int8"].speed, rows["dense"].speed
        assert packed is not None
        assert dense is not None
        assert packed.peak_bytes < dense.peak_bytes
        (a,), (b,) = (evaluate(each, tokenizer, {"text": demo_texts()[1][:4000]}) for each in (model, int8))
        assert a.tokens == b.tokens
        assert 0 < abs(b.nll - a.nll) < 0.01


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_demo_loses_less_than_two_percent(
    demo_model: PreTrainedModel, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    done = export_int8(demo_model, tmp_path / "int8", tokenizer=demo_tokenizer)
    assert done.weight_bytes["after"] < 0.5 * done.weight_bytes["before"]
    int8, text = load(str(done.out), device="cpu"), {"reference": demo_texts()[1]}
    ((dense,), (packed,)) = (evaluate(each, demo_tokenizer, text, max_tokens=2048) for each in (demo_model, int8))
    assert dense.ppl < packed.ppl < 1.02 * dense.ppl
    ids = torch.tensor(demo_tokenizer(demo_texts()[1], verbose=False)["input_ids"][:64])[None]
    int8.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(stranger().use(done.out, ids, lora=False).logits, int8(ids).logits)
