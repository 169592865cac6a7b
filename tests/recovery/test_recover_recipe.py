"""A recipe is built from a preset, a file and single options; the one in a folder makes the folder again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainings import distance, place_fixture, train  # noqa: F401 - the fixture `place`

from secateur import CalibrationOptions, DataOptions, RecoverRecipe, recover
from secateur.errors import DataError, RecipeError
from secateur.planning.options import CutOptions
from secateur.recovery.options import LoraOptions, RecoverOptions
from secateur.recovery.recipe import RoundOptions, recover_recipe

FILE = """
command: recover
model: small
preset: llm-pruner
data: {sources: [alpaca.json@2], samples: 100}
options: {learning_rate: 2e-4, lora: {rank: 4}}
rounds: {count: 2, cut: {ratio: 0.5}}
"""


def test_single_options_go_before_a_file_and_a_file_before_its_preset(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FILE)
    found = recover_recipe(file=tmp_path / "recipe.yaml", options={"epochs": 1.0, "lora": {"dropout": 0.0}})
    assert (found.model, found.data) == ("small", DataOptions(("alpaca.json@2",), "alpaca", "answers", samples=100))
    assert (found.options.epochs, found.options.learning_rate, found.options.warmup_steps) == (1.0, 2e-4, 100)
    assert found.options.lora == LoraOptions(4, 16.0, 0.0)
    assert found.rounds == RoundOptions(2, CutOptions(ratio=0.5))
    assert recover_recipe("other", file=tmp_path / "recipe.yaml").model == "other"


def test_single_options_of_rounds_go_before_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for_rounds = "rounds: {count: 3, cut: {target: 100000000, of: parameters, axes: [mlp]}, calibration: {samples: 7}}"
    file.write_text(f"model: small\ndata: {{sources: [a.json]}}\n{for_rounds}\n")
    whole = recover_recipe(file=file).rounds
    assert whole is not None
    assert (whole.count, whole.cut.target, whole.cut.axes, whole.calibration.samples) == (3, 100_000_000, ("mlp",), 7)
    cut = replace(whole.cut, target=None, ratio=0.6)
    assert recover_recipe(file=file, rounds={"count": 5}).rounds == replace(whole, count=5)
    assert recover_recipe(file=file, rounds={"cut": {"ratio": 0.6}}).rounds == replace(whole, cut=cut)
    given: dict[str, Any] = {"cut": CutOptions(ratio=0.6), "calibration": {"samples": 8}}
    for_cut, other = replace(whole.calibration, samples=8), CalibrationOptions(samples=9)
    assert recover_recipe(file=file, rounds=given).rounds == RoundOptions(3, given["cut"], for_cut)
    given = {"cut": {"ratio": 0.6}, "calibration": other}
    assert recover_recipe(file=file, rounds=given).rounds == RoundOptions(3, cut, other)
    alone = recover_recipe("small", data={"sources": ("a.json",)}, rounds={"cut": {"ratio": 0.6}}).rounds
    assert alone == RoundOptions(1, CutOptions(ratio=0.6))


def test_empty_rounds_of_a_file_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: small\ndata: {sources: [a.json]}\nrounds: {}\n")
    assert recover_recipe(file=tmp_path / "recipe.yaml").rounds == RoundOptions()


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
