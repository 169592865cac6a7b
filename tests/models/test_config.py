"""A config is read or refused in one line, and what it says of its model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    PreTrainedModel,
)

from model_folders import edit_config, fails, logits
from secateur.data.calibration import CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.errors import DataError, UntrustedCodeError
from secateur.models.config import check_positions, load_config
from secateur.models.loading import load, skeleton
from secateur.models.tokenizer import load_tokenizer
from secateur.scoring.scores import score
from tiny import tiny_model, tiny_tokenizer


class TestConfig:
    def test_from_a_folder_and_from_a_file(self, plain_folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.json"
        shutil.copy(plain_folder / "config.json", other)
        for model in (plain_folder, plain_folder / "config.json", other):
            assert load_config(str(model)).intermediate_size == 24

    def test_an_encoder_that_can_be_a_causal_model(self, tmp_path: Path) -> None:
        AutoConfig.for_model("bert").save_pretrained(tmp_path)
        assert load_config(str(tmp_path)).model_type == "bert"

    def test_a_type_of_no_auto_class(self, tmp_path: Path) -> None:
        AutoConfig.for_model("colpali").save_pretrained(tmp_path)
        with fails(f"{str(tmp_path)!r}: no model of type 'colpali' is known. Expected one that AutoModelForCausalLM"):
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

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            ("no-such-model", "it is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or name a local file or"),
            ("no/such-model", "no file or folder here has that name; it is not in the cache"),
            ("no such model", "Check the name and the network, or use a local folder or 'demo'."),
        ],
    )
    def test_an_unknown_hub_name_is_one_line(self, model: str, match: str, capfd: pytest.CaptureFixture[str]) -> None:
        for function in (load_config, load, load_tokenizer):
            with fails(match):
                function(model)
        assert capfd.readouterr() == ("", "")

    def test_code_beside_the_model_runs_only_when_trusted(
        self, plain_model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        folder = tmp_path / "own"
        plain_model.save_pretrained(folder)
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
        assert torch.equal(logits(load(str(folder), device="cpu", trust_remote_code=True)), logits(plain_model))


class TestPositions:
    @given(st.integers(1, 40), st.integers(1, 40))
    def test_a_sample_must_fit(self, positions: int, length: int) -> None:
        config = AutoConfig.for_model("opt", max_position_embeddings=positions)
        if length <= positions:
            check_positions(config, length)
            return
        match = rf"^length={length} is longer than the model's {positions} positions.*length={positions} "
        with pytest.raises(DataError, match=match):
            check_positions(config, length)

    def test_names_and_limits_of_families(self) -> None:
        check_positions(AutoConfig.for_model("bloom"), 10**9)  # has no such setting
        check_positions(AutoConfig.for_model("xlnet"), 10**9)  # says -1: no limit
        with pytest.raises(DataError, match="the model's 7 positions"):
            check_positions(AutoConfig.for_model("gpt2", n_positions=7), 8)

    def test_before_any_pass(self) -> None:
        model = tiny_model(max_position_embeddings=16)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
        options = CalibrationOptions("self", samples=2, length=17)
        for attempt in (
            lambda: generate_windows(model, options),
            lambda: score(model, calibration=options),
            lambda: score(model, windows=torch.zeros(2, 17, dtype=torch.int64)),
            lambda: score(model, tiny_tokenizer(), calibration=replace(options, text="demo")),
        ):
            with pytest.raises(DataError, match="length=17 is longer than the model's 16 positions"):
                attempt()
