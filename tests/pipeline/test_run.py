"""`plan_model` and `prune_model`: what they make, what they record, and what they refuse before weights are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from secateur import SecateurError
from secateur import prune as prune_in_memory
from secateur.checkpoint.record import read_record
from secateur.data.calibration import CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.windows import calibration_windows, digest
from secateur.discovery.discover import discover
from secateur.discovery.module_attributes import attributes_after
from secateur.errors import CheckpointError, DataError, DiskError, ModelError, PlanError, ScoreError
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import PruneRecipe
from secateur.pipeline.run import Pruned, plan_model, prune_as_planned, prune_model
from secateur.planning.plan import Plan, read_plan
from secateur.scoring.registry import SCORES, Score
from small_runs import CALIBRATION, STAGES, WORK, emptied, never, prune, raiser, small, top, weights, write_inputs
from tiny import names, write_tiny

CHEAP: dict[str, Any] = {"score": "l2", "repair": "none"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Pruned:
    """A run with the default recipe; its folder is in/whole."""
    with emptied(inputs):
        made = prune()
        shutil.move("here/out", "in/whole")
        return made


@pytest.fixture
def place(inputs: Path) -> Iterator[Path]:
    with emptied(inputs):
        yield inputs


def kept(plan: Any) -> list[tuple[str, int]]:
    return [(group.name, group.kept) for group in plan.groups]


def test_a_run_finds_the_changes_of_modules_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def noted(*given: Any, **options: Any) -> Any:
        found.append(attributes_after(*given, **options))
        return found[-1]

    monkeypatch.setattr("secateur.discovery.padding.attributes_after", noted)
    monkeypatch.setattr("secateur.discovery.padding._LAST", {})
    prune(cut={"axes": ("mlp",), "layers": (0, 1), **CHEAP}, loading=LoadOptions(dtype="float64"))
    assert len(found) == 1


class TestPlanModel:
    def test_a_config_gives_sizes(self, place: Path) -> None:
        planned = plan_model(small(model="in/tiny/config.json", cut={"ratio": 0.3}))
        assert all(group.keep is None and 0 < group.kept < group.units for group in planned.groups)
        assert planned.scored == {}
        (place / "sizes").mkdir()
        shutil.copy("in/tiny/config.json", "here/sizes/config.json")
        alone = plan_model(small(model="here/sizes", cut={"ratio": 0.3}))
        assert (alone.groups, alone.parameters, alone.macs) == (planned.groups, planned.parameters, planned.macs)

    def test_weights_give_units(self, place: Path) -> None:
        recipe = small(cut={"score": "l2", "scope": "local", "shape": "uniform"})
        planned = plan_model(recipe)
        assert planned.decided
        assert planned.scored["score"] == "l2"
        assert kept(plan_model(recipe, sizes_only=True)) == kept(planned)

    def test_prune_cuts_what_was_planned(self, whole: Pruned, place: Path) -> None:
        planned, made = plan_model(small()), whole.plan
        assert kept(made) == kept(planned)
        assert (planned.options.choose, made.options.choose) == ("obs", "score")  # decided while repairing
        for number, plan in enumerate((planned, made)):
            given = prune(out=f"here/{number}", plan=plan)
            assert given.plan == made
            assert weights("in/whole") == weights(f"here/{number}")

    def test_a_repair_that_does_not_help_is_left_out(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        losses = iter((1.0, 2.0, 3.0))  # before, cut alone, repaired
        monkeypatch.setattr("secateur.pruning.held_out._mean_loss", lambda *_: next(losses))
        made = prune(out="here/first").plan
        assert made.scored["held_out_loss"] == {"before": 1.0, "cut": 2.0, "repaired": 3.0}
        alone = prune_in_memory(load("in/tiny", device="cpu"), made).state_dict()
        written = load("here/first", device="cpu", trust_remote_code=True).state_dict()
        assert all(torch.equal(weight, written[name]) for name, weight in alone.items())
        assert prune(out="here/again", plan=made).plan == made
        assert weights("here/again") == weights("here/first")

    @pytest.mark.parametrize("repair", ["least-squares", "reconstruct"])
    def test_a_text_that_is_used_up(self, repair: str, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        (place / "short.txt").write_text("cats " * 40)
        text = CalibrationOptions("here/short.txt", samples=1, length=30, held_out=999, varied=0.0)
        made = prune(out="here/first", calibration=text, cut={"repair": repair})
        assert "held_out_loss" not in made.plan.scored
        assert [each.getMessage().partition(": ")[0] for each in caplog.records] == [
            "repair is not checked on held-out windows, for no text is left"
        ]

    @pytest.mark.parametrize(("words", "judging"), [(400, 32), (30, 2)])
    def test_more_windows_judge_layers_where_there_are(
        self, words: int, judging: int, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held_out: list[int] = []

        def noted(*inputs: Any, **_: Any) -> dict[str, float]:
            held_out.append(len(inputs[4]))
            return {}

        monkeypatch.setattr("secateur.pipeline.pipeline.checked_reconstruction", noted)
        (place / "text.txt").write_text("cats " * words)
        text = CalibrationOptions("here/text.txt", samples=1, length=30, held_out=2, varied=0.0)
        prune(out="here/first", calibration=text, cut={"repair": "reconstruct"})
        assert held_out == [judging]

    def test_the_model_writes_the_text_of_a_plan(self, place: Path) -> None:
        options = CalibrationOptions("self", samples=3, length=20)
        planned, made = plan_model(small(calibration=options)), prune(calibration=options).plan
        assert planned.scored == made.scored
        assert kept(planned) == kept(made)

    def test_a_name_stands_for_the_default_recipe(self, whole: Pruned, place: Path) -> None:
        assert plan_model("in/tiny", sizes_only=True) == plan_model(PruneRecipe("in/tiny"), sizes_only=True)
        assert kept(prune_model("in/tiny", "here/out", plan=whole.plan).plan) == kept(whole.plan)
        assert weights("here/out") == weights("in/whole")  # a plan brings its calibration with it


class TestPlansAndSizes:
    def test_a_plan_is_announced_as_soon_as_its_sizes_are_known(self, whole: Pruned, place: Path) -> None:
        seen: list[Plan] = []
        prune_model(small(cut={**CHEAP, "scope": "local"}), "here/out", announce=seen.append)
        prune_model(small(), "here/again", plan=whole.plan, announce=seen.append)
        assert (seen[0].decided, seen[1]) == (False, whole.plan)  # before the scores; a plan that is given is whole

    def test_a_plan_of_another_model(self, place: Path) -> None:
        write_tiny(place / "deep", num_hidden_layers=4)
        with pytest.raises(PlanError, match="it is of another model"):
            prune(plan=plan_model(small(model="here/deep", cut=CHEAP)))

    @pytest.mark.slow
    def test_reconstruction_is_a_stage_and_plans_repeat_it(self, place: Path) -> None:
        made = prune(calibration=replace(CALIBRATION, samples=8), cut={"repair": "reconstruct", "ratio": 0.3})
        assert [*made.seconds][-3:] == ["cut", "reconstruct", "save"]
        plan = read_plan(Path("here/out/secateur_plan.json"))
        assert "reconstruct" in prune(out="here/again", plan=plan).seconds
        assert weights("here/out") == weights("here/again")
        cut = prune_as_planned(load("in/tiny", dtype="float32"), plan, load_tokenizer("in/tiny"))
        other = load("here/out", dtype="float32")
        for name, parameter in cut.named_parameters():
            assert torch.allclose(parameter, other.get_parameter(name), atol=1e-3)

    def test_a_plan_of_a_custom_score_serves_where_it_is_not_known(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It says which units stay."""
        recipe = small(cut={"score": "mine", "repair": "none"})
        monkeypatch.setitem(SCORES, "mine", Score(lambda seen: seen.weight, "weights", own=True))
        (place / "plan.json").write_text(json.dumps(plan_model(recipe).to_json()))
        monkeypatch.delitem(SCORES, "mine")
        assert prune(plan=read_plan(place / "plan.json")).plan.decided
        with pytest.raises(ScoreError, match="score='mine' is unknown"):
            plan_model(recipe)


class TestLargeModels:
    """A model that is large beside the free memory is pruned into a file."""

    def test_the_weights_are_the_same(self, whole: Pruned, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(f"{STAGES}.IN_MEMORY", 0)
        prune()
        assert (weights("here/out"), top(place)) == (weights("in/whole"), ["out"])

    def test_a_disk_without_room(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(f"{STAGES}.IN_MEMORY", 0)
        monkeypatch.setattr("os.posix_fallocate", raiser(OSError(28, os.strerror(28))))
        with pytest.raises(DiskError, match=r"no room for the cut weights: No space left"):
            prune(cut=CHEAP)
        assert top(place) == [WORK]

    def test_too_little_room_is_refused_before_a_weight_is_read(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.files.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
        monkeypatch.setattr(f"{STAGES}.load", never("weights were read"))
        with pytest.raises(
            DiskError, match=r"here/out needs 0\.\d MB, and 0\.0 MB are free on its disk. Free some, or"
        ):
            prune(cut=CHEAP)
        assert top(place) == []


class TestRecord:
    """The folder says which text its units were chosen by."""

    @pytest.mark.parametrize(
        "options",
        [
            CalibrationOptions("in/rows.jsonl", 3, 20, seed=4, column="body", chat=True, varied=0.5, copied=0.5),
            CalibrationOptions("self", samples=3, length=20, seed=4, varied=0.0, copied=0.0),
        ],
        ids=lambda options: options.text[0],
    )
    def test_the_calibration(self, options: CalibrationOptions, place: Path) -> None:
        pruned = prune(calibration=options)
        record = read_record(pruned.out)
        assert record is not None
        assert CalibrationOptions(**(record.calibration_options or {})) == options
        assert (record.calibration, record.seed) == (pruned.plan.scored["calibration"], 4)
        tokens = (
            generate_windows(load("in/tiny", device="cpu"), options)
            if options.generated
            else calibration_windows(load_tokenizer("in/tiny"), options)
        )
        assert record.calibration == digest(tokens)
        again = read_record(prune(out="here/again", plan=pruned.plan).out)
        assert again is not None
        assert (again.calibration, again.calibration_options) == (record.calibration, record.calibration_options)

    def test_without_options_it_is_the_presets(self, place: Path) -> None:
        made = prune(preset="llm-pruner", cut={"layers": (0, 2)}, calibration=None)
        recorded = made.plan.scored["calibration_options"]
        assert CalibrationOptions(**recorded) == CalibrationOptions(
            samples=10, length=64, score_samples=None, varied=0.0, copied=0.0
        )

    def test_scores_of_weights_alone(self, place: Path) -> None:
        record = read_record(prune(cut=CHEAP).out)
        assert record is not None
        assert (record.calibration, record.calibration_options) == (None, None)


class TestRefusals:
    """What can be refused is refused before weights are read, and leaves nothing."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(f"{STAGES}.load", never("weights were read"))

    @pytest.fixture(params=["plan", "prune"])
    def attempt(self, request: pytest.FixtureRequest, place: Path) -> Callable[[PruneRecipe], Any]:
        if request.param == "plan":
            return plan_model
        return lambda recipe: prune_model(recipe, "here/out")

    @pytest.mark.parametrize(
        ("choices", "error", "match"),
        [
            ({"cut": {"score": "fischer"}}, ScoreError, r"score='fischer' is unknown.*Did you mean fisher\?"),
            ({"cut": {"ratio": 0.99}}, PlanError, r"ratio=0\.99 leaves"),
            ({"cut": {"layers": (0, 5)}}, PlanError, "layers=0:5 is outside the model: it has layers 0:2"),
            (
                {"calibration": replace(CALIBRATION, varied=0.5), "cut": CHEAP},
                PlanError,
                "varied=0.5 is for repair",
            ),
        ],
        ids=str,
    )
    def test_options_that_cannot_be(
        self,
        choices: dict[str, Any],
        error: type[SecateurError],
        match: str,
        attempt: Callable[[PruneRecipe], Any],
        place: Path,
    ) -> None:
        with pytest.raises(error, match=match):
            attempt(small(**choices))
        assert names(place) == []

    def test_quantized_models_have_sizes_but_no_scores(
        self, attempt: Callable[[PruneRecipe], Any], place: Path
    ) -> None:
        config = json.loads(Path("in/tiny/config.json").read_text())
        model = shutil.copytree("in/tiny", place / "packed")
        (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
        assert plan_model(small(model="here/packed"), sizes_only=True).parameters["dense"] > 0
        with pytest.raises(SecateurError, match=r"'here/packed' is quantized \(fp8\)"):
            attempt(small(model="here/packed"))
        assert top(place) == ["packed"]

    def test_no_weights_to_cut(self, place: Path) -> None:
        with pytest.raises(
            ModelError, match=r"has a config and no weights to cut; `secateur plan in/tiny/config\.json`"
        ):
            prune_model("in/tiny/config.json", "here/out")

    @pytest.mark.parametrize("text", ["self", "in/text.txt"])
    def test_windows_longer_than_the_model_reads(
        self, text: str, attempt: Callable[[PruneRecipe], Any], place: Path
    ) -> None:
        with pytest.raises(DataError, match="length=257 is longer than the model's 256 positions"):
            attempt(small(calibration=CalibrationOptions(text, samples=2, length=257)))
        assert names(place) == []


class TestOverwrite:
    def test_the_new_takes_the_place_of_the_old(self, whole: Pruned, place: Path) -> None:
        shutil.copytree("in/whole", "here/out")
        (place / "out" / "extra").touch()
        with pytest.raises(CheckpointError, match="here/out exists"):
            prune()
        prune(overwrite=True, cut=CHEAP)
        assert weights("here/out") != weights("in/whole")
        assert top(place) == ["out"]
        assert not (place / "out" / "extra").exists()

    @pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), RuntimeError("a bug")], ids=repr)
    def test_the_old_stays_until_the_new_is_whole(
        self, error: BaseException, whole: Pruned, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree("in/whole", "here/out")
        before = names(place)
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", raiser(error))
        with pytest.raises((CheckpointError, KeyboardInterrupt, RuntimeError)):
            prune(overwrite=True, cut=CHEAP)
        shutil.rmtree(place / WORK, ignore_errors=True)
        assert (names(place), weights("here/out")) == (before, weights("in/whole"))


def test_what_was_made_is_plain_data(whole: Pruned) -> None:
    data = json.loads(json.dumps(whole.to_json()))
    assert data["out"] == "here/out"
    assert (data["resumed"], list(data["seconds"])) == (False, list(whole.seconds))
    assert data["peak_rss_bytes"] > 10_000_000


def test_prune_as_planned_needs_no_folder(whole: Pruned, place: Path) -> None:
    model = load("in/tiny", dtype="float32")
    smaller = prune_as_planned(model, whole.plan, load_tokenizer("in/tiny"))
    other = load("in/whole", dtype="float32")
    assert all(torch.equal(weight, other.get_parameter(name)) for name, weight in smaller.named_parameters())
    discovery = discover(model)
    assert Pipeline(small(), given=whole.plan, model=model, discovery=discovery).options == whole.plan.options
