"""Vision-language models, calibrated with images: scored as autograd would, cut, loaded and shown an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from image_models import TOWER, TYPES, first_prompt, image_folder, noise, write_images
from secateur import CalibrationOptions, CutOptions, PruneRecipe, prune_model, verify
from secateur.cli.main import run
from secateur.data.rows import IGNORED
from secateur.data.windows import calibration_windows
from secateur.models.config import load_config
from secateur.models.inputs import arguments, next_tokens
from secateur.models.media import shows
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.reader import WindowReader
from secateur.scoring.collect_backward import gradient_statistics

LANGUAGE = "model.language_model"
FAST = ("llava", "qwen2_vl")
EVERY = [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in TYPES]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "pictures")


@pytest.mark.parametrize("model_type", EVERY)
def test_gradients_are_autograds_of_the_models_own_loss(model_type: str, pictures: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path, model_type)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    windows = calibration_windows(
        AutoProcessor.from_pretrained(folder), CalibrationOptions((str(pictures),), samples=3, length=72, held_out=1)
    )
    wanted = [name for name, _ in model.named_parameters() if name.startswith(TOWER.get(model_type, LANGUAGE))]
    saliences = {"squared": lambda evidence: evidence.squared}
    found = gradient_statistics(model, windows, saliences, second_order=True, wanted=wanted)
    labels = next_tokens(windows)
    labels = labels.masked_fill(labels < 0, IGNORED)
    count, total, squared = int((labels[:, 1:] >= 0).sum()), 0.0, dict[str, Tensor]()
    used = {name: p for name, p in model.named_parameters() if name in found.sums["squared"]}
    for window_T, labels_T in zip(windows, labels, strict=True):
        given = arguments(model, window_T[None])
        loss = model(**given, labels=labels_T[None]).loss * int((labels_T[1:] >= 0).sum()) * len(windows) / count
        total += float(loss.detach()) / len(windows)
        gradients = torch.autograd.grad(loss, [*used.values()])
        for name, gradient in zip(used, gradients, strict=True):
            squared[name] = squared.get(name, 0) + gradient.square() / len(windows)
    assert found.loss == pytest.approx(total, rel=1e-4)
    assert any("mlp.down_proj" in name for name in used)
    largest = max(float(expected.max()) for expected in squared.values())
    for name, expected in squared.items():
        rows = expected.reshape(len(expected), -1).sum(1)
        assert torch.allclose(found.sums["squared"][name][0], rows, rtol=1e-3, atol=1e-6 * largest), name


@pytest.mark.parametrize("model_type", EVERY)
def test_its_text_is_cut_and_it_reads_an_image(model_type: str, pictures: Path, tmp_path: Path) -> None:
    folder, out = image_folder(tmp_path / "dense", model_type), tmp_path / "out"
    command = ["prune", str(folder), str(out), "--calibration", str(pictures), "--samples", "12", "--length", "96"]
    command += ["--held-out", "4", "--axes", "mlp", "--shape", "uniform", "--of", "units", "--ratio", "0.25", "--quiet"]
    assert run([*command, "--within", TOWER.get(model_type, LANGUAGE)]) == 0
    assert verify(out).problems == ()
    dense, model = (AutoModelForImageTextToText.from_pretrained(each).eval() for each in (folder, out))
    assert model.num_parameters() == dense.num_parameters() - 2 * 3 * 32 * 12  # layers, matrices, width, channels
    processor: Any = AutoProcessor.from_pretrained(out)
    shown = processor(text=[first_prompt(processor)], images=[noise(0)], return_tensors="pt")
    written = model.generate(**shown, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == shown["input_ids"].shape[1] + 4


def test_nothing_is_put_before_a_window_with_an_image(pictures: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "dense", "paligemma")
    calibration = CalibrationOptions((str(pictures),), samples=3, length=72, held_out=1)
    tokenizer, config = load_tokenizer(str(folder)), load_config(str(folder))
    reader = WindowReader(str(folder), config, calibration, lambda: tokenizer)
    reader.begin()
    windows = reader.windows()
    assert torch.equal(reader.as_served(windows), windows)
    assert torch.equal(reader.behind_needed(windows), windows)
    assert shows(reader.held_out(1))


def test_repair_makes_up_for_what_is_lost_on_images(pictures: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "dense", "llava")
    cut = CutOptions(ratio=0.2, of="units", within=LANGUAGE)
    calibration = CalibrationOptions((str(pictures),), samples=12, length=96, held_out=4)
    by_images = prune_model(PruneRecipe(str(folder), cut=cut, calibration=calibration), tmp_path / "out")
    losses = by_images.plan.scored["held_out_loss"]
    assert losses["repaired"] < losses["cut"]
    with_text = CalibrationOptions(samples=12, length=96, held_out=4)
    by_text = prune_model(PruneRecipe(str(folder), cut=cut, calibration=with_text), tmp_path / "by_text")
    assert {g.name: g.keep for g in by_text.plan.groups} != {g.name: g.keep for g in by_images.plan.groups}


def test_the_command_line_says_what_images_need(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", str(tiny), str(tmp_path / "out"), "--calibration", str(pictures), "--samples", "4"]
    assert run([*command, "--quiet"]) == 2
    assert "has images or sound, and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
