"""A dense model is cut and trained in rounds: the size is that of one cut, and a killed run resumes where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
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
from secateur.files import plain
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.planning.plan import read_plan
from secateur.recovery import teacher_cache
from secateur.recovery.recipe import RecoverRecipe, RoundOptions
from secateur.recovery.result import RecoverResult
from tiny import names

ROUNDS = sys.modules["secateur.recovery.rounds"]
CALIBRATION = CalibrationOptions("text.txt", 4, 16)
DATA = DataOptions(("rows.json",), max_length=128)
RESUME = RunOptions(resume=True)


def in_rounds(
    out: str | Path = "here/out",
    *,
    rounds: int = 2,
    cut: dict[str, Any] | None = None,
    model: str = "dense",
    run: RunOptions | None = None,
    loading: LoadOptions = FLOAT32,
    **given: Any,
) -> RecoverResult:
    """Two rounds of four steps, with an evaluation after every second, unless other options are given."""
    whole = recipe(model, cut={"ratio": 0.3} if cut is None else cut).cut
    in_turn = RoundOptions(rounds, whole, CALIBRATION)
    return recover(RecoverRecipe(model, DATA, options(**given), rounds=in_turn, loading=loading), out, run=run)


class Whole:
    """A run that nothing stops, and how often its teacher read rows."""

    result: RecoverResult
    reads: int = 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    found, real = Whole(), teacher_cache._teacher_outputs

    def count(*given: Any) -> Any:
        found.reads += 1
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf())
        patch.setattr(teacher_cache, "_teacher_outputs", count)
        found.result = in_rounds(tmp_path_factory.mktemp("whole") / "out", method="lora+distill", plot=True)
    return found


class TestResult:
    def test_the_end_has_the_size_of_one_cut(self, whole: Whole) -> None:
        out, rounds = whole.result.out, whole.result.rounds
        plan = read_plan(out / "secateur_plan.json")
        dense, pruned = (plan.parameters[f"{which}_non_embedding"] for which in ("dense", "pruned"))
        assert pruned == pytest.approx(0.7 * dense, rel=0.01)
        assert (plan.options.ratio, plan.options.iterations) == (0.3, 2)
        assert plan.decided
        assert load(str(out), device="cpu").num_parameters() == plan.parameters["pruned"] == rounds[-1]["parameters"]
        assert verify(out).problems == ()
        assert rounds[0]["non_embedding_parameters"] == pytest.approx(0.85 * dense, rel=0.02)

    def test_steps_are_counted_through(self, whole: Whole) -> None:
        result = whole.result
        assert [step for step, _ in result.loss] == list(range(1, 9))
        assert [(entry["round"], entry["step"]) for entry in result.evaluation] == [
            (number, 4 * (number - 1) + step) for number in (1, 2) for step in (0, 2, 4)
        ]
        assert result.best_step == 4 + result.rounds[-1]["best_step"]
        assert result.steps == sum(each["steps"] for each in result.rounds) == 8
        curves = json.loads((result.out / "secateur_curves.json").read_text())
        assert [step for step, _ in curves["loss"]] == list(range(1, 9))
        assert (result.out / "secateur_curves.png").read_bytes().startswith(b"\x89PNG")
        assert {"prune, round 1", "train, round 2", "save"} <= result.seconds.keys()

    def test_the_record_has_all_rounds_and_the_dense_model(self, whole: Whole) -> None:
        record = read_record(whole.result.out)
        assert record is not None
        assert record.model == "dense"
        assert record.tensors is not None
        assert record.tensors["model.layers.0.mlp.up_proj.weight"].startswith("cut float32 [84, 48] -> [")
        recovery: Any = record.recovery
        for number in (2, 1):
            assert (recovery["round"], recovery["teacher"], recovery["method"]) == (number, "dense", "lora+distill")
            assert recovery["options"]["seed"] == number - 1
            recovery = recovery["before"]
        assert recovery is None

    def test_the_teacher_reads_the_rows_once(self, whole: Whole) -> None:
        assert whole.reads == 2  # rows to train on, and those for validation

    @pytest.mark.slow
    @pytest.mark.parametrize(("shape", "method"), [("uniform", "lora"), ("per-layer", "distill")])
    def test_one_round_is_to_prune_and_then_to_recover(self, shape: str, method: str, place: Path) -> None:
        cut = {"ratio": 0.3, "shape": shape}
        found = in_rounds(rounds=1, cut=cut, method=method)
        prune_model(recipe("dense", cut=cut, calibration=CALIBRATION, loading=FLOAT32), "here/pruned")
        training = RecoverRecipe("here/pruned", DATA, options(method=method), loading=FLOAT32)
        expected = recover(training, "here/expected")
        assert distance("here/out", "here/expected") == 0
        assert read_plan(place / "out/secateur_plan.json") == read_plan(place / "expected/secateur_plan.json")
        assert (found.loss, found.tokens, found.best_step) == (expected.loss, expected.tokens, expected.best_step)
        assert names(place / "out") == names(place / "expected")
        records = [read_record(place / name) for name in ("out", "expected")]
        for key in ("model", "weights", "calibration", "calibration_options", "seed", "dtype"):
            assert getattr(records[0], key) == getattr(records[1], key)

    @pytest.mark.slow
    def test_a_ratio_of_units_leaves_the_units_of_one_cut(self, place: Path) -> None:
        cut = {"ratio": 0.4, "of": "units"}  # 84 channels: 28, 25 and 21 after ratios that are rounded in each round
        in_rounds(rounds=3, cut=cut, max_steps=1, method="lora")
        prune_model(recipe("dense", cut=cut, calibration=CALIBRATION, loading=FLOAT32), "here/pruned")
        out, pruned = (read_plan(place / name / "secateur_plan.json") for name in ("out", "pruned"))
        assert {group.name: group.kept for group in out.groups} == {group.name: group.kept for group in pruned.groups}

    @pytest.mark.slow
    @pytest.mark.parametrize(("axes", "ratio", "width", "depth"), [("hidden", 0.4, 29, 3), ("layers", 0.67, 48, 1)])
    def test_hidden_size_and_layers_and_what_is_left_once_more(
        self, axes: str, ratio: float, width: int, depth: int, place: Path
    ) -> None:
        cut = {"ratio": ratio, "axes": (axes,), "of": "units"}
        in_rounds(cut=cut, max_steps=2, method="distill")
        model = load("here/out", device="cpu")
        assert model.get_parameter("model.embed_tokens.weight").shape[1] == width
        assert model.config.num_hidden_layers == depth
        assert verify("here/out").problems == ()
        in_rounds("here/again", model="here/out", rounds=1, cut={"ratio": 0.2}, max_steps=1, method="full")
        assert verify("here/again").problems == ()
        assert load("here/again", device="cpu").num_parameters() < model.num_parameters()


def check_same(whole: Whole, place: Path) -> None:
    assert distance("here/out", whole.result.out) == 0
    assert read_plan(place / "out/secateur_plan.json") == read_plan(whole.result.out / "secateur_plan.json")
    assert [name for name in names(place) if "/" not in name] == ["out"]


def write_prune_recipe() -> None:
    """The calibration of `in_rounds`, for the command line."""
    Path("prune.yaml").write_text(yaml.safe_dump({"calibration": plain(CALIBRATION)}))


GIVEN: dict[str, Any] = {"method": "lora+distill", "plot": True}


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("step", [7, 3])
    def test_stopped_in_a_training_it_goes_on_to_the_same_weights(self, step: int, whole: Whole, place: Path) -> None:
        with interrupted_at(step):
            in_rounds(**GIVEN)
        finished = [path.name for path in Path("here/.out.secateur").glob("round-*.json")]
        assert finished == [f"round-{number}.json" for number in range(1, step // 4 + 1)]
        with counted_steps() as steps:
            resumed = in_rounds(**GIVEN, run=RESUME)
        assert len(steps) == 8 - step // 2 * 2  # evaluations, which are checkpoints, come every second step
        assert resumed.resumed
        check_same(whole, place)

    @pytest.mark.slow
    @pytest.mark.parametrize(("where", "calls"), [("prune_model", 2), ("_save", 1)])
    def test_stopped_between_trainings_it_goes_on_to_the_same_weights(
        self, where: str, calls: int, whole: Whole, place: Path
    ) -> None:
        real, left = getattr(ROUNDS, where), [calls]

        def stop(*args: Any, **given: Any) -> Any:
            left[0] -= 1
            return interrupt() if left[0] == 0 else real(*args, **given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ROUNDS, where, stop)
            with pytest.raises(KeyboardInterrupt):
                in_rounds(**GIVEN)
        in_rounds(**GIVEN, run=RESUME)
        check_same(whole, place)

    @pytest.mark.slow
    def test_with_other_options_it_starts_anew(self, whole: Whole, place: Path) -> None:
        with interrupted_at(3):
            in_rounds(**GIVEN, learning_rate=1e-3)
        assert not in_rounds(**GIVEN, run=RESUME).resumed
        check_same(whole, place)

    @pytest.mark.slow
    def test_killed_at_random_moments_it_goes_on_to_the_same_weights(self, place: Path) -> None:
        arguments = "recover dense here/out --data rows.json --method lora+distill --max-length 128 --max-steps 8"
        arguments += " --eval-steps 2 --learning-rate 3e-3 --dropout 0.1 --dtype float32 --device cpu --patience 50"
        arguments += " --global-batch-size 8 --eval reference=held.txt --rounds 2 --ratio 0.4 --quiet"
        arguments += " --prune-recipe prune.yaml"
        write_prune_recipe()
        start = time.monotonic()
        whole = [*arguments.replace("here/out", "here/whole").split()]
        subprocess.run([sys.executable, "-c", KILLING, "0", "1", *whole], check=True, capture_output=True)
        early = (time.monotonic() - start) / 4
        command = [sys.executable, "-c", KILLING, "5", str(early), *arguments.split()]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 3
        assert distance("here/out", "here/whole") <= 1e-6
        assert [name for name in names(place) if "/" not in name] == ["out", "whole"]


@pytest.mark.slow
def test_two_processes_do_as_one_does(place: Path) -> None:
    arguments = "recover dense here/out --data rows.json --method distill --max-length 128 --max-steps 4"
    # float64 and a low rate: processes sum in another order, and no rounding may make another unit the cheaper one.
    arguments += " --global-batch-size 8 --eval-steps 2 --learning-rate 1e-5 --dtype float64 --device cpu"
    arguments += " --rounds 2 --ratio 0.3 --json here.json"
    arguments += " --prune-recipe prune.yaml"
    write_prune_recipe()
    done = launch("-m", "secateur", *arguments.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote here/out") == 1
    float64 = LoadOptions(dtype="float64", device="cpu")
    alone = in_rounds("here/alone", method="distill", learning_rate=1e-5, loading=float64)
    data = json.loads(Path("here.json").read_text())
    assert [loss for _, loss in data["loss"]] == pytest.approx([loss for _, loss in alone.loss], rel=1e-3)
    first, second = (weights(place / name) for name in ("out", "alone"))
    assert {name: weight.shape for name, weight in first.items()} == {n: w.shape for n, w in second.items()}
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"rounds": 0}, PlanError, r"iterations=0 is too small. Expected at least 1"),
        ({"cut": {"ratio": 0.99}}, PlanError, r"round 2 of 2: target=\S+ leaves .* at most ratio="),
        ({"cut": {"ratio": 0.001}}, PlanError, "round 1 of 2: .* removes no unit"),
        ({"cut": {"ratio": 0.3, "of": "latency"}}, PlanError, "several iterations with a budget of latency are not"),
        (
            {"cut": {"axes": ("mlp", "vocabulary"), "of": "parameters"}},
            PlanError,
            "a vocabulary is not cut and trained",
        ),
        ({"model": "dense/config.json"}, ModelError, "has a config and no weights to cut and train"),
        ({"out": "dense", "run": RunOptions(overwrite=True)}, CheckpointError, "holds the MODEL itself"),
        ({"save_adapter": True}, TrainingError, "--save-adapter: in rounds"),
        pytest.param(
            {"method": "full", "learning_rate": 1e30, "max_steps": 20},
            TrainingError,
            r"the (loss|gradient) is (nan|inf) at step",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_cut_or_trained_leaves_nothing(
    given: dict[str, Any], error: type[SecateurError], match: str, place: Path
) -> None:
    with pytest.raises(error, match=match):
        in_rounds(**given)
    assert names(place) == []
