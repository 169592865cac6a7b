# mypy: ignore-errors
# ruff: noqa
"""Runs that are killed, interrupted, refused or out of disk: what is left, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from recipes import recipe
from secateur import CalibrationOptions, SecateurError
from secateur.checkpoint.record import read_record
from secateur.data.windows import calibration_windows, digest
from secateur.data.calibration import self_written
from secateur.errors import CheckpointError, DataError, DiskError, PlanError, ScoreError
from secateur.models.loading import LoadOptions, load
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.cache import kept_scores, kept_windows
from secateur.pipeline.recipe import RunOptions
from secateur.pipeline.run import Pruned, plan_model, prune_as_planned, prune_model
from secateur.planning.plan import Plan, read_plan
from secateur.progress import Clock, peak_rss
from secateur.pruning.repair import repair
from secateur.scoring.passes.recomputation import LayerCache
from secateur.scoring.passes.recomputation import ModuleCall
from secateur.scoring.registry import SCORES, Score
from secateur.scoring.scores import Scores, load_scores
from tiny import names, write_tiny

TEXT = "a cat and a dog and a bird sat on a log and sang\n" * 60
OTHER_TEXT = "one fish two fish red fish blue fish and no more\n" * 60

KEPT = [
    ".out.secateur",
    *(f".out.secateur/{name}" for name in ("key.json", "repaired.safetensors", "scores.safetensors")),
]
KILLED_WHILE_SAVING = """
import os, signal, sys
import secateur.cli.main, secateur.pipeline.run
secateur.pipeline.run.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(secateur.cli.main.run(sys.argv[1:]))
"""
STAYS = "what was done so far is kept: make room, and go on with --resume (resume=True)"
SMALL_DISK = """
import resource, signal, sys
import secateur.cli.main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.exit(secateur.cli.main.run(sys.argv[1:]))
"""


@pytest.fixture
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the model and texts elsewhere."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "in" / "tiny")
    (tmp_path / "in" / "text.txt").write_text(TEXT)
    (tmp_path / "in" / "rows.jsonl").write_text(json.dumps({"text": TEXT, "body": OTHER_TEXT}))
    (tmp_path / "in" / "tiny" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def prune(**options: Any) -> Pruned:
    """Prune the tiny model into here/out."""
    options = {"calibration": CalibrationOptions("in/text.txt", samples=4, length=16), **options}
    return prune_model("in/tiny", "here/out", **options)


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def killed(place: Path) -> Path:
    """What is left of a run that was killed once it had scored."""
    arguments = "prune in/tiny here/out --calibration in/text.txt --samples 4 --length 16".split()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    return place


@pytest.fixture
def interrupted(place: Path) -> Path:
    """The same without the price of another process: Ctrl-C while saving."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.pipeline.run.save", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune()
    return place


class TestResume:
    def test_a_killed_run_goes_on(self, killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert names(killed) == KEPT
        text = calibration_of("best", text="in/text.txt", samples=4, length=16)  # as the command had it
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pipeline.run.statistics_for", lambda *_, **__: pytest.fail("scored again"))
            resumed = prune(resume=True, calibration=text)
        assert resumed.resumed
        assert resumed.seconds.keys() == {"discover", "load", "cut", "save"}
        assert [name for name in names(killed) if "/" not in name] == ["out"]
        whole = prune_model(recipe("in/tiny", calibration=text), "here/whole")
        assert not whole.resumed
        assert "score" in whole.seconds
        assert weights("here/out") == weights("here/whole")
        assert read_plan(Path("here/out/secateur_plan.json")) == read_plan(Path("here/whole/secateur_plan.json"))

    @pytest.mark.parametrize("shape", ["uniform", "free"])
    def test_a_run_in_steps_goes_on_after_its_last_step(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, shape: str
    ) -> None:
        text = CalibrationOptions("in/text.txt", 4, 16)
        cut = {"steps": 3, "shape": shape, "ratio": 0.4}
        real = repair
        rounds: list[int] = []

        def counted(*given: Any, **options: Any) -> Any:
            rounds.append(1)
            return real(*given, **options)

        def third_time_interrupted(*given: Any, **options: Any) -> Any:
            rounds.append(1)
            if len(rounds) == 3:
                raise KeyboardInterrupt
            return real(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr("secateur.pruning.iterative.repair", third_time_interrupted)
            with pytest.raises(KeyboardInterrupt):
                prune(calibration=text, cut=cut)
        assert ".out.secateur/step.safetensors" in names(place)
        assert not prune_model(recipe("in/tiny", cut=cut, calibration=text), "here/whole").resumed
        rounds[:] = []
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pruning.iterative.repair", counted)
            assert prune(calibration=text, cut=cut, resume=True).resumed
        assert len(rounds) == 1
        assert weights("here/out") == weights("here/whole")
        assert read_plan(Path("here/out/secateur_plan.json")) == read_plan(Path("here/whole/secateur_plan.json"))
        assert not any(name.startswith(".out") for name in names(place))

    @pytest.mark.slow
    def test_measured_damage_is_kept(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options: dict[str, Any] = {
            "calibration": CalibrationOptions("in/text.txt", 4, 16),
            "cut": {"scope": "sensitivity", "ratio": 0.3},
        }
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pipeline.run.save", raiser(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune(**options)
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pipeline.run.damage_curves", lambda *_, **__: pytest.fail("measured again"))
            resumed = prune(resume=True, **options)
        assert "measure damage" not in resumed.seconds
        whole = prune_model("in/tiny", "here/whole", **options)
        assert "measure damage" in whole.seconds
        assert weights("here/out") == weights("here/whole")
        planned = plan_model("in/tiny", **options)
        assert [(group.name, group.kept) for group in planned.groups] == [
            (group.name, group.kept) for group in whole.plan.groups
        ]

    def test_reconstruction_is_a_stage_and_plans_repeat_it(self, place: Path) -> None:
        text = CalibrationOptions("in/text.txt", 8, 16)
        made = prune(calibration=text, cut={"repair": "reconstruct", "ratio": 0.3})
        assert [*made.seconds][-3:] == ["cut", "reconstruct", "save"]
        by_plan = prune_model("in/tiny", "here/again", plan=read_plan(Path("here/out/secateur_plan.json")))
        assert "reconstruct" in by_plan.seconds
        assert weights("here/out") == weights("here/again")
        with quiet():
            model = load("in/tiny", dtype="float32")
        cut = prune_as_planned(model, read_plan(Path("here/out/secateur_plan.json")), load_tokenizer("in/tiny"))
        other = load("here/out", dtype="float32")
        for name, parameter in cut.named_parameters():
            assert torch.allclose(parameter, other.get_parameter(name), atol=1e-3)

    def test_steps_for_other_options_are_not_gone_on_from(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = CalibrationOptions("in/text.txt", 4, 16)
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pipeline.run.save", raiser(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune(calibration=text, cut={"steps": 2, "ratio": 0.4})
        assert ".out.secateur/step.safetensors" in names(place)
        assert not prune(calibration=text, cut={"steps": 2, "ratio": 0.3}, resume=True).resumed

    def test_an_interrupted_run_keeps_its_scores(self, interrupted: Path) -> None:
        assert names(interrupted) == KEPT
        assert prune(resume=True).resumed

    def test_without_resume_it_starts_anew(self, interrupted: Path) -> None:
        again = prune()
        assert not again.resumed
        assert "score" in again.seconds
        assert names(interrupted)[0] == "out"

    @pytest.mark.parametrize(
        "change",
        [
            {"cut": {"score": "param_first"}},
            {"cut": {"reduce": "max"}},
            {"calibration": CalibrationOptions("in/text.txt", samples=4, length=16, seed=1)},
            {"calibration": CalibrationOptions("in/text.txt", samples=5, length=16)},
            {"calibration": CalibrationOptions("in/text.txt", samples=4, length=17)},
            {"calibration": CalibrationOptions("demo", samples=4, length=16)},
            {"calibration": CalibrationOptions("in/text.txt", samples=4, length=16, chat=True)},
            {"calibration": CalibrationOptions("in/rows.jsonl", samples=4, length=16)},
            {"calibration": CalibrationOptions("in/rows.jsonl", samples=4, length=16, column="body")},
            {"calibration": CalibrationOptions("self", samples=4, length=16)},
            {"loading": LoadOptions(dtype="float64")},
        ],
        ids=str,
    )
    def test_scores_of_something_else_are_not_used(self, interrupted: Path, change: dict[str, Any]) -> None:
        assert not prune(resume=True, **change).resumed

    def test_a_text_that_changed_since(self, interrupted: Path) -> None:
        Path("in/text.txt").write_text(OTHER_TEXT)
        assert not prune(resume=True).resumed

    def test_a_model_that_changed_since(self, interrupted: Path) -> None:
        shutil.rmtree("in/tiny")
        write_tiny(Path("in/tiny"), seed=1)
        assert not prune(resume=True).resumed

    def test_the_same_name_elsewhere(self, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (interrupted.parent / "elsewhere").mkdir()
        shutil.copytree("in", "elsewhere/in")
        monkeypatch.chdir("elsewhere")
        options = CalibrationOptions("in/text.txt", samples=4, length=16)
        assert not prune_model(
            recipe("in/tiny", calibration=options), "../here/out", run=RunOptions(resume=True)
        ).resumed

    def test_another_column_is_not_the_same(self, place: Path) -> None:
        rows = CalibrationOptions("in/rows.jsonl", samples=4, length=16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.pipeline.run.save", raiser(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune(calibration=rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.pipeline.run.save", raiser(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune(calibration=rows, resume=True)
        for change in ({"column": "body"}, {"chat": True}):
            assert not prune(calibration=replace(rows, **change), resume=True, overwrite=True).resumed

    def test_another_budget_uses_the_same_scores(self, interrupted: Path) -> None:
        assert prune(resume=True, cut={"ratio": 0.4}).resumed

    @pytest.mark.parametrize("file", ["key.json", "scores.safetensors"])
    def test_damaged_leftovers(self, interrupted: Path, file: str) -> None:
        (interrupted / ".out.secateur" / file).write_bytes(b"{")
        assert "score" in prune(resume=True).seconds
        assert names(interrupted)[0] == "out"

    def test_leftovers_of_another_form(self, tmp_path: Path) -> None:
        (tmp_path / "windows.safetensors").write_bytes(b"{")
        assert kept_windows(tmp_path) is None
        for about in ("[]", "{}", '{"options": 3}', '{"options": {"colour": 1}}', "{"):
            save_file({"hidden": torch.ones(2)}, tmp_path / "scores.safetensors", {"secateur": about})
            assert kept_scores(tmp_path) is None

    def test_nothing_to_resume(self, place: Path) -> None:
        assert not prune(resume=True).resumed

    def test_an_interruption_before_the_scores_leaves_nothing(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.pipeline.run.statistics_for", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune()
        assert names(place) == []

    def test_the_scores_that_are_kept(self, interrupted: Path) -> None:
        kept = load_scores(interrupted / ".out.secateur" / "scores.safetensors")
        assert (kept.score, kept.reduce, kept.seed) == ("fisher", "sum", 0)
        assert kept.units["layers.0.mlp"].shape == (84,)


SCORED_BY_LAYER = """
import sys
import secateur.cli.main, secateur.pipeline.run
secateur.pipeline.run.JOURNAL_FROM = 0
sys.exit(secateur.cli.main.run(sys.argv[1:]))
"""


class TestLayerByLayer:
    """Large models: every layer that has been scored is kept, and a run that goes on ends at the same bytes."""

    @pytest.fixture(autouse=True)
    def by_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.pipeline.run.JOURNAL_FROM", 0)

    @pytest.fixture
    def whole(self, place: Path) -> bytes:
        """The weights that an undisturbed run leaves."""
        prune()
        shutil.move("here/out", "in/whole")
        return weights("in/whole")

    def stopped_after(self, writes: int, cut: dict[str, Any]) -> None:
        """Ctrl-C when so many stages of layers are kept."""
        write = LayerCache.write

        def stop(journal: LayerCache, *arguments: Any) -> None:
            write(journal, *arguments)
            if len(list(journal.folder.glob("*.safetensors"))) == writes:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerCache, "write", stop)
            with pytest.raises(KeyboardInterrupt):
                prune(cut=cut)

    @pytest.mark.parametrize(  # after each of three layers, forward and backward
        ("writes", "score"),
        [
            *((writes, "param_mix") for writes in range(1, 7)),
            *(
                pytest.param(writes, score, marks=pytest.mark.slow if writes in (1, 2, 5, 6) else ())
                for writes in range(1, 7)
                for score in ("param_first", "fisher")
            ),
        ],
    )
    def test_it_goes_on_from_the_last_layer(
        self, place: Path, writes: int, score: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scores: list[Scores] = []

        def keep(work: Path, found: Scores) -> None:
            scores.append(found)

        monkeypatch.setattr("secateur.pipeline.run.keep_scores", keep)
        prune(cut={"score": score})
        shutil.move("here/out", "in/whole")
        self.stopped_after(writes, {"score": score})
        assert sum(name.startswith(".out.secateur/pass/") for name in names(place)) == writes
        runs: list[str] = []
        run = ModuleCall.run

        def counted(call: ModuleCall, tensors: Sequence[Tensor]) -> list[Tensor]:
            runs.append(call.path)
            return run(call, tensors)

        monkeypatch.setattr(ModuleCall, "run", counted)
        assert prune(resume=True, cut={"score": score}).resumed
        assert len([path for path in runs if path.count(".") == 2]) == 6 - writes
        assert weights("here/out") == weights("in/whole")
        assert names(place)[0] == "out"
        first, second = scores
        assert first.loss == second.loss
        assert all(torch.equal(units, second.units[name]) for name, units in first.units.items())

    def test_what_the_model_wrote_is_kept(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = CalibrationOptions("self", samples=4, length=16)
        monkeypatch.setattr("secateur.pipeline.run.statistics_for", raiser(KeyboardInterrupt()))
        monkeypatch.setattr("secateur.pipeline.cache.PASS_FOLDER", "")  # anything is worth keeping
        with pytest.raises(KeyboardInterrupt):
            prune(calibration=own)
        monkeypatch.undo()
        monkeypatch.chdir(place.parent)
        monkeypatch.setattr("secateur.pipeline.run.self_written", lambda *_, **__: pytest.fail("written again"))
        prune(calibration=own, resume=True)

    def test_a_full_disk_is_one_line(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.files.save_file", raiser(OSError(28, os.strerror(28))))
        with pytest.raises(CheckpointError, match=r"forward-0\.safetensors cannot be written: No space left on device"):
            prune()
        assert names(place) == []

    def test_a_damaged_layer_is_computed_again(self, place: Path, whole: bytes) -> None:
        self.stopped_after(4, {})
        (place / ".out.secateur/pass/backward-2.safetensors").write_bytes(b"{")
        assert prune(resume=True).resumed
        assert weights("here/out") == whole

    @pytest.mark.slow
    def test_killed_at_random_moments(self, place: Path, whole: bytes) -> None:
        """Real processes, killed with kill -9 whenever, until one comes to its end."""
        arguments = "prune in/tiny here/out --calibration in/text.txt --samples 4 --length 16 --shuffled 0 --resume"
        command = [sys.executable, "-c", SCORED_BY_LAYER, *arguments.split()]
        moments = random.Random(0)
        started = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.monotonic() - started
        assert weights("here/out") == whole
        for _ in range(4):
            shutil.rmtree("here/out")
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(seconds * moments.uniform(0.5, 0.95))
            process.kill()
            process.wait()
            subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
            assert weights("here/out") == whole
            assert [name for name in names(place) if "/" not in name] == ["out"]


class TestRunFolder:
    """Statistics of one plan serve the next."""

    def plan(self, **cut: Any) -> Plan:
        return plan_model(
            recipe("in/tiny", cut=cut, calibration=CalibrationOptions("in/text.txt", 4, 16)),
            run=RunOptions(folder=Path("here/run")),
        )

    def files(self, place: Path) -> list[Path]:
        return sorted((place / "run").glob("statistics-*"))

    def test_another_plan_needs_no_pass_and_no_weights(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.plan(ratio=0.2, score="param_second")
        assert len(self.files(place)) == 1
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pipeline.run.load", lambda *_, **__: pytest.fail("weights were read"))
            again, other = (
                self.plan(ratio=0.2, score="param_second"),
                self.plan(ratio=0.4, score="param_first", reduce="max"),
            )
        assert again == first
        assert other.scored["score"] == "param_first"
        alone = plan_model(
            recipe(
                "in/tiny",
                cut={"ratio": 0.4, "score": "param_first", "reduce": "max"},
                calibration=CalibrationOptions("in/text.txt", 4, 16),
            )
        )
        assert [group.keep for group in alone.groups] == [group.keep for group in other.groups]
        assert alone.scored == {**other.scored, "loss": alone.scored["loss"]}

    def test_a_score_that_needs_more_adds_to_the_file(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for score in ("param_first", "wanda", "l1", "obs"):
            self.plan(score=score)
        monkeypatch.setattr("secateur.pipeline.run.load", lambda *_, **__: pytest.fail("weights were read"))
        for score in ("param_first", "wanda", "fluctuation", "l2", "obs"):
            assert self.plan(score=score).scored["score"] == score
        assert len(self.files(place)) == 1

    def test_other_axes_are_scored_and_added(self, place: Path) -> None:
        assert self.plan(axes=("mlp",)).decided
        assert self.plan(axes=("hidden",)).decided
        assert self.plan(axes=("layers",), score="block_influence").decided

    def test_prune_uses_it_too(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan(ratio=0.2)
        monkeypatch.setattr("secateur.pipeline.run.statistics_for", lambda *_, **__: pytest.fail("scored again"))
        assert prune(run="here/run", cut={"ratio": 0.3}).plan.decided

    def test_another_text_has_a_file_of_its_own(self, place: Path) -> None:
        self.plan(ratio=0.2)
        plan_model(
            recipe("in/tiny", calibration=CalibrationOptions("in/text.txt", 4, 17)),
            run=RunOptions(folder=Path("here/run")),
        )
        assert len(self.files(place)) == 2

    def test_what_repair_alone_sees_does_not_matter(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scores look at the same windows, whether the last ones are in random order or not."""
        text = CalibrationOptions("in/text.txt", 8, 16, score_samples=6)
        plan_model(
            recipe("in/tiny", cut={"choose": "score", "repair": "none"}, calibration=text),
            run=RunOptions(folder=Path("here/run")),
        )
        monkeypatch.setattr("secateur.pipeline.run.statistics_for", lambda *_, **__: pytest.fail("scored again"))
        made = prune(run="here/run", calibration=replace(text, shuffled=0.25)).plan
        assert made.scored["calibration_options"]["shuffled"] == 0.25
        assert len(self.files(place)) == 1

    def test_scores_are_kept_for_the_report(self, place: Path) -> None:
        for score, axes in (("l1", ("mlp",)), ("l1", ("mlp",)), ("l1", ("hidden",)), ("l2", ("mlp",))):
            decided = self.plan(score=score, axes=axes)
        kept = [load_scores(file) for file in sorted((place / "run").glob("scores-*.safetensors"))]
        assert sorted((scores.score, "hidden" in scores.units) for scores in kept) == [
            ("l1", False),
            ("l1", True),
            ("l2", False),
        ]
        [last] = [scores for scores in kept if scores.score == "l2"]
        assert (last.reduce, last.calibration) == (decided.scored["reduce"], decided.scored["calibration"])
        assert {group.name for group in decided.groups} <= last.units.keys()

    def test_a_damaged_file_is_written_anew(self, place: Path) -> None:
        first = self.plan(ratio=0.2, score="param_second")
        (file,) = self.files(place)
        file.write_bytes(b"{")
        assert self.plan(ratio=0.2, score="param_second") == first
        assert file.stat().st_size > 1000

    def test_a_file_in_its_place(self, place: Path) -> None:
        (place / "run").write_text("")
        with pytest.raises(CheckpointError, match="here/run is a file, and a folder is to hold the statistics"):
            self.plan(ratio=0.2)

    def test_an_own_score_is_never_kept(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SCORES, "mine", Score(lambda seen: seen.weight, "weights", own=True))
        self.plan(score="mine")
        monkeypatch.setitem(SCORES, "mine", Score(lambda seen: -seen.weight.square(), "weights", own=True))
        (file,) = self.files(place)
        assert not any("mine" in key for key in load_file(file))


class TestOwnScores:
    """A plan by a score of the user's says which units stay, so it serves where that score is not known."""

    def test_its_plan_can_be_read_without_it(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SCORES, "mine", Score(lambda seen: seen.weight, "weights", own=True))
        planned = plan_model(recipe("in/tiny", cut={"score": "mine"}))
        Path("here/p.json").write_text(json.dumps(planned.to_json()))
        monkeypatch.delitem(SCORES, "mine")
        assert prune(given=read_plan(Path("here/p.json"))).plan.decided
        with pytest.raises(ScoreError, match="score='mine' is unknown"):
            plan_model(recipe("in/tiny", cut={"score": "mine"}))


class TestLargeModels:
    """What is cut lies in a file where memory is short."""

    def test_the_same_weights(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        prune()
        shutil.move("here/out", "in/whole")
        monkeypatch.setattr("secateur.pipeline.run.IN_MEMORY", 0)
        prune()
        assert weights("here/out") == weights("in/whole")
        assert [name for name in names(place) if "/" not in name] == ["out"]

    def test_a_disk_without_room(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.pipeline.run.IN_MEMORY", 0)
        monkeypatch.setattr("os.posix_fallocate", raiser(OSError(28, os.strerror(28))))
        with pytest.raises(DiskError, match=r"no room for the cut weights: No space left"):
            prune()
        assert [name for name in names(place) if "/" not in name] == [".out.secateur"]


class TestRecord:
    """The folder says which text its units were chosen by."""

    @pytest.mark.parametrize(
        "options",
        [
            CalibrationOptions("in/rows.jsonl", samples=3, length=20, seed=4, column="body", chat=True),
            CalibrationOptions("self", samples=3, length=20, seed=4),
        ],
        ids=lambda options: options.text,
    )
    def test_the_calibration(self, options: CalibrationOptions, place: Path) -> None:
        pruned = prune(calibration=options)
        record = read_record(pruned.out)
        assert record is not None
        assert CalibrationOptions(**(record.calibration_options or {})) == options
        assert (record.calibration, record.seed) == (pruned.plan.scored["calibration"], 4)
        model, tokenizer = load("in/tiny", device="cpu"), load_tokenizer("in/tiny")
        tokens = self_written(model, options) if options.text == "self" else calibration_windows(tokenizer, options)
        assert record.calibration == digest(tokens)
        given = prune_model("in/tiny", "here/given", plan=pruned.plan)
        again = read_record(given.out)
        assert again is not None
        assert (again.calibration, again.calibration_options) == (record.calibration, record.calibration_options)

    @pytest.mark.parametrize(
        ("preset", "cut", "samples", "shuffled"),
        [
            ("best", {}, 256, 0.25),
            ("best", {"choose": "score", "repair": "none"}, 256, 0.0),
            ("fast", {}, 24, 0.25),
            ("llm-pruner", {}, 10, 0.0),
        ],
    )
    def test_without_one_it_is_the_presets(
        self, preset: str, cut: dict[str, Any], samples: int, shuffled: float, place: Path
    ) -> None:
        usual = calibration_of(preset)
        for planned in (
            plan_model(recipe("in/tiny", preset=preset, cut=cut)),
            prune(preset=preset, cut=cut, calibration=None).plan,
        ):
            kept = planned.scored["calibration_options"]
            assert (kept["samples"], kept["shuffled"]) == (samples, shuffled)
            assert CalibrationOptions(**kept) == replace(usual, shuffled=shuffled)

    def test_scores_of_weights_alone(self, place: Path) -> None:
        record = read_record(prune(cut={"score": "l2", "repair": "none"}).out)
        assert record is not None
        assert (record.calibration, record.calibration_options) == (None, None)

    def test_the_model_writes_the_text_of_a_plan(self, place: Path) -> None:
        options = CalibrationOptions("self", samples=3, length=20)
        planned, made = plan_model(recipe("in/tiny", calibration=options)), prune(calibration=options).plan
        assert planned.scored == made.scored
        assert [(g.name, g.kept) for g in planned.groups] == [(g.name, g.kept) for g in made.groups]

    def test_what_does_not_fit_is_refused_before_weights_are_read(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.pipeline.run.load", lambda *_, **__: pytest.fail("weights were read"))
        for text in ("self", "in/text.txt"):
            for attempt in (prune, lambda **options: plan_model("in/tiny", **options)):
                with pytest.raises(DataError, match="length=257 is longer than the model's 256 positions"):
                    attempt(calibration=CalibrationOptions(text, samples=2, length=257))
        assert names(place) == []


class TestFailure:
    def test_an_error_of_the_users_leaves_nothing(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.pipeline.run.save", raiser(DataError("no")))
        with pytest.raises(DataError):
            prune()
        assert names(place) == []

    def test_a_failure_of_ours_keeps_the_scores(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("secateur.pipeline.run.prune", raiser(RuntimeError("a bug")))
            with pytest.raises(RuntimeError):
                prune()
        assert prune(resume=True).resumed

    def test_a_full_disk(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: PreTrainedModel, folder: Path, **_: Any) -> None:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", full)
            with pytest.raises(DiskError, match=r"here/out cannot be written: No space left on device\n") as told:
                prune()
        assert told.value.__notes__ == [STAYS]
        assert [name for name in names(place) if "/" not in name] == [".out.secateur"]
        assert prune(resume=True).resumed
        assert [name for name in names(place) if "/" not in name] == ["out"]

    def test_a_file_that_cannot_grow(self, place: Path) -> None:
        """The library that writes weights reports such an error in a way of its own."""
        done = subprocess.run(
            [sys.executable, "-c", SMALL_DISK, "prune", "in/tiny", "here/out", "--score", "l2"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("secateur: error: ")
        assert "here/out cannot be written: " in done.stderr
        assert done.stderr.endswith(f"; {STAYS}\n")
        assert done.stderr.count("\n") == 1
        assert [name for name in names(place) if "/" not in name] == [".out.secateur"]

    def test_scores_that_cannot_be_kept(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.files.save_file", raiser(OSError(28, os.strerror(28))))
        with pytest.raises(CheckpointError, match=r"scores\.safetensors cannot be written: No space left on device"):
            prune()
        assert names(place) == []


class TestOverwrite:
    def test_the_new_takes_the_place_of_the_old(self, place: Path) -> None:
        prune(cut={"ratio": 0.1})
        old = weights("here/out")
        (place / "out" / "extra").touch()
        with pytest.raises(CheckpointError, match="here/out exists"):
            prune()
        prune(overwrite=True)
        assert weights("here/out") != old
        assert [name for name in names(place) if "/" not in name] == ["out"]
        assert not (place / "out" / "extra").exists()

    @pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), RuntimeError("a bug")], ids=repr)
    def test_the_old_stays_until_the_new_is_whole(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        prune(cut={"ratio": 0.1})
        before, old = names(place), weights("here/out")
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", raiser(error))
        with pytest.raises((CheckpointError, KeyboardInterrupt, RuntimeError)):
            prune(overwrite=True)
        shutil.rmtree(place / ".out.secateur", ignore_errors=True)
        assert (names(place), weights("here/out")) == (before, old)


class TestPlanModel:
    def test_a_config_gives_sizes(self, place: Path) -> None:
        planned = plan_model(recipe("in/tiny/config.json", cut={"ratio": 0.3}))
        assert all(group.keep is None and 0 < group.kept < group.units for group in planned.groups)
        assert planned.scored == {}
        (place / "sizes").mkdir()
        shutil.copy("in/tiny/config.json", "here/sizes/config.json")
        alone = plan_model(recipe("here/sizes", cut={"ratio": 0.3}))
        assert (alone.groups, alone.parameters, alone.macs) == (planned.groups, planned.parameters, planned.macs)

    def test_weights_give_units(self, place: Path) -> None:
        alike = {"score": "l2", "scope": "local", "shape": "uniform"}
        planned = plan_model(recipe("in/tiny", cut=alike))
        assert planned.decided
        assert planned.scored["score"] == "l2"
        sizes = plan_model(recipe("in/tiny", cut=alike), sizes_only=True)
        assert [group.kept for group in sizes.groups] == [group.kept for group in planned.groups]

    def test_prune_cuts_what_was_planned(self, place: Path) -> None:
        options = CalibrationOptions("in/text.txt", samples=4, length=16)
        planned = plan_model(recipe("in/tiny", calibration=options))
        made = prune().plan
        assert [(g.name, g.kept) for g in made.groups] == [(g.name, g.kept) for g in planned.groups]
        assert (planned.options.choose, made.options.choose) == ("obs", "score")  # decided while repairing
        for number, plan in enumerate((planned, made)):
            given = prune_model("in/tiny", f"here/{number}", plan=plan)
            assert given.plan == made
            assert weights("here/out") == weights(f"here/{number}")

    def test_quantised_models_have_sizes_but_no_scores(self, place: Path) -> None:
        config = json.loads(Path("in/tiny/config.json").read_text())
        write = {**config, "quantization_config": {"quant_method": "fp8"}}
        Path("in/tiny/config.json").write_text(json.dumps(write))
        assert plan_model("in/tiny", sizes_only=True).parameters["dense"] > 0
        for attempt in (plan_model, lambda name: prune_model(name, "here/out")):
            with pytest.raises(SecateurError, match=r"'in/tiny' is quantised \(fp8\)"):
                attempt("in/tiny")

    def test_a_plan_that_does_not_fit(self, place: Path) -> None:
        write_tiny(Path("in/deep"), num_hidden_layers=4)
        with pytest.raises(PlanError, match="it is of another model"):
            prune(given=plan_model(recipe("in/deep", cut={"score": "l2"})))


class TestClock:
    def test_stages_and_their_progress(self, place: Path) -> None:
        stages: list[tuple[str, list[tuple[int, int]]]] = []

        class Bar:
            def __init__(self, stage: str) -> None:
                self.steps: list[tuple[int, int]] = []
                stages.append((stage, self.steps))

            def __enter__(self) -> Callable[[int, int], None]:
                return lambda done, total: self.steps.append((done, total))

            def __exit__(self, *_: object) -> None:
                pass

        pruned = prune(bars=Bar)
        assert (
            [stage for stage, _ in stages]
            == list(pruned.seconds)
            == ["discover", "load", "score", "repair", "cut", "save"]
        )
        steps: Sequence[tuple[int, int]] = dict(stages)["score"]
        assert steps
        assert steps[-1][0] == steps[-1][1]

    def test_a_stage_that_fails_has_no_seconds(self) -> None:
        clock = Clock()
        with pytest.raises(ValueError, match="no"), clock.stage("bad"):
            raise ValueError("no")
        with clock.stage("good"):
            pass
        assert list(clock.seconds) == ["good"]

    def test_memory_only_grows(self) -> None:
        before = peak_rss()
        block = bytearray(64 * 2**20)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
        assert peak_rss() >= before
