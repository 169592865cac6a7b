"""Files of weights are all there, whole and in the folder, or an error says which is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
)

from model_folders import edit_config, fails, logits, tiny_config
from secateur.models.loading import load
from secateur.models.weight_files import has_weights


class TestHasWeights:
    @pytest.mark.parametrize(
        "name", ["model.safetensors", "model.safetensors.index.json", "x.gguf", "pytorch_model.bin"]
    )
    def test_any_file_of_weights_counts(self, name: str, tmp_path: Path) -> None:
        tiny_config().save_pretrained(tmp_path)
        assert not has_weights(str(tmp_path))
        (tmp_path / name).touch()
        assert has_weights(str(tmp_path))
        assert not has_weights(str(tmp_path / "config.json"))

    def test_a_hub_name(self) -> None:
        assert has_weights("organisation/model")


class TestWeightFiles:
    def test_a_config_alone(self, plain_folder: Path) -> None:
        with fails("a config file holds no weights. Name the folder that has them"):
            load(str(plain_folder / "config.json"))
        (plain_folder / "model.safetensors").unlink()
        with fails(f"{str(plain_folder)!r}: the folder has a config.json but no weights; expected model.safetensors"):
            load(str(plain_folder))

    def test_only_a_gguf_in_the_folder(self, plain_folder: Path) -> None:
        (plain_folder / "model.safetensors").rename(plain_folder / "x.gguf")
        with fails(f"the folder has no safetensors. Name the GGUF file itself: {str(plain_folder / 'x.gguf')!r}."):
            load(str(plain_folder))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
    def test_a_pickle_is_never_read(self, name: str, plain_folder: Path) -> None:
        (plain_folder / "model.safetensors").rename(plain_folder / name)
        with fails(f"convert it: AutoModelForCausalLM.from_pretrained({str(plain_folder)!r}).save_pretrained(OUT)"):
            load(str(plain_folder))

    def test_a_pickle_beside_safetensors_is_ignored(self, plain_folder: Path) -> None:
        (plain_folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
        load(str(plain_folder))

    def test_safetensors_of_another_name(self, plain_folder: Path) -> None:
        (plain_folder / "model.safetensors").rename(plain_folder / "other.safetensors")
        with fails("its weights cannot be loaded; OSError:"):
            load(str(plain_folder))

    def test_a_missing_shard(self, sharded_folder: Path) -> None:
        shard = sorted(sharded_folder.glob("*.safetensors"))[1]
        shard.unlink()
        with fails(f"{str(sharded_folder)!r}: the shard {shard.name} is missing, one of the "):
            load(str(sharded_folder))

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
    def test_a_broken_index(self, text: str, sharded_folder: Path) -> None:
        (sharded_folder / "model.safetensors.index.json").write_text(text)
        with fails("model.safetensors.index.json cannot be read; "):
            load(str(sharded_folder))

    @pytest.mark.parametrize(
        "name",
        ["../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "config.json", "", ".."],
    )
    def test_an_index_that_leads_elsewhere(self, name: str, sharded_folder: Path) -> None:
        index = sharded_folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        shutil.copy(sorted(sharded_folder.glob("*.safetensors"))[0], sharded_folder.parent / "x.safetensors")
        data["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(data))
        with fails(
            f"index.json names {name!r} as a file of weights; expected the name of a .safetensors file that lies"
        ):
            load(str(sharded_folder), device="cpu")

    @pytest.mark.parametrize("name", ["../x.safetensors", "adapter_model.bin", "pytorch_model.bin", 3, ["x"]])
    def test_a_config_that_leads_elsewhere(self, name: Any, plain_folder: Path) -> None:
        shutil.copy(plain_folder / "model.safetensors", plain_folder.parent / "x.safetensors")
        edit_config(plain_folder, transformers_weights=name)
        with fails("config.json, transformers_weights names "):
            load(str(plain_folder), device="cpu")

    def test_a_config_that_names_its_weights(self, plain_folder: Path, plain_model: PreTrainedModel) -> None:
        (plain_folder / "model.safetensors").rename(plain_folder / "own.safetensors")
        edit_config(plain_folder, transformers_weights="own.safetensors")
        assert torch.equal(logits(load(str(plain_folder), device="cpu")), logits(plain_model))

    def test_links_are_followed(self, sharded_folder: Path, plain_model: PreTrainedModel) -> None:
        """The cache of the hub is made of links out of the folder."""
        blobs = sharded_folder.parent / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(sharded_folder.iterdir())):
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))
        assert torch.equal(logits(load(str(sharded_folder), device="cpu")), logits(plain_model))

    def test_a_tensor_in_two_shards(self, sharded_folder: Path) -> None:
        first, second = sorted(sharded_folder.glob("*.safetensors"))[:2]
        weights = {**load_file(first), **load_file(second)}
        save_file(weights, second, {"format": "pt"})
        with fails(f" lies in {first.name} and in {second.name}; expected one of it"):
            load(str(sharded_folder), device="cpu")

    def test_an_entry_that_stands_twice(self, sharded_folder: Path) -> None:
        index = sharded_folder / "model.safetensors.index.json"
        index.write_text(
            index.read_text().replace('"lm_head.weight"', '"lm_head.weight": "x.safetensors", "lm_head.weight"')
        )
        with fails("index.json cannot be read; the key 'lm_head.weight' stands twice in one object."):
            load(str(sharded_folder), device="cpu")

    def test_an_adapter_beside_the_config(self, plain_folder: Path) -> None:
        (plain_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../../other"}')
        with fails("adapter_config.json lies beside the config, and loaders would read an adapter, too, or the model"):
            load(str(plain_folder), device="cpu")

    @pytest.mark.parametrize("kind", ["plain_folder", "sharded_folder"])
    @pytest.mark.parametrize("size", [0, 4, 20, -1])
    def test_a_truncated_file(self, kind: str, size: int, request: pytest.FixtureRequest) -> None:
        path: Path = request.getfixturevalue(kind)
        file = sorted(path.glob("*.safetensors"))[-1]
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)
        with fails(f"{file.name} is truncated or not a safetensors file"):
            load(str(path))
