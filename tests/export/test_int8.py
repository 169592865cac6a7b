"""Int8: one process in which nothing of ours can be imported reads the folders, and finds what was in memory."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from every_type import tiny_type_model
from families import FAMILIES, family_config, family_model
from recipes import recipe
from secateur import CutOptions, discover, evaluate, plan, profile, prune, save, score
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, make_record
from secateur.data.text import demo_texts
from secateur.errors import CheckpointError, ModelError
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.export.int8 import SCHEMES, Int8Result, export_int8, int8_copy
from secateur.export.options import Int8Options
from secateur.models.loading import load
from secateur.models.modeling_per_layer import PER_LAYER
from secateur.models.silence import quiet, silence_imports
from secateur.models.tensors import plain_tensors
from secateur.models.tokenizer import load_tokenizer
from secateur.models.weight_files import weight_file_bytes
from secateur.pipeline.run import plan_model, prune_model
from tiny import names, tiny_model, tiny_tokenizer, write_tiny

pytest.importorskip("torchao", reason="the extra int8 is not installed")

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
CLOSE = {"weight-only": 0.09, "dynamic": 0.12}  # of the logits' norm; all weights of these models are large and random

# Runs where nothing of ours can be imported; writes what it finds in every folder to the first argument.
READER = """
import sys
sys.modules["secateur"] = None
import torch
from safetensors.torch import save_file
from torchao.quantization import Int8Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
for folder in sys.argv[2:]:
    free = folder.startswith("free")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=free, attn_implementation="eager").eval()
    with torch.no_grad():
        found[folder + " logits"] = model(ids).logits.clone()
    packed = [p for m in model.modules() for p in m.parameters(recurse=False) if isinstance(p, Int8Tensor)]
    found[folder + " packed"] = torch.tensor(len(packed))
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    found[folder + " tied"] = torch.tensor(table is head)
    found[folder + " tokens"] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )[:, ids.shape[1]:].contiguous()
    assert AutoTokenizer.from_pretrained(folder)("prune").input_ids
save_file(found, sys.argv[1])
"""


def dense_family(family: str, **changes: Any) -> PreTrainedModel:
    return family_model(family_config(family, **changes), dtype=torch.float32)


def free_family(family: str) -> PreTrainedModel:
    """Heads and channels of some layers cut, so that layers differ."""
    dense = dense_family(family)
    options = CutOptions(ratio=0.3, of="units", axes=("attention", "mlp"), layers=(1, 3), score="l2")
    return prune(dense, plan(discover(dense), options, scores=score(dense, name="l2")))


def _bfloat16(config: PreTrainedConfig) -> PreTrainedModel:
    """In bfloat16 from the start: what the code computes besides weights is not cast, as in a model that is loaded."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(family_model(config, dtype=torch.bfloat16).state_dict())
    return model


TYPES: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        family: partial(dense_family, family) for family in FAMILIES if family not in ("gpt2", "mistral", "gemma3_text")
    },
    "tied": lambda: dense_family("llama", tie_word_embeddings=True),
    "bfloat16": lambda: _bfloat16(family_config("llama")),
    "mixtral": lambda: tiny_type_model("mixtral").float(),
    "bloom": lambda: tiny_type_model("bloom").float(),
    "free-llama": lambda: free_family("llama"),
    "free-gpt_neox": lambda: free_family("gpt_neox"),
    "free-gemma2": lambda: free_family("gemma2"),
}
CASES = [f"{name} {scheme}" for name in TYPES for scheme in SCHEMES]


@dataclass(frozen=True)
class Written:
    """A model in memory, dense and packed, and what was written of it."""

    dense: Tensor  # logits
    packed: PreTrainedModel
    done: Int8Result


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def greedy(model: PreTrainedModel, new_tokens: int = 4) -> Tensor:
    """The most likely tokens, without a cache."""
    ids, end = IDS, model.generation_config.eos_token_id
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1].clone()
        logits[:, [] if end is None else end] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, IDS.shape[1] :]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    parent = tmp_path_factory.mktemp("int8")
    found = {}
    for name, make in TYPES.items():
        with quiet():
            model = make()
        if name.startswith("free"):  # a folder says what was cut in memory
            options = CutOptions(ratio=0.3, of="units")
            decided = plan(discover(dense_family("llama")), options)
            folder = save(model, parent / name, plan=decided)
            model = load(str(folder), device="cpu")
        model.set_attn_implementation("eager")
        before = logits_of(model)
        for scheme in SCHEMES:
            case = f"{name} {scheme}"
            packed, _, _ = int8_copy(model, Int8Options(scheme == "dynamic"))
            done = export_int8(model, parent / case, Int8Options(scheme == "dynamic"), tokenizer=tiny_tokenizer())
            found[case] = Written(before, packed, done)
        assert torch.equal(logits_of(model), before)  # it is left as it was
        assert getattr(model.config, "quantization_config", None) is None
        assert not any(len(plain_tensors(weight)) > 1 for weight in model.parameters())
    return found


@pytest.fixture(scope="module")
def read(written: dict[str, Written]) -> Mapping[str, Tensor]:
    parent = next(iter(written.values())).done.out.parent
    environment = {**os.environ, "HF_MODULES_CACHE": str(parent / "modules")}
    command = [sys.executable, "-c", READER, "read.safetensors", *written]
    done = subprocess.run(command, cwd=parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(parent / "read.safetensors")


@pytest.mark.parametrize("case", CASES)
class TestFolder:
    def test_a_stranger_reads_the_same(
        self, written: dict[str, Written], read: Mapping[str, Tensor], case: str
    ) -> None:
        expected = logits_of(written[case].packed)
        if "mixtral" in case:  # stacked experts are computed in the order that the loader chose
            torch.testing.assert_close(read[f"{case} logits"], expected, atol=1e-5, rtol=0)
        else:
            assert torch.equal(read[f"{case} logits"], expected)
        assert int(read[f"{case} packed"]) == len(written[case].done.layers)
        table, head = written[case].packed.get_input_embeddings(), written[case].packed.get_output_embeddings()
        assert isinstance(table, nn.Module)
        assert isinstance(head, nn.Module)
        assert bool(read[f"{case} tied"]) == (table.weight is head.weight)
        if "bfloat16" not in case:  # rounding may turn a tie
            assert torch.equal(read[f"{case} tokens"], greedy(written[case].packed))

    def test_it_is_close_to_the_dense_one(self, written: dict[str, Written], case: str) -> None:
        dense = written[case].dense.double()
        error = (logits_of(written[case].packed).double() - dense).norm() / dense.norm()
        assert 0 < error < CLOSE[case.split()[1]]

    def test_we_read_the_same(self, written: dict[str, Written], read: Mapping[str, Tensor], case: str) -> None:
        before = set(sys.modules)
        loaded = load(str(written[case].done.out), device="cpu")
        assert not any(module.startswith("transformers_modules") for module in set(sys.modules) - before)
        loaded.set_attn_implementation("eager")
        atol = 1e-5 if "mixtral" in case else 0.0
        torch.testing.assert_close(logits_of(loaded), read[f"{case} logits"], atol=atol, rtol=0)
        assert weight_bytes(loaded) == written[case].done.weight_bytes["after"]

    def test_files(self, written: dict[str, Written], case: str) -> None:
        """Every layer named is int8 in the file, with one float32 scale a row, and nothing else is int8."""
        done = written[case].done
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
        assert str(config["model_type"]).startswith(PER_LAYER) == case.startswith("free")
        assert not list(done.out.glob("*.bin"))
        assert {"generation_config.json", "tokenizer.json"} <= set(names(done.out))


class TestWhatIsLeft:
    """Weights that stay as they are, each for a reason that is told."""

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
        with pytest.raises(ModelError, match=r"GPT2LMHeadModel: no weight can be int8, .*c_attn.*Conv1D is no linear"):
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
        with pytest.raises(CheckpointError, match=r"torchao, which is not installed: pip install 'secateur\[int8\]'"):
            export_int8(tiny_model(), tmp_path / "out")
        with pytest.raises(ModelError, match=r"int8': .*torchao, .* not installed: pip install 'secateur\[int8\]'"):
            load(str(tmp_path / "int8"), device="cpu")

    def test_quantised_already(self, tmp_path: Path) -> None:
        write_tiny(tmp_path / "tiny")
        dense = load(str(tmp_path / "tiny"), device="cpu")
        decided = plan(
            discover(dense), CutOptions(ratio=0.3, scope="local", shape="uniform"), scores=score(dense, name="l2")
        )
        int8 = str(export_int8(dense, tmp_path / "int8", tokenizer=tiny_tokenizer()).out)
        loaded = load(int8, device="cpu")
        match = r"int8' is quantised \(torchao\), .* Prune the model that it was made from and quantise the result"
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

    def test_a_model_that_reads_no_line_of_tokens(self, tmp_path: Path) -> None:
        with quiet():
            model = tiny_type_model("musicgen").float()
        with pytest.raises(
            ModelError,
            match=r"MusicgenForCausalLM: a forward pass over tokens alone .* it fails; RuntimeErr",
        ):
            export_int8(model, tmp_path / "out")

    def test_cut_in_memory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: its config does not have its sizes, .* folder"):
            export_int8(free_family("llama"), tmp_path / "out")

    def test_what_transformers_cannot_read_back(self, tmp_path: Path) -> None:
        """It loads a type whose tied weights it does not tie again; the folder must not appear."""
        with quiet():
            model = tiny_type_model("youtu").float()
        with pytest.raises(CheckpointError, match="YoutuForCausalLM: transformers cannot load it with int8 weights"):
            export_int8(model, tmp_path / "out")
        assert names(tmp_path) == []

    def test_a_folder_that_exists(self, tmp_path: Path) -> None:
        export_int8(tiny_model(), tmp_path / "out")
        with pytest.raises(CheckpointError, match="out exists"):
            export_int8(tiny_model(), tmp_path / "out")
        export_int8(tiny_model(), tmp_path / "out", overwrite=True)


class TestAround:
    def test_what_lies_beside_the_weights_comes_along(self, tmp_path: Path) -> None:
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

    def test_several_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.export.int8.SHARD", "20KB")
        model = tiny_model(tie_word_embeddings=True)
        done = export_int8(model, tmp_path / "out")
        assert len(list(done.out.glob("*.safetensors"))) > 3
        packed, _, _ = int8_copy(model)
        assert torch.equal(logits_of(load(str(done.out), device="cpu")), logits_of(packed))

    def test_a_file_that_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.export.int8.SHARD", "20KB")
        done = export_int8(tiny_model(), tmp_path / "out")
        next(done.out.glob("*-00002-*.safetensors")).unlink()
        with pytest.raises(ModelError, match="the shard model-00002-of-"):
            load(str(done.out), device="cpu")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_another_dtype_for_the_rest(self, tmp_path: Path, dtype: str) -> None:
        done = export_int8(tiny_model(), tmp_path / "out")
        plain, other = load(str(done.out), device="cpu"), load(str(done.out), device="cpu", dtype=dtype)
        assert other.dtype == getattr(torch, dtype)
        torch.testing.assert_close(logits_of(other).float(), logits_of(plain), atol=0.05, rtol=0)

    def test_measured_beside_the_dense_one(self, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("name", "message", "heard"),
    [
        ("torchao", "Failed to load /x/_C.so: no such library", False),
        ("torch.utils._pytree", "<enum 'A'> is an Enum subclass", False),
        ("torchao", "A kernel gives wrong numbers", True),
        ("torchao.other", "Failed to load", True),
    ],
)
def test_only_what_is_said_on_import_is_left_out(
    name: str, message: str, heard: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger(name).addHandler(caplog.handler)
    try:
        with silence_imports():
            logging.getLogger(name).warning(message)
        assert bool(caplog.records) == heard
        caplog.clear()
        logging.getLogger(name).warning(message)
        assert caplog.records
    finally:
        logging.getLogger(name).removeHandler(caplog.handler)


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_demo_pruned_and_packed(tmp_path: Path) -> None:
    """In a process of plain transformers, the pruned demo with int8 weights has less than 2 % more perplexity."""
    pruned = prune_model(recipe("demo", preset="fast"), tmp_path / "pruned").out
    tokenizer = load_tokenizer(str(pruned))
    before = load(str(pruned), device="cpu")
    done = export_int8(before, tmp_path / "int8", tokenizer=tokenizer, source=pruned)
    text = {"reference": demo_texts()[1]}
    (dense,) = evaluate(before, tokenizer, text, max_tokens=4096)
    (ours,) = evaluate(load(str(done.out), device="cpu"), tokenizer, text, max_tokens=4096)
    assert dense.ppl < ours.ppl < 1.02 * dense.ppl
    assert done.weight_bytes["after"] < 0.5 * done.weight_bytes["before"]
    ids = torch.tensor(tokenizer(demo_texts()[1], verbose=False)["input_ids"][:4096]).reshape(-1, 128)
    code = (
        "import sys; sys.modules['secateur'] = None\n"
        "import torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "ids, total = load_file(sys.argv[2])['ids'], 0.0\n"
        "with torch.no_grad():\n"
        "    for row in ids:\n"
        "        total += float(model(row[None], labels=row[None]).loss.double())\n"
        "print(total / len(ids))\n"
    )
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(done.out), str(tmp_path / "ids.safetensors")]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert float(shown) == pytest.approx(ours.nll, abs=1e-4)
