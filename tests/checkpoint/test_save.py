"""What `save` writes is an ordinary model to anyone, with the files that lay beside the dense one."""

from __future__ import annotations

import copy
import json
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import secateur.checkpoint.save
from contract import uneven
from recipes import recipe
from secateur import CutOptions, discover, plan, prune, prune_model, save, score, verify
from secateur.checkpoint.formats import check_saveable
from secateur.checkpoint.record import Record, make_record, read_record, weights_digest
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.errors import CheckpointError, DiscoveryError
from secateur.files import PLAN_FILE, RECORD_FILE
from secateur.models.loading import load
from secateur.models.manifest import read_manifest
from secateur.models.tokenizer import text_files
from secateur.planning.plan import Plan, PlannedGroup, read_plan
from stranger import NEW_TOKENS, stranger
from tiny import names, tiny_model, tiny_tokenizer, write_tiny

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


IDS = torch.arange(2 * 20).reshape(2, 20) % 300


@dataclass(frozen=True)
class Case:
    """A model, a cut, and the config settings that must change."""

    settings: set[str]
    cut: CutOptions
    model: dict[str, Any]
    dtype: torch.dtype = torch.float32


BOTH = CutOptions(ratio=0.35, of="units")
CASES = {
    "attention and mlp": Case({"intermediate_size", "num_attention_heads", "num_key_value_heads"}, BOTH, {}),
    "hidden": Case({"hidden_size"}, CutOptions(ratio=0.25, of="units", axes=("hidden",)), {}),
    "layers": Case({"num_hidden_layers"}, CutOptions(ratio=0.4, of="units", axes=("layers",)), {}),
    "tied": Case({"hidden_size"}, CutOptions(ratio=0.25, of="units", axes=("hidden",)), {"tie_word_embeddings": True}),
    "bfloat16": Case(
        {"intermediate_size"}, CutOptions(ratio=0.3, axes=("mlp",), scope="local", shape="uniform"), {}, torch.bfloat16
    ),
    "query heads": Case({"num_attention_heads"}, CutOptions(ratio=0.5, of="units", axes=("query",)), {}),
}


@dataclass(frozen=True)
class Saved:
    """A pruned model in memory, where it was saved, and what a stranger reads there."""

    model: PreTrainedModel
    plan: Plan
    folder: Path
    logits: Tensor
    tokens: Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    parent = tmp_path_factory.mktemp("saved")
    made: dict[str, tuple[PreTrainedModel, Plan]] = {}
    for name, case in CASES.items():
        dense = tiny_model(dtype=case.dtype, **case.model)
        discovery = discover(dense, name="tiny")
        decided = plan(discovery, case.cut, config=dense.config, scores=score(dense, discovery=discovery, name="l2"))
        pruned = prune(dense, decided)
        pruned.set_attn_implementation("eager")  # as the stranger reads it
        record = make_record(dense, name="tiny", seed=7, command="secateur prune tiny out")
        save(pruned, parent / name, plan=decided, tokenizer=tiny_tokenizer(), record=record)
        made[name] = pruned, decided
    seen = {name: stranger().use(parent / name, IDS, thorough=True) for name in CASES}
    return {name: Saved(*made[name], parent / name, seen[name].logits, seen[name].tokens) for name in CASES}


@pytest.mark.parametrize("name", CASES)
class TestSaved:
    def test_a_stranger_reads_the_same_logits(self, saved: dict[str, Saved], name: str) -> None:
        with torch.inference_mode():
            logits = saved[name].model(input_ids=IDS).logits
        assert saved[name].logits.dtype == logits.dtype == CASES[name].dtype
        assert torch.equal(saved[name].logits, logits)

    def test_the_cache_changes_no_token(self, saved: dict[str, Saved], name: str) -> None:
        if CASES[name].dtype != torch.float32:
            pytest.skip("rounding may turn a tie")
        ids = IDS[:1]
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logits = saved[name].model(input_ids=ids, use_cache=False).logits[:, -1].clone()
                logits[:, 0] = -torch.inf  # the end of the text, which the stranger does not take either
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(saved[name].tokens, ids[:, IDS.shape[1] :])

    def test_the_config_says_the_new_sizes(self, saved: dict[str, Saved], name: str) -> None:
        settings = saved[name].plan.settings
        assert settings is not None
        assert settings.keys() == CASES[name].settings
        config = json.loads((saved[name].folder / "config.json").read_text())
        assert {key: config[key] for key in settings} == dict(settings)
        assert config["dtype"] == str(CASES[name].dtype).removeprefix("torch.")

    def test_the_weights_are_those_of_the_model(self, saved: dict[str, Saved], name: str) -> None:
        with safe_open(saved[name].folder / "model.safetensors", framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
            dtypes = {file.get_tensor(key).dtype for key in shapes}
        assert shapes == {key: tuple(value.shape) for key, value in saved[name].model.named_parameters()}
        assert dtypes == {CASES[name].dtype}
        assert ("lm_head.weight" in shapes) != ("tie_word_embeddings" in CASES[name].model)
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == saved[name].plan.parameters["pruned"]

    def test_no_file_is_a_pickle(self, saved: dict[str, Saved], name: str) -> None:
        allowed = {".json", ".safetensors", ".jinja", ".txt", ".md"}
        assert {path.suffix for path in saved[name].folder.iterdir()} <= allowed

    def test_files_can_be_read_by_others(self, saved: dict[str, Saved], name: str) -> None:
        assert {stat.S_IMODE(path.stat().st_mode) for path in saved[name].folder.iterdir()} == {0o644}

    def test_plan_and_record_lie_beside_the_weights(self, saved: dict[str, Saved], name: str) -> None:
        assert read_plan(saved[name].folder / PLAN_FILE) == saved[name].plan
        record = Record(**json.loads((saved[name].folder / RECORD_FILE).read_text()))
        assert (record.model, record.seed, record.command) == ("tiny", 7, "secateur prune tiny out")
        dense = tiny_model(dtype=CASES[name].dtype, **CASES[name].model)
        assert record.weights == weights_digest(dense)
        assert record.dtype == str(CASES[name].dtype).removeprefix("torch.")

    def test_loading_says_that_nothing_is_missing(self, saved: dict[str, Saved], name: str) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(saved[name].folder, output_loading_info=True)
        report = loaded[1]
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


class TestSave:
    @pytest.fixture
    def pruned(self, saved: dict[str, Saved]) -> Saved:
        return saved["attention and mlp"]

    def test_the_same_bytes_twice(self, pruned: Saved, tmp_path: Path) -> None:
        for name in "ab":
            save(pruned.model, tmp_path / name, plan=pruned.plan)
        assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()

    def test_a_weight_that_is_lost(self, pruned: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = PreTrainedModel.save_pretrained

        def lossy(change: str) -> Any:
            def save_other(self: PreTrainedModel, folder: Path, **_: Any) -> None:
                state = self.state_dict()
                if change == "lacks":
                    del state["model.norm.weight"]
                elif change == "leftover":
                    state["model.extra.weight"] = torch.zeros(3)
                else:
                    state["model.norm.weight"] = torch.zeros(3)
                write(self, folder, state_dict=state)

            return save_other

        for change, match in (
            ("lacks", "lacks model.norm.weight"),
            ("leftover", "has leftover model.extra.weight"),
            ("shape", "has the wrong shape for model.norm.weight"),
        ):
            monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy(change))
            with pytest.raises(CheckpointError, match=match):
                save(pruned.model, tmp_path / "out", plan=pruned.plan)
            assert names(tmp_path) == []

    def test_a_plan_without_a_stock_folder(
        self, pruned: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What no config can say has a folder with code (`test_per_layer`), unless there is no such model."""
        refused = replace(pruned.plan, settings=None, refusal="no setting gives these sizes.")
        check_saveable(refused)
        dense = tiny_model()
        discovery = discover(dense)
        check_saveable(refused, config=dense.config, discovery=discovery)
        layers = (PlannedGroup("layers", "layer", None, 3, 2, (0, 2)),)
        with pytest.raises(CheckpointError, match=r"no folder can hold .*: no setting gives these sizes\. Drop other"):
            check_saveable(replace(refused, groups=layers))
        with pytest.raises(CheckpointError, match=r"no folder can hold"):
            save(pruned.model, tmp_path / "out", plan=replace(refused, groups=layers))

        def none(*_: object, **__: object) -> None:
            raise DiscoveryError("the model does not run")

        monkeypatch.setattr("secateur.checkpoint.formats.module_changes", none)
        with pytest.raises(CheckpointError, match=r"no model can be made of what the plan leaves: no setting .*, and "):
            check_saveable(refused, config=dense.config, discovery=discovery)
        dense.config.auto_map = {"AutoModelForCausalLM": "code.Model"}
        with pytest.raises(CheckpointError, match="and of a model with custom code only a cut that its config can say"):
            check_saveable(refused, config=dense.config, discovery=discovery)
        assert names(tmp_path) == []


def widths(model: PreTrainedModel) -> tuple[PreTrainedModel, Plan]:
    """The model with smaller MLPs, alike in all layers."""
    options = CutOptions(ratio=0.34, of="units", score="l2", axes=("mlp",))
    decided = plan(discover(model), options, config=model.config, scores=score(model, name="l2"))
    return prune(model, decided), decided


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_models_dtype_is_kept(self, dtype: torch.dtype, tmp_path: Path) -> None:
        write_tiny(tmp_path / "dense", dtype=dtype)
        prune_model(recipe(str(tmp_path / "dense"), cut={**UNIFORM, "ratio": 0.3}), tmp_path / "out")
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
        record = read_record(tmp_path / "out")
        assert record is not None
        assert all(f" {str(dtype).removeprefix('torch.')} " in fate for fate in (record.tensors or {}).values())

    @pytest.mark.parametrize("shape", ["uniform", "per-layer"])
    def test_each_tensor_keeps_its_own(self, shape: str, tmp_path: Path) -> None:
        model = tiny_model(dtype=torch.bfloat16)
        model.get_submodule("model.norm").float()
        decided = widths(model)[1] if shape == "uniform" else uneven(model, ("mlp",))
        pruned = prune(model, decided)
        fates = account_for_tensors(model, pruned, decided, discover(model))
        assert fates["model.norm.weight"] == "kept float32 [48]"
        save(pruned, tmp_path / "out", plan=decided)
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        tensors = dict(manifest["model.safetensors"].tensors or {})
        assert tensors.pop("model.norm.weight") == "F32 [48]"
        assert {about.split()[0] for about in tensors.values()} == {"BF16"}

    def test_another_dtype_is_not_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pruned, decided = widths(tiny_model())
        write = PreTrainedModel.save_pretrained

        def halved(self: PreTrainedModel, folder: Path, **_: Any) -> None:
            write(self, folder, state_dict={name: tensor.half() for name, tensor in self.state_dict().items()})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", halved)
        with pytest.raises(CheckpointError, match=r"the folder has \S+ as F16, the model as F32"):
            save(pruned, tmp_path / "out", plan=decided)
        assert not (tmp_path / "out").exists()


class TestShards:
    @pytest.mark.parametrize(("shape", "tied"), [("uniform", True), ("per-layer", False)])
    def test_several_files_hold_what_one_does(
        self, shape: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model(tie_word_embeddings=tied)
        decided = widths(model)[1] if shape == "uniform" else uneven(model, ("mlp",))
        pruned = prune(model, decided)
        monkeypatch.setattr(secateur.checkpoint.save, "SHARD", "50KB")
        save(pruned, tmp_path / "out", plan=decided)
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert len(shards) > 3
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert {name: shard.name for shard in shards for name in load_file(shard)} == index
        assert ("lm_head.weight" in index) != tied
        assert verify(tmp_path / "out").problems == ()
        again = load(str(tmp_path / "out"), device="cpu").state_dict()
        assert again.keys() == pruned.state_dict().keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in pruned.state_dict().items())

    def test_a_dense_model_in_several_files_is_cut_as_one(self, tmp_path: Path) -> None:
        write_tiny(tmp_path / "one")
        write_tiny(tmp_path / "many", shard="60KB")
        assert len([*(tmp_path / "many").glob("*.safetensors")]) > 3
        for name in ("one", "many"):
            prune_model(recipe(str(tmp_path / name), cut={**UNIFORM, "ratio": 0.3}), tmp_path / f"{name} cut")
        first, second = (load_file(tmp_path / f"{name} cut" / "model.safetensors") for name in ("one", "many"))
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

    def test_files_settings_and_ids(self, dense: Path, tmp_path: Path) -> None:
        prune_model(recipe(str(dense), cut={**UNIFORM, "axes": ("hidden",), "ratio": 0.34}), tmp_path / "out")
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
        others = ("NOTICE.md", "pytorch_model.bin", "training_args.bin", "run.py", "x.gguf", "optimizer.safetensors")
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

    def test_a_tensor_without_a_place_is_recorded(self, dense: Path, tmp_path: Path) -> None:
        weights = load_file(dense / "model.safetensors")
        weights["visual.patch.weight"] = torch.zeros(3)
        save_file(weights, dense / "model.safetensors", {"format": "pt"})
        prune_model(recipe(str(dense), cut={**UNIFORM, "ratio": 0.3}), tmp_path / "out")
        record = read_record(tmp_path / "out")
        assert record is not None
        assert record.tensors is not None
        assert record.tensors["visual.patch.weight"] == "unplaced"
        assert record.tensors.keys() == weights.keys()
