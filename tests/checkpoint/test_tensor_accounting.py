"""Every tensor of a dense checkpoint is accounted for by name, and what lies beside the weights is carried over."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import secateur.checkpoint.save
from contract import uneven
from every_type import tiny_type_model
from families import family_config, family_model
from recipes import recipe
from secateur import CutOptions, discover, plan, prune, prune_model, save, score, verify
from secateur.checkpoint.record import read_record
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.errors import CheckpointError
from secateur.models.loading import load
from secateur.models.manifest import read_manifest
from secateur.models.silence import quiet
from secateur.models.tokenizer import text_files
from secateur.planning.plan import Plan
from tiny import tiny_model, tiny_tokenizer, write_tiny

UNIFORM = {"score": "l2", "scope": "local", "shape": "uniform", "repair": "none", "choose": "score"}
CARRIED = {
    "added_tokens.json": '{"<more>": 300}',
    "additional_chat_templates/tool.jinja": "{{ messages[0].content }}!",
    "chat_template.jinja": "{{ messages[0].content }}",
    "merges.txt": "#version: 0.2\n",
    "preprocessor_config.json": '{"size": 3}',
    "processor_config.json": '{"processor_class": "X"}',
    "special_tokens_map.json": '{"eos_token":   "<end>"}',
    "tokenizer.model": "not ours to read",
}


def cut(model: PreTrainedModel, *, ratio: float = 0.34, **options: Any) -> tuple[PreTrainedModel, Plan]:
    """The model cut by a share of the units of its axes."""
    decided = plan(
        discover(model),
        CutOptions(ratio=ratio, of="units", score="l2", **options),
        config=model.config,
        scores=score(model, name="l2"),
    )
    return prune(model, decided), decided


def fates(model: PreTrainedModel, pruned: PreTrainedModel, decided: Plan) -> dict[str, str]:
    return account_for_tensors(model, pruned, decided, discover(model))


def kinds(found: dict[str, str]) -> dict[str, int]:
    return dict(Counter(fate.split()[0] for fate in found.values()))


class TestAccount:
    def test_widths(self) -> None:
        model = tiny_model()
        found = fates(model, *cut(model, axes=("mlp",)))
        assert found.keys() == model.state_dict().keys()
        assert kinds(found) == {"kept": 3 * 6 + 3, "cut": 3 * 3}
        assert found["model.layers.1.mlp.down_proj.weight"] == "cut float32 [48, 84] -> [48, 55]"
        assert found["model.layers.1.mlp.up_proj.weight"] == "cut float32 [84, 48] -> [55, 48]"
        assert found["model.norm.weight"] == "kept float32 [48]"

    def test_layers(self) -> None:
        """The number in a name may change; the account says from which dense tensor each comes."""
        model = tiny_model()
        pruned, decided = cut(model, axes=("layers",))
        (dropped,) = decided.sizes.dropped_layers
        found = fates(model, pruned, decided)
        assert kinds(found) == {"kept": 2 * 9 + 3, "dropped": 9}
        after = pruned.state_dict()
        moved = {old: fate.split(" as ")[1] for old, fate in found.items() if " as " in fate}
        assert len(moved) == 9 * (2 - dropped)
        for old, new in moved.items():
            assert torch.equal(model.state_dict()[old], after[new])

    def test_hidden_width_keeps_the_tie(self, tmp_path: Path) -> None:
        model = tiny_model(tie_word_embeddings=True)
        pruned, decided = cut(model, ratio=0.25, axes=("hidden",))
        found = fates(model, pruned, decided)
        assert found["lm_head.weight"] == "tied to model.embed_tokens.weight"
        assert found["model.embed_tokens.weight"] == "cut float32 [300, 48] -> [300, 36]"
        save(pruned, tmp_path / "out", plan=decided)
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        assert "lm_head.weight" not in (manifest["model.safetensors"].tensors or {})
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert again.lm_head.weight is again.model.embed_tokens.weight

    def test_sublayers_that_go_as_a_whole(self, tmp_path: Path) -> None:
        model = tiny_model()
        options = CutOptions(ratio=0.5, score="l2", scope="global", shape="per-layer", sublayers=True, min_keep=0.0)
        decided = plan(discover(model), options, config=model.config, scores=score(model, name="l2"))
        assert decided.sizes.emptied
        pruned = prune(model, decided)
        found = fates(model, pruned, decided)
        assert kinds(found)["dropped"] >= 3
        save(pruned, tmp_path / "out", plan=decided)
        assert verify(tmp_path / "out").problems == ()

    def test_other_values_are_told_from_the_same(self) -> None:
        model = tiny_model()
        pruned, decided = cut(model, axes=("mlp",))
        weight = pruned.get_parameter("model.layers.0.self_attn.q_proj.weight")
        pruned.get_submodule("model.layers.0.self_attn.q_proj").weight = nn.Parameter(weight.detach().clone())
        assert kinds(fates(model, pruned, decided)).get("fitted") is None
        pruned.get_parameter("model.layers.0.self_attn.q_proj.weight").data[0, 0] += 1
        found = fates(model, pruned, decided)
        assert found["model.layers.0.self_attn.q_proj.weight"] == "fitted float32 [96, 48]"

    @pytest.mark.parametrize("make", [lambda: tiny_type_model("mixtral"), lambda: family_model(family_config("gpt2"))])
    def test_experts_and_fused_projections(self, make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
        with quiet():
            model = make()
        decided = uneven(model, ("attention", "mlp", "expert_mlp"))
        pruned = prune(model, decided)
        found = fates(model, pruned, decided)
        assert found.keys() == model.state_dict().keys()
        assert kinds(found)["cut"] > 0
        save(pruned, tmp_path / "out", plan=decided)
        assert verify(tmp_path / "out").problems == ()

    def test_what_has_no_place_in_the_model(self) -> None:
        model = tiny_model()
        pruned, decided = cut(model, axes=("mlp",))
        found = account_for_tensors(model, pruned, decided, discover(model), unplaced=["visual.patch.weight"])
        assert found["visual.patch.weight"] == "unplaced"
        assert len(found) == len(model.state_dict()) + 1

    def test_what_cannot_be_accounted_for(self) -> None:
        model = tiny_model(tie_word_embeddings=True)
        pruned, decided = cut(model, axes=("mlp",))

        def lost(other: Any) -> None:
            del other.model.norm.weight

        def added(other: Any) -> None:
            other.model.norm.bias = nn.Parameter(torch.zeros(48))

        def grown(other: Any) -> None:
            other.model.norm.weight = nn.Parameter(torch.ones(50))

        def untied(other: Any) -> None:
            other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())

        def halved(other: Any) -> None:
            other.model.norm.half()

        for change, match in (
            (lost, r"lacks model\.norm\.weight, and the plan drops no block around it"),
            (added, r"has model\.norm\.bias, which no tensor of the dense model became"),
            (grown, r"has model\.norm\.weight as \[50\], the dense one \[48\]"),
            (untied, r"has \S+ apart from \S+, to which it was tied"),
            (halved, r"has model\.norm\.weight in torch\.float16, the dense one in torch\.float32"),
        ):
            other = copy.deepcopy(pruned)
            change(other)
            with pytest.raises(CheckpointError, match=match):
                fates(model, other, decided)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_each_is_kept(self, dtype: torch.dtype, tmp_path: Path) -> None:
        write_tiny(tmp_path / "dense", dtype=dtype)
        prune_model(recipe(str(tmp_path / "dense"), cut={**UNIFORM, "ratio": 0.3}), tmp_path / "out")
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
        record = read_record(tmp_path / "out")
        assert record is not None
        assert all(f" {str(dtype).removeprefix('torch.')} " in fate for fate in (record.tensors or {}).values())

    @pytest.mark.parametrize("shape", ["uniform", "free"])
    def test_each_tensor_has_its_own(self, shape: str, tmp_path: Path) -> None:
        model = tiny_model(dtype=torch.bfloat16)
        model.get_submodule("model.norm").float()
        decided = cut(model, axes=("mlp",))[1] if shape == "uniform" else uneven(model, ("mlp",))
        pruned = prune(model, decided)
        found = fates(model, pruned, decided)
        assert found["model.norm.weight"] == "kept float32 [48]"
        save(pruned, tmp_path / "out", plan=decided)
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        tensors = dict(manifest["model.safetensors"].tensors or {})
        assert tensors.pop("model.norm.weight") == "F32 [48]"
        assert {about.split()[0] for about in tensors.values()} == {"BF16"}

    def test_another_dtype_is_not_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model()
        pruned, decided = cut(model, axes=("mlp",))
        write = PreTrainedModel.save_pretrained

        def halved(self: PreTrainedModel, folder: Path, **_: Any) -> None:
            write(self, folder, state_dict={name: tensor.half() for name, tensor in self.state_dict().items()})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", halved)
        with pytest.raises(CheckpointError, match=r"the folder has \S+ as F16, the model as F32"):
            save(pruned, tmp_path / "out", plan=decided)
        assert not (tmp_path / "out").exists()


class TestShards:
    @pytest.mark.parametrize("shape", ["uniform", "free"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_shards_in_and_out(self, shape: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tiny(tmp_path / "dense", shard="60KB", tie_word_embeddings=tied)
        write_tiny(tmp_path / "one", tie_word_embeddings=tied)
        options = {**UNIFORM, "shape": shape, "ratio": 0.3}
        if shape == "free":
            options |= {"scope": "global"}
        prune_model(recipe(str(tmp_path / "one"), cut=options), tmp_path / "whole")
        monkeypatch.setattr(secateur.checkpoint.save, "SHARD", "50KB")
        prune_model(recipe(str(tmp_path / "dense"), cut=options), tmp_path / "out")
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert len(shards) > 3
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert {name: shard.name for shard in shards for name in load_file(shard)} == index
        assert ("lm_head.weight" in index) != tied
        assert verify(tmp_path / "out").problems == ()
        first, second = (load(str(tmp_path / name), device="cpu").state_dict() for name in ("whole", "out"))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class TestCarriedOver:
    @pytest.fixture
    def dense(self, tmp_path: Path) -> Path:
        folder = write_tiny(tmp_path / "dense")
        (folder / "additional_chat_templates").mkdir()
        for name, text in CARRIED.items():
            (folder / name).write_text(text)
        given = {"do_sample": True, "temperature": 0.7, "eos_token_id": [0, 5], "my_own": 3}
        (folder / "generation_config.json").write_text(json.dumps(given))
        config = json.loads((folder / "config.json").read_text())
        ids = {"bos_token_id": 7, "eos_token_id": [0, 5], "pad_token_id": 6}
        (folder / "config.json").write_text(json.dumps({**config, **ids}))
        return folder

    @pytest.mark.parametrize("options", [UNIFORM, {**UNIFORM, "axes": ("layers",)}, {**UNIFORM, "axes": ("hidden",)}])
    def test_files_settings_and_ids(self, options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
        prune_model(recipe(str(dense), cut={**options, "ratio": 0.34}), tmp_path / "out")
        for name in (*CARRIED, "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()
        before, after = (
            json.loads((folder / "generation_config.json").read_text()) for folder in (dense, tmp_path / "out")
        )
        assert {name: value for name, value in after.items() if name != "transformers_version"} == before
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (7, [0, 5], 6)
        assert config["vocab_size"] == 300
        tokenizer, again = (AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "out"))
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.all_special_ids == tokenizer.all_special_ids
        chat = [{"role": "user", "content": "hello"}]
        assert again.apply_chat_template(chat, tokenize=False) == "hello"
        assert verify(tmp_path / "out").problems == ()

    def test_what_else_lies_there_stays(self, dense: Path, tmp_path: Path) -> None:
        others = ("README.md", "pytorch_model.bin", "training_args.bin", "run.py", "x.gguf", "optimizer.safetensors")
        for name in others:
            (dense / name).write_text("x")
        (dense / "optimizer.safetensors").unlink()
        prune_model(recipe(str(dense), cut={**UNIFORM, "ratio": 0.3}), tmp_path / "out")
        assert not {path.name for path in (tmp_path / "out").iterdir()} & set(others)

    def test_files_of_the_hub(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--organisation--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(dense, repository / "snapshots" / ("0" * 40))
        found = text_files("organisation/tiny")
        assert found.keys() == {*CARRIED, "tokenizer.json", "tokenizer_config.json"} - {
            "additional_chat_templates/tool.jinja"
        }
        assert found["processor_config.json"].read_text() == CARRIED["processor_config.json"]

    def test_links_out_of_the_folder_are_not_published(
        self, dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "secret").write_text("a key")
        (dense / "merges.txt").unlink()
        (dense / "merges.txt").symlink_to(tmp_path / "secret")
        (dense / "vocab.txt").symlink_to("vocab.json")
        (dense / "vocab.json").write_text("{}")
        with caplog.at_level("WARNING", logger="secateur"):
            found = text_files(str(dense))
        assert "merges.txt is a link out of its folder, and is not carried over: put a copy in its place" in caplog.text
        assert "merges.txt" not in found
        assert "vocab.txt" in found

    def test_links_of_the_hubs_cache_are(self, dense: Path, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for number, name in enumerate(("config.json", "merges.txt")):
            shutil.copy(dense / name, blobs / str(number))
            (snapshot / name).symlink_to(f"../../blobs/{number}")
        assert text_files(str(snapshot)).keys() == {"merges.txt"}

    def test_a_name_that_only_its_class_knows(self, dense: Path) -> None:
        (dense / "own.vocabulary").write_text("x")
        tokenizer = copy.copy(tiny_tokenizer())
        tokenizer.vocab_files_names = {"vocab_file": "own.vocabulary"}
        assert "own.vocabulary" in text_files(str(dense), tokenizer)
        assert "own.vocabulary" not in text_files(str(dense))

    def test_a_tensor_without_a_place_is_told(self, dense: Path, tmp_path: Path) -> None:
        weights = load_file(dense / "model.safetensors")
        weights["visual.patch.weight"] = torch.zeros(3)
        save_file(weights, dense / "model.safetensors", {"format": "pt"})
        prune_model(recipe(str(dense), cut={**UNIFORM, "ratio": 0.3}), tmp_path / "out")
        record = read_record(tmp_path / "out")
        assert record is not None
        assert record.tensors is not None
        assert record.tensors["visual.patch.weight"] == "unplaced"
        assert record.tensors.keys() == weights.keys()
