"""A dense model is cut and trained by one command, as two would; a killed run resumes where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import (
    FLOAT32,
    KILLING,
    counted_steps,
    distance,
    interrupt,
    interrupted_at,
    options,
    place_fixture,  # noqa: F401 - the fixture `place`
    shelf,
    weights,
)

from launching import launch
from recipes import recipe
from secateur import (
    CalibrationOptions,
    DataOptions,
    SecateurError,
    load,
    prune_model,
    recover,
    verify,
)
from secateur.checkpoint.record import read_record
from secateur.errors import CheckpointError, ModelError, PlanError, TrainingError
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.planning.plan import read_plan
from secateur.recovery.recipe import RecoverRecipe, recover_recipe
from secateur.recovery.result import RecoverResult
from tiny import names

MODULE = sys.modules["secateur.recovery.cut_and_train"]
CALIBRATION = CalibrationOptions("text.txt", 4, 16)
DATA = DataOptions(("rows.json",), max_length=128)
RESUME = RunOptions(resume=True)


def cut_and_trained(
    out: str | Path = "here/out",
    *,
    cut: dict[str, Any] | None = None,
    model: str = "dense",
    run: RunOptions | None = None,
    loading: LoadOptions = FLOAT32,
    **given: Any,
) -> RecoverResult:
    """Eight steps, with an evaluation after every second, unless other options are given."""
    first = recipe(model, cut={"ratio": 0.3} if cut is None else cut).cut
    training = options(**{"max_steps": 8, **given})
    whole = RecoverRecipe(model, DATA, training, cut=first, calibration=CALIBRATION, loading=loading)
    return recover(whole, out, run=run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RecoverResult:
    """A run that nothing stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf())
        return cut_and_trained(tmp_path_factory.mktemp("whole") / "out", **GIVEN)


class TestResult:
    @pytest.mark.parametrize(
        ("shape", "method"),
        [("per-layer", "lora+distill"), pytest.param("uniform", "distill", marks=pytest.mark.slow)],
    )
    def test_it_is_to_prune_and_then_to_recover(self, shape: str, method: str, place: Path) -> None:
        cut = {"ratio": 0.3, "shape": shape}
        command = RunOptions(command="secateur prune ...")
        found = cut_and_trained(cut=cut, method=method, run=command)
        prune_model(recipe("dense", cut=cut, calibration=CALIBRATION, loading=FLOAT32), "here/pruned", run=command)
        training = RecoverRecipe("here/pruned", DATA, options(method=method, max_steps=8), loading=FLOAT32)
        expected = recover(training, "here/expected", run=command)
        assert distance("here/out", "here/expected") == 0
        assert read_plan(place / "out/secateur_plan.json") == read_plan(place / "expected/secateur_plan.json")
        assert (found.loss, found.tokens, found.best_step) == (expected.loss, expected.tokens, expected.best_step)
        assert names(place / "out") == names(place / "expected")
        first, second = (read_record(place / name) for name in ("out", "expected"))
        assert first is not None
        assert second is not None
        assert first.model == "dense"
        same = {each.name for each in fields(first)} - {"created", "recovery"}
        assert {key: getattr(first, key) for key in same} == {key: getattr(second, key) for key in same}
        assert first.recovery == second.recovery
        assert verify("here/out").problems == ()
        assert {"prune", "teacher", "train", "save"} <= found.seconds.keys()

    def test_the_recipe_in_the_folder_makes_it_again(self, whole: RecoverResult, place: Path) -> None:
        made = recover_recipe(file=whole.out / "recipe.yaml")
        assert (made.model, made.cut, made.calibration) == (
            "dense",
            recipe("dense", cut={"ratio": 0.3}).cut,
            CALIBRATION,
        )
        recover(made, "here/out")
        check_same(whole, place)

    @pytest.mark.slow
    @pytest.mark.parametrize(("axes", "ratio", "width", "depth"), [("hidden", 0.4, 29, 3), ("layers", 0.67, 48, 1)])
    def test_hidden_size_and_layers_and_what_is_left_once_more(
        self, axes: str, ratio: float, width: int, depth: int, place: Path
    ) -> None:
        cut_and_trained(cut={"ratio": ratio, "axes": (axes,), "of": "units"}, max_steps=2, method="distill")
        model = load("here/out", device="cpu")
        assert model.get_parameter("model.embed_tokens.weight").shape[1] == width
        assert model.config.num_hidden_layers == depth
        assert verify("here/out").problems == ()
        cut_and_trained("here/again", model="here/out", cut={"ratio": 0.2}, max_steps=1, method="full")
        assert verify("here/again").problems == ()
        assert load("here/again", device="cpu").num_parameters() < model.num_parameters()


def check_same(whole: RecoverResult, place: Path) -> None:
    assert distance("here/out", whole.out) == 0
    assert read_plan(place / "out/secateur_plan.json") == read_plan(whole.out / "secateur_plan.json")
    assert [name for name in names(place) if "/" not in name] == ["out"]


GIVEN: dict[str, Any] = {"method": "lora+distill", "plot": True}


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("step", [7, 3])
    def test_stopped_in_the_training_it_goes_on_to_the_same_weights(
        self, step: int, whole: RecoverResult, place: Path
    ) -> None:
        with interrupted_at(step):
            cut_and_trained(**GIVEN)
        with counted_steps() as steps, pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, "prune_model", None)  # it is not cut again
            resumed = cut_and_trained(**GIVEN, run=RESUME)
        assert len(steps) == 8 - step // 2 * 2  # evaluations, which are checkpoints, come every second step
        assert resumed.resumed
        check_same(whole, place)

    @pytest.mark.parametrize("where", ["prune_model", "train_folder"])
    def test_stopped_before_a_stage_it_goes_on_to_the_same_weights(
        self, where: str, whole: RecoverResult, place: Path
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                cut_and_trained(**GIVEN)
        cut_and_trained(**GIVEN, run=RESUME)
        check_same(whole, place)

    @pytest.mark.slow
    @pytest.mark.parametrize("other", [{"learning_rate": 1e-3}, {"cut": {"ratio": 0.4}}])
    def test_with_other_options_it_starts_anew(self, other: dict[str, Any], whole: RecoverResult, place: Path) -> None:
        with interrupted_at(3):
            cut_and_trained(**{**GIVEN, **other})
        assert not cut_and_trained(**GIVEN, run=RESUME).resumed
        check_same(whole, place)

    @pytest.mark.slow
    def test_killed_at_random_moments_it_goes_on_to_the_same_weights(self, place: Path) -> None:
        arguments = "prune dense here/out --ratio 0.4 --calibration text.txt --samples 4 --length 16 --dtype float32"
        arguments += " --device cpu --quiet --recover"
        training = "data=rows.json,max_length=128,max_steps=8,eval_steps=2,learning_rate=3e-3,global_batch_size=8"
        start = time.monotonic()
        whole = [*arguments.replace("here/out", "here/whole").split(), training]
        subprocess.run([sys.executable, "-c", KILLING, "0", "1", *whole], check=True, capture_output=True)
        early = (time.monotonic() - start) / 4
        command = [sys.executable, "-c", KILLING, "5", str(early), *arguments.split(), training]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 3
        assert distance("here/out", "here/whole") <= 1e-6
        assert [name for name in names(place) if "/" not in name] == ["out", "whole"]


@pytest.mark.slow
def test_two_processes_do_as_one_does(place: Path) -> None:
    # float64 and a low rate: processes sum in another order, and no rounding may make another unit the cheaper one.
    arguments = "prune dense here/out --ratio 0.3 --calibration text.txt --samples 4 --length 16 --dtype float64"
    arguments += " --device cpu --json here.json --recover"
    training = "data=rows.json,max_length=128,max_steps=8,eval_steps=2,learning_rate=1e-5,global_batch_size=8"
    done = launch("-m", "secateur", *arguments.split(), f"{training},method=distill")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote here/out") == 1
    float64 = LoadOptions(dtype="float64", device="cpu")
    alone = cut_and_trained("here/alone", method="distill", learning_rate=1e-5, loading=float64)
    data = json.loads(Path("here.json").read_text())
    assert [loss for _, loss in data["loss"]] == pytest.approx([loss for _, loss in alone.loss], rel=1e-3)
    first, second = (weights(place / name) for name in ("out", "alone"))
    assert {name: weight.shape for name, weight in first.items()} == {n: w.shape for n, w in second.items()}
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"cut": {"ratio": 0.99}}, PlanError, r"ratio=0.99 leaves .* at most ratio="),
        ({"cut": {"ratio": 0.001}}, PlanError, "removes no unit"),
        (
            {"cut": {"axes": ("mlp", "vocabulary"), "of": "parameters"}},
            PlanError,
            "a vocabulary is not cut and trained",
        ),
        ({"model": "dense/config.json"}, ModelError, "has a config and no weights to cut and train"),
        ({"out": "dense", "run": RunOptions(overwrite=True)}, CheckpointError, "holds the MODEL itself"),
        ({"save_adapter": True}, TrainingError, "--save-adapter: the folder that an adapter belongs to is not kept"),
    ],
)
def test_what_cannot_be_cut_or_trained_leaves_nothing(
    given: dict[str, Any], error: type[SecateurError], match: str, place: Path
) -> None:
    with pytest.raises(error, match=match):
        cut_and_trained(**given)
    assert names(place) == []
