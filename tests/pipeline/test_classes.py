"""Models of every class, pruned end to end: the folder loads with its auto class and is the model that was pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from class_models import ARCHITECTURES, VOCABULARY, class_folder, class_tokenizer, randomized
from every_type import tiny_config
from secateur import CutOptions, PruneRecipe, discover, load, prune_model, verify
from secateur.cli.main import run
from secateur.data.calibration import CalibrationOptions
from secateur.errors import DataError, PlanError
from secateur.models.classes import auto_class
from secateur.models.inputs import arguments, predicted
from secateur.models.silence import quiet
from secateur.pipeline.run import plan_model

CALIBRATION = CalibrationOptions(samples=8, length=32)
UNIFORM: dict[str, Any] = {"ratio": 0.2, "shape": "uniform", "axes": ("mlp",)}
IDS = torch.randint(5, 30, (2, 12), generator=torch.Generator().manual_seed(0))


def stock(folder: Path, architecture: str) -> PreTrainedModel:
    """The model of a folder by the auto class of an architecture."""
    config = transformers.CONFIG_MAPPING[ARCHITECTURES[architecture][0]]
    loader = getattr(transformers, auto_class(getattr(transformers, architecture), config) or "")
    model: PreTrainedModel = loader.from_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "architecture",
    [
        "BertModel",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("BertForMaskedLM", "BertForSequenceClassification", "T5ForConditionalGeneration")
        ),
    ],
)
def test_a_model_that_reads_text(architecture: str, tmp_path: Path) -> None:
    folder, out = class_folder(tmp_path / "dense", architecture), tmp_path / "out"
    pruned = prune_model(PruneRecipe(str(folder), cut=CutOptions(**UNIFORM), calibration=CALIBRATION), out)
    losses = pruned.plan.scored["held_out_loss"]
    if not architecture.startswith(("BertForMasked", "T5")):  # compared with the dense model, not with random text
        assert losses["repaired"] < losses["cut"]
    assert verify(out).problems == ()
    model, dense = stock(out, architecture), stock(folder, architecture)
    assert type(model) is type(dense) is type(load(str(out)))
    assert model.num_parameters() < dense.num_parameters()
    with torch.no_grad():
        before, after = (predicted(each(**arguments(each, IDS))) for each in (dense, model))
    assert before.shape == after.shape
    assert 0 < float((before - after).square().mean() / before.square().mean()) < 1


@pytest.mark.slow
def test_a_model_that_reads_sound_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = class_folder(tmp_path / "dense", "WhisperForConditionalGeneration"), tmp_path / "out"
    with pytest.raises(DataError, match=r"reads input_features, and calibration gives it text: use a score of weights"):
        prune_model(PruneRecipe(str(folder)), out)
    command = ["prune", str(folder), str(out), "--score", "l2", "--repair", "none", "--shape", "uniform", "--quiet"]
    assert run([*command, "--axes", "mlp", "--ratio", "0.1"]) == 0
    model = stock(out, "WhisperForConditionalGeneration")
    assert model.config.encoder_ffn_dim < 32
    sound = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    written = model.generate(input_features=sound, max_new_tokens=4)  # type: ignore[operator]  # of a base class
    assert written.shape[0] == 1


REGISTERS = """
import torch
import secateur

@secateur.register_inputs("idefics")
def inputs(config, samples, tokens):
    ids_BT = torch.arange(samples * tokens).reshape(samples, tokens) % config.vocab_size
    pixels = torch.zeros(samples, 1, 3, *2 * [config.vision_config.image_size])
    seen = torch.ones(samples, tokens, 1, dtype=torch.int64)
    return {"input_ids": ids_BT, "attention_mask": seen[..., 0], "pixel_values": pixels, "image_attention_mask": seen}
"""


def test_inputs_that_cannot_be_found_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: dict[str, Any] = {}
    monkeypatch.setattr("secateur.models.inputs.INPUTS", registered)
    (file := tmp_path / "inputs.py").write_text(REGISTERS)
    folder, out = tmp_path / "dense", tmp_path / "out"
    with quiet():
        config = tiny_config("AutoModelForImageTextToText/idefics")
        config.vocab_size, config.architectures = VOCABULARY, ["IdeficsForVisionText2Text"]
        dense = randomized(transformers.IdeficsForVisionText2Text._from_config(config).eval())
        dense.save_pretrained(folder)
    class_tokenizer().save_pretrained(folder)

    assert run(["discover", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "has to be not-None" in said
    assert "--inputs FILE" in said
    text = ["--samples", "8", "--length", "32", "--axes", "mlp", "--quiet"]
    assert run(["prune", str(folder), str(out), "--inputs", str(file), *text]) == 0
    assert run(["profile", str(folder), str(out), "--inputs", str(file)]) == 0
    assert "MACs" in capsys.readouterr().out
    model = load(str(out))
    smaller = json.loads((out / "secateur_plan.json").read_text())["scored"]["held_out_loss"]
    assert model.num_parameters() < dense.num_parameters()
    assert smaller["cut"] != smaller["before"]
    with torch.no_grad():
        given = registered["idefics"](config, *IDS.shape)
        read = arguments(dense, IDS)
        assert torch.equal(read["input_ids"], IDS)
        assert torch.equal(read["pixel_values"], given["pixel_values"])
        assert predicted(model(**arguments(model, IDS))).shape == predicted(dense(**read)).shape

    registered["idefics"] = lambda config, samples, tokens: {"input_ids": [0] * tokens}
    with pytest.raises(DataError, match=r"inputs of 'idefics': 'input_ids' is a list. Expected tensors by argument"):
        discover(dense)
    registered["idefics"] = lambda config, samples: {}
    with pytest.raises(DataError, match=r"inputs of 'idefics': TypeError: .* takes 2 positional arguments but 3"):
        discover(dense)


def test_within_cuts_one_part_alone(tmp_path: Path) -> None:
    folder = class_folder(tmp_path, "T5ForConditionalGeneration")
    options = CutOptions(ratio=0.1, of="units", axes=("mlp",), within="encoder")
    planned = plan_model(PruneRecipe(str(folder), cut=options), sizes_only=True)
    assert [group.name for group in planned.groups if group.kept < group.units] == ["layers.0.mlp.0", "layers.1.mlp.0"]
    options = CutOptions(axes=("mlp",), within="vision_tower")
    with pytest.raises(PlanError, match=r"within=vision_tower: .* has no weights there; it has them in decoder, "):
        plan_model(PruneRecipe(str(folder), cut=options), sizes_only=True)


@pytest.mark.parametrize("command", ["evaluate", "recover", "compare", "sweep"])
def test_what_is_for_models_that_continue_a_text(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(class_folder(tmp_path / "dense", "BertModel"))
    arguments = {
        "recover": [folder, str(tmp_path / "out"), "--data", "demo"],
        "compare": [folder, folder],
        "sweep": [folder, "--ratios", "0.2", "--ppl", f"text={__file__}", "--run", str(tmp_path / "run")],
    }
    assert run([command, *arguments.get(command, [folder])]) == 2
    said = capsys.readouterr().err
    assert f"is a BertModel, which continues no text, and {command} is for models that do" in said
