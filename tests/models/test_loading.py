"""A model loads whole and exactly, or an error says what its checkpoint lacks."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import secateur.models.loading
from model_folders import DOWN, edit_config, edit_weights, fails, logits, tiny_config
from secateur.models.config import load_config
from secateur.models.loading import DTYPES, load, skeleton
from secateur.models.sources import Source
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer
from secateur.progress import peak_rss

PEAK = Path("/proc/self/clear_refs")  # of Linux: 5 starts the peak of memory again


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


class TestLoad:
    def test_layers_run_their_own_code(self, plain_folder: Path) -> None:
        """None that is fetched from the hub, as transformers does on a GPU by default since 5.25."""
        assert not load(str(plain_folder), device="cpu").use_kernels

    @pytest.mark.parametrize("kind", ["plain_folder", "sharded_folder"])
    def test_the_same_model_comes_back(
        self, kind: str, plain_model: PreTrainedModel, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = request.getfixturevalue(kind)
        capfd.readouterr()
        model = load(str(path), device="cpu")
        assert capfd.readouterr() == ("", "")
        assert torch.equal(logits(model), logits(plain_model))
        assert not model.training

    @pytest.mark.parametrize("dtype", [*DTYPES, *DTYPES.values()])
    def test_the_dtype_asked_for(self, dtype: str | torch.dtype, plain_folder: Path) -> None:
        model = load(str(plain_folder), dtype=dtype, device="cpu")
        assert {p.dtype for p in model.parameters()} == {DTYPES.get(str(dtype), dtype)}

    def test_the_dtype_of_the_checkpoint(self, plain_model: PreTrainedModel, tmp_path: Path) -> None:
        copy.deepcopy(plain_model).bfloat16().save_pretrained(tmp_path)
        assert load(str(tmp_path), device="cpu").dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", ["int8", "fp16", "nn", torch.int8])
    def test_an_unknown_dtype(self, dtype: str | torch.dtype, plain_folder: Path) -> None:
        with fails(f"dtype={str(dtype)!r} is unknown. Expected auto, float32, bfloat16, float16 or float64"):
            load(str(plain_folder), dtype=dtype)

    @pytest.mark.parametrize(
        ("device", "match"),
        [
            ("gpu", "device 'gpu' is unknown. Expected auto, cpu, cuda, cuda:N, balanced or streamed"),
            ("meta", "device 'meta' is not supported. Expected auto"),
            ("balanced", "device 'balanced' is for several GPUs; torch sees"),
            ("cuda:99", "device 'cuda:99' does not exist; torch sees"),
        ],
    )
    def test_an_unknown_device(self, device: str, match: str, plain_folder: Path) -> None:
        with fails(match):
            load(str(plain_folder), device=device)

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

    def test_auto_takes_the_gpu_if_there_is_one(self, plain_folder: Path) -> None:
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert {p.device.type for p in load(str(plain_folder)).parameters()} == {expected}

    @pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
    def test_from_the_cache_of_the_hub(
        self,
        weights: str,
        plain_folder: Path,
        plain_model: PreTrainedModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--organisation--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot = shutil.copytree(plain_folder, repository / "snapshots" / ("0" * 40))
        if weights == "model.safetensors":
            assert torch.equal(logits(load("organisation/tiny", device="cpu")), logits(plain_model))
        else:
            (snapshot / "model.safetensors").unlink()
            torch.save(plain_model.state_dict(), snapshot / weights)
            with fails("'organisation/tiny': its weights cannot be loaded; OSError:"):
                load("organisation/tiny")

    @pytest.mark.skipif(not PEAK.exists(), reason="only Linux can start the peak of memory again")
    @pytest.mark.parametrize("settings", [{"vocab_size": 10**9}, {"intermediate_size": 10**10}, {"hidden_size": 10**8}])
    def test_sizes_for_which_no_memory_is_enough(self, settings: dict[str, int], plain_folder: Path) -> None:
        """What the weights lack is told before any memory is asked for."""
        edit_config(plain_folder, **settings)
        PEAK.write_text("5")
        before = peak_rss()
        with fails("the checkpoint has another shape for "):
            load(str(plain_folder), device="cpu")
        assert peak_rss() - before < 200 * 2**20

    @pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts", "n_layers"])
    def test_more_layers_than_any_model_has(self, name: str, plain_folder: Path) -> None:
        edit_config(plain_folder, **{name: 10**9})
        for function in (load_config, load):
            with fails(f"its config cannot be read; ValueError: {name}=1000000000, and no model has more than 10000"):
                function(str(plain_folder))

    @pytest.mark.parametrize(
        ("lost", "named"),
        [
            ([DOWN], f"lacks {DOWN}. Expected"),
            ([f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("up", "gate")], "and 1 more. Expected"),
        ],
    )
    def test_no_layer_is_ever_random(self, lost: list[str], named: str, plain_folder: Path) -> None:
        edit_weights(plain_folder, lambda weights: [weights.pop(name) for name in lost])
        with fails(named):
            load(str(plain_folder))

    def test_more_layers_in_the_config_than_in_the_weights(self, plain_folder: Path) -> None:
        edit_config(plain_folder, num_hidden_layers=3)
        with fails("the checkpoint lacks model.layers.2.input_layernorm.weight, "):
            load(str(plain_folder))

    def test_a_tensor_of_another_shape(self, plain_folder: Path) -> None:
        edit_weights(plain_folder, lambda weights: weights.update({DOWN: torch.zeros(16, 20)}))
        with fails(f"another shape for {DOWN} ((16, 20), expected (16, 24)). Expected every weight"):
            load(str(plain_folder))

    def test_a_problem_that_only_a_message_tells(self) -> None:
        report = {"missing_keys": set(), "mismatched_keys": set(), "error_msgs": ["cannot merge experts"]}
        with fails("the checkpoint cannot be converted: cannot merge experts. Expected every weight"):
            secateur.models.loading._check_report(Source("x", "hub", None), report)

    def test_a_leftover_tensor_is_told(self, plain_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        edit_config(plain_folder, num_hidden_layers=1)
        with caplog.at_level(logging.WARNING, logger="secateur"):
            load(str(plain_folder))
        assert "the model has no place for model.layers.1.input_layernorm.weight, " in caplog.text

    def test_tied_embeddings_stay_tied(self, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
        model = load(str(tmp_path), device="cpu")
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.demo_model
class TestDemo:
    def test_nothing_remembers_that_it_was_quantized(
        self, demo_model: PreTrainedModel, demo_config: PreTrainedConfig
    ) -> None:
        assert not hasattr(demo_config, "quantization_config")
        assert not hasattr(demo_model.config, "quantization_config")
        assert not getattr(demo_model, "is_quantized", False)
        assert not hasattr(demo_model, "hf_quantizer")
        assert demo_model.dtype == torch.float32
        assert not demo_model.training
        check_finite(demo_model)

    def test_its_skeleton_has_its_shapes(self, demo_model: PreTrainedModel, demo_config: PreTrainedConfig) -> None:
        shapes = {name: p.shape for name, p in skeleton(demo_config).named_parameters()}
        assert shapes == {name: p.shape for name, p in demo_model.named_parameters()}

    def test_saved_and_loaded_by_transformers_it_is_the_same(self, demo_model: PreTrainedModel, tmp_path: Path) -> None:
        demo_model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(demo_model))
        assert again.config.to_dict().keys() == demo_model.config.to_dict().keys()

    @pytest.mark.slow
    def test_loading_it_is_silent(self, capfd: pytest.CaptureFixture[str]) -> None:
        load("demo", dtype="bfloat16", device="cpu")
        load_tokenizer("demo")
        assert capfd.readouterr() == ("", "")
