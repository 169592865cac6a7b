"""Scores name what is wrong with a model or a call, and survive a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur import CalibrationOptions, discover, score
from secateur.errors import ScoreError
from secateur.scoring.scores import load_scores, save_scores, scores_from, statistics_for

WINDOWS = torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model() -> PreTrainedModel:
    return family_model(family_config("llama", num_hidden_layers=2), dtype=torch.float32)


def test_scores_survive_a_file(model: PreTrainedModel, tmp_path: Path) -> None:
    found = score(model, windows=WINDOWS, name="param_mix", calibration=CalibrationOptions(seed=3))
    save_scores(tmp_path / "scores.safetensors", found)
    loaded = load_scores(tmp_path / "scores.safetensors")
    assert (loaded.score, loaded.reduce, loaded.seed) == ("param_mix", "sum", 3)
    assert (loaded.calibration, loaded.loss, loaded.options) == (found.calibration, found.loss, found.options)
    assert loaded.units.keys() == found.units.keys()
    assert all(torch.equal(units, found.units[name]) for name, units in loaded.units.items())


def test_scores_say_where_their_windows_came_from_only_where_they_know(model: PreTrainedModel) -> None:
    discovery = discover(model)
    statistics = statistics_for("param_first", model, discovery, WINDOWS)
    assert scores_from(discovery, statistics, name="param_first").options is None
    options = CalibrationOptions(seed=5)
    found = scores_from(discovery, statistics, name="param_first", reduce="max", options=options)
    assert (found.options, found.seed, found.reduce) == (options, 5, "max")
    with pytest.raises(ScoreError, match="reduce='maximum' is unknown"):
        scores_from(discovery, statistics, name="param_first", reduce="maximum")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(model: PreTrainedModel, bad: float) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = bad
    expected = r"weight model\.layers\.1\.mlp\.up_proj\.weight has 1 values that are NaN or Inf"
    with pytest.raises(ScoreError, match=expected):
        score(model, name="l1")


def test_a_loss_that_is_not_finite_is_an_error(model: PreTrainedModel) -> None:
    model.get_parameter("model.norm.weight").data[0] = math.inf
    with pytest.raises(ScoreError, match=r"the loss on the calibration text is (nan|inf): .*float32 or bfloat16"):
        score(model, windows=WINDOWS)


@pytest.mark.parametrize("name", ["param_first", "fisher"])
def test_gradients_that_are_all_zero_are_an_error(model: PreTrainedModel, name: str) -> None:
    for zero in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        model.get_parameter(zero).data.zero_()
    with pytest.raises(ScoreError, match=r"all gradients are zero \(loss 4\.\d+\)"):
        score(model, windows=WINDOWS, name=name)


def test_gradient_scores_need_text(model: PreTrainedModel) -> None:
    with pytest.raises(ScoreError, match="score fisher needs calibration text: give a tokenizer, or windows"):
        score(model)


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.safetensors").write_bytes(b"no")
    for name in ("scores.safetensors", "missing.safetensors"):
        with pytest.raises(ScoreError, match="holds no scores"):
            load_scores(tmp_path / name)
