"""A recipe is built from a preset, a file and single options; the one in a folder makes the folder again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainings import distance, place_fixture, train  # noqa: F401 - the fixture `place`

from secateur import CalibrationOptions, DataOptions, RecoverRecipe, recover
from secateur.errors import DataError, PlanError, RecipeError
from secateur.planning.options import CutOptions
from secateur.recovery.options import LoraOptions, RecoverOptions
from secateur.recovery.recipe import recover_recipe

FILE = """
command: recover
model: small
preset: llm-pruner
data: {sources: [alpaca.json@2], samples: 100}
options: {learning_rate: 2e-4, lora: {rank: 4}}
cut: {ratio: 0.5}
"""


def test_single_options_go_before_a_file_and_a_file_before_its_preset(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FILE)
    found = recover_recipe(file=tmp_path / "recipe.yaml", options={"epochs": 1.0, "lora": {"dropout": 0.0}})
    assert (found.model, found.data) == ("small", DataOptions(("alpaca.json@2",), "alpaca", "answers", samples=100))
    assert (found.options.epochs, found.options.learning_rate, found.options.warmup_steps) == (1.0, 2e-4, 100)
    assert found.options.lora == LoraOptions(4, 16.0, 0.0)
    assert (found.cut, found.calibration) == (CutOptions(ratio=0.5), CalibrationOptions())
    assert recover_recipe("other", file=tmp_path / "recipe.yaml").model == "other"


def test_single_options_of_the_cut_go_before_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    first = "cut: {target: 100000000, of: parameters, axes: [mlp]}\ncalibration: {samples: 7}"
    file.write_text(f"model: small\ndata: {{sources: [a.json]}}\n{first}\n")
    of_file = recover_recipe(file=file)
    cut, text = of_file.cut, of_file.calibration
    assert cut is not None
    assert text is not None
    assert (cut.target, cut.axes, text.samples) == (100_000_000, ("mlp",), 7)
    changed = recover_recipe(file=file, cut={"ratio": 0.6}, calibration={"length": 32})
    assert (changed.cut, changed.calibration) == (replace(cut, target=None, ratio=0.6), replace(text, length=32))
    whole: dict[str, Any] = {"cut": CutOptions(ratio=0.4), "calibration": CalibrationOptions(samples=9)}
    changed = recover_recipe(file=file, **whole)
    assert (changed.cut, changed.calibration) == (whole["cut"], whole["calibration"])
    alone = recover_recipe("small", cut={"ratio": 0.6})
    assert (alone.cut, alone.calibration) == (CutOptions(ratio=0.6), CalibrationOptions())
    assert alone.data.sources == CalibrationOptions().text  # what is cut by is trained on
    with pytest.raises(PlanError, match="calibration is of a cut, and there is none"):
        recover_recipe("small", calibration={"samples": 8})


def test_one_budget_replaces_another(tmp_path: Path) -> None:
    text = "model: small\ndata: {sources: [a.json]}\noptions: {minutes: 20, epochs: 3}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    found = recover_recipe(file=tmp_path / "recipe.yaml", options={"tokens": 100_000}).options
    assert (found.minutes, found.tokens, found.epochs) == (None, 100_000, RecoverOptions().epochs)
    assert recover_recipe(file=tmp_path / "recipe.yaml", options={"epochs": 2.0}).options.minutes is None
    assert recover_recipe(file=tmp_path / "recipe.yaml", options={"seed": 1}).options.minutes == 20


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("model: small\noptions: {learnin_rate: 1}", RecipeError, "Did you mean learning_rate?"),
        ("model: small\noptions: {method: magic}", RecipeError, "method: 'magic' is no auto or lora"),
        ("command: prune\nmodel: small", RecipeError, "recipe of another command"),
        ("data: {sources: [a.json]}", RecipeError, "no model"),
        ("model: small", DataError, "--data is missing"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, error: type[Exception], match: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(error, match=match):
        recover_recipe(file=tmp_path / "recipe.yaml")


def test_the_recipe_in_a_folder_makes_it_again(place: Path) -> None:
    train(method="lora+distill", max_steps=2, eval_texts=("reference=held.txt",), lora=LoraOptions(4, 8.0, 0.1))
    recipe = recover_recipe(file="here/out/recipe.yaml")
    assert isinstance(recipe, RecoverRecipe)
    recover(recipe, "here/again")
    assert distance("here/out", "here/again") == 0
    assert (place / "out" / "recipe.yaml").read_text() == (place / "again" / "recipe.yaml").read_text()
    assert yaml.safe_load((place / "out" / "recipe.yaml").read_text())["options"]["lora"]["rank"] == 4
