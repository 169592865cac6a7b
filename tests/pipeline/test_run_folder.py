"""The run folder that a user names: statistics of one plan serve the next, and the scores are there for the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from secateur.data.calibration import CalibrationOptions
from secateur.errors import CheckpointError
from secateur.pipeline.options import RunOptions
from secateur.pipeline.run import plan_model
from secateur.planning.plan import Plan
from secateur.scoring.registry import SCORES, Score
from secateur.scoring.scores import load_scores
from small_runs import CALIBRATION, STAGES, emptied, never, prune, small, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def place(inputs: Path) -> Iterator[Path]:
    with emptied(inputs):
        yield inputs


@pytest.fixture(scope="module")
def first(inputs: Path) -> Plan:
    """The plan whose run folder is in/first."""
    with emptied(inputs):
        made = plan(ratio=0.2, score="param_second")
        shutil.move("here/run", "in/first")
        return made


@pytest.fixture
def run(first: Path, place: Path) -> Path:
    """A run folder with the statistics of one plan."""
    return Path(shutil.copytree("in/first", place / "run"))


def plan(calibration: CalibrationOptions = CALIBRATION, **cut: Any) -> Plan:
    return plan_model(small(cut=cut, calibration=calibration), run=RunOptions(folder=Path("here/run")))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("statistics-*"))


def test_another_plan_needs_no_pass_and_no_weights(first: Plan, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {"ratio": 0.4, "score": "param_first", "reduce": "max"}
    with monkeypatch.context() as patch:
        patch.setattr(f"{STAGES}.load", never("weights were read"))
        assert plan(ratio=0.2, score="param_second") == first
        made = plan(**other)
    assert made.scored["score"] == "param_first"
    alone = plan_model(small(cut=other))
    assert [group.keep for group in alone.groups] == [group.keep for group in made.groups]
    assert alone.scored == {**made.scored, **{key: alone.scored[key] for key in ("loss", "by_kind")}}
    assert alone.scored["by_kind"]["mlp"] == pytest.approx(made.scored["by_kind"]["mlp"])


def test_a_score_that_needs_more_adds_to_the_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for score in ("wanda", "l1", "obs"):
        plan(score=score)
    monkeypatch.setattr(f"{STAGES}.load", never("weights were read"))
    for score in ("param_first", "wanda", "fluctuation", "l2", "obs"):
        assert plan(score=score).scored["score"] == score
    assert len(files(run)) == 1


def test_other_axes_are_scored_and_added(run: Path) -> None:
    assert plan(axes=("hidden",)).decided
    assert plan(axes=("layers",), score="block_influence", ratio=0.5, of="units").decided


def test_prune_uses_it_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{STAGES}.statistics_for", never("scored again"))
    assert prune(folder="here/run", cut={"ratio": 0.3, "score": "param_first"}).plan.decided


def test_another_text_has_a_file_of_its_own(run: Path) -> None:
    plan(replace(CALIBRATION, length=17), score="param_second")
    assert len(files(run)) == 2


def test_what_repair_alone_sees_does_not_matter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores look at the same windows, whether the last ones are in random order or not."""
    text = replace(CALIBRATION, samples=8, score_samples=6)
    plan(text, choose="score", repair="none")
    monkeypatch.setattr(f"{STAGES}.statistics_for", never("scored again"))
    made = prune(folder="here/run", calibration=replace(text, varied=0.25)).plan
    assert made.scored["calibration_options"]["varied"] == 0.25
    assert len(files(place / "run")) == 1


def test_scores_are_there_for_the_report(place: Path) -> None:
    for score, axes in (("l1", ("mlp",)), ("l1", ("mlp",)), ("l1", ("hidden",)), ("l2", ("mlp",))):
        decided = plan(score=score, axes=axes)
    saved = [load_scores(file) for file in (place / "run").glob("scores-*.safetensors")]
    assert sorted((scores.score, "hidden" in scores.units) for scores in saved) == [
        ("l1", False),
        ("l1", True),
        ("l2", False),
    ]
    [last] = [scores for scores in saved if scores.score == "l2"]
    assert (last.reduce, last.calibration) == (decided.scored["reduce"], decided.scored["calibration"])
    assert {group.name for group in decided.groups} <= last.units.keys()


def test_a_damaged_file_is_written_anew(first: Plan, run: Path) -> None:
    (file,) = files(run)
    file.write_bytes(b"{")
    assert plan(ratio=0.2, score="param_second") == first
    assert file.stat().st_size > 1000


def test_a_file_in_its_place(place: Path) -> None:
    (place / "run").write_text("")
    with pytest.raises(CheckpointError, match="here/run is a file, and a folder is to hold the statistics"):
        plan(ratio=0.2)


def test_statistics_of_a_custom_score_are_never_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may change."""
    monkeypatch.setitem(SCORES, "mine", Score(lambda seen: seen.weight, "weights", own=True))
    one = plan(score="mine")
    monkeypatch.setitem(SCORES, "mine", Score(lambda seen: -seen.weight.square(), "weights", own=True))
    assert plan(score="mine") != one
    (file,) = files(place / "run")
    assert not any("mine" in key for key in load_file(file))
