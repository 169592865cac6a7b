"""Runs that are killed, interrupted, refused or out of disk: what is left, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from secateur import CalibrationOptions, CheckpointError, DataError, PlanError, SecateurError
from secateur.calibration import calibration_windows, digest, self_written
from secateur.checkpoint import read_record
from secateur.models import load, load_tokenizer
from secateur.plan import read_plan
from secateur.run import Clock, LoadOptions, Pruned, peak_rss, plan_model, prune_model
from secateur.scores import read_scores
from tiny import names, write_tiny

TEXT = "a cat and a dog and a bird sat on a log and sang\n" * 60
OTHER_TEXT = "one fish two fish red fish blue fish and no more\n" * 60

KILLED_WHILE_SAVING = """
import os, signal, sys
import secateur.cli, secateur.run
secateur.run.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(secateur.cli.run(sys.argv[1:]))
"""
SMALL_DISK = """
import resource, signal, sys
import secateur.cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.exit(secateur.cli.run(sys.argv[1:]))
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
        patch.setattr("secateur.run.save", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune()
    return place


class TestResume:
    def test_a_killed_run_goes_on(self, killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert names(killed) == [".out.secateur", ".out.secateur/key.json", ".out.secateur/scores.safetensors"]
        with monkeypatch.context() as patch:
            patch.setattr("secateur.run.score", lambda *_, **__: pytest.fail("scored again"))
            resumed = prune(resume=True)
        assert resumed.resumed
        assert resumed.seconds.keys() == {"discover", "load", "cut", "save"}
        assert [name for name in names(killed) if "/" not in name] == ["out"]
        whole = prune_model("in/tiny", "here/whole", calibration=CalibrationOptions("in/text.txt", 4, 16))
        assert not whole.resumed
        assert "score" in whole.seconds
        assert weights("here/out") == weights("here/whole")
        assert read_plan(Path("here/out/secateur_plan.json")) == read_plan(Path("here/whole/secateur_plan.json"))

    def test_an_interrupted_run_keeps_its_scores(self, interrupted: Path) -> None:
        assert names(interrupted) == [".out.secateur", ".out.secateur/key.json", ".out.secateur/scores.safetensors"]
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
        assert not prune_model("in/tiny", "../here/out", calibration=options, resume=True).resumed

    def test_another_column_is_not_the_same(self, place: Path) -> None:
        rows = CalibrationOptions("in/rows.jsonl", samples=4, length=16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.run.save", raiser(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune(calibration=rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.run.save", raiser(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prune(calibration=rows, resume=True)
        for change in ({"column": "body"}, {"chat": True}):
            assert not prune(calibration=replace(rows, **change), resume=True, overwrite=True).resumed

    def test_another_budget_uses_the_same_scores(self, interrupted: Path) -> None:
        assert prune(resume=True, cut={"ratio": 0.4}).resumed

    @pytest.mark.parametrize("file", ["key.json", "scores.safetensors"])
    def test_damaged_leftovers(self, interrupted: Path, file: str) -> None:
        (interrupted / ".out.secateur" / file).write_bytes(b"{")
        assert not prune(resume=True).resumed
        assert names(interrupted)[0] == "out"

    def test_nothing_to_resume(self, place: Path) -> None:
        assert not prune(resume=True).resumed

    def test_an_interruption_before_the_scores_leaves_nothing(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.run.score", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune()
        assert names(place) == []

    def test_the_scores_that_are_kept(self, interrupted: Path) -> None:
        kept = read_scores(interrupted / ".out.secateur" / "scores.safetensors")
        assert (kept.score, kept.reduce, kept.seed) == ("param_second", "sum", 0)
        assert kept.units["layers.0.mlp"].shape == (84,)


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
        given = prune_model("in/tiny", "here/given", given=pruned.plan)
        again = read_record(given.out)
        assert again is not None
        assert (again.calibration, again.calibration_options) == (record.calibration, record.calibration_options)

    def test_scores_of_weights_alone(self, place: Path) -> None:
        record = read_record(prune(cut={"score": "l2"}).out)
        assert record is not None
        assert (record.calibration, record.calibration_options) == (None, None)

    def test_the_model_writes_the_text_of_a_plan(self, place: Path) -> None:
        options = CalibrationOptions("self", samples=3, length=20)
        assert plan_model("in/tiny", calibration=options) == prune(calibration=options).plan

    def test_what_does_not_fit_is_refused_before_weights_are_read(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.run.load", lambda *_, **__: pytest.fail("weights were read"))
        for text in ("self", "in/text.txt"):
            for attempt in (prune, lambda **options: plan_model("in/tiny", **options)):
                with pytest.raises(DataError, match="length=257 is longer than the model's 256 positions"):
                    attempt(calibration=CalibrationOptions(text, samples=2, length=257))
        assert names(place) == []


class TestFailure:
    def test_an_error_of_the_users_leaves_nothing(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.run.save", raiser(DataError("no")))
        with pytest.raises(DataError):
            prune()
        assert names(place) == []

    def test_a_failure_of_ours_keeps_the_scores(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("secateur.run.prune", raiser(RuntimeError("a bug")))
            with pytest.raises(RuntimeError):
                prune()
        assert prune(resume=True).resumed

    def test_a_full_disk(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: PreTrainedModel, folder: Path, **_: Any) -> None:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(CheckpointError, match=r"here/out cannot be written: No space left on device$"):
            prune()
        assert names(place) == []

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
        assert done.stderr.count("\n") == 1
        assert names(place) == []

    def test_scores_that_cannot_be_kept(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.run.write_scores", raiser(OSError(28, os.strerror(28))))
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
        planned = plan_model("in/tiny/config.json", cut={"ratio": 0.3})
        assert all(group.keep is None and 0 < group.kept < group.units for group in planned.groups)
        assert planned.scored == {}
        (place / "sizes").mkdir()
        shutil.copy("in/tiny/config.json", "here/sizes/config.json")
        alone = plan_model("here/sizes", cut={"ratio": 0.3})
        assert (alone.groups, alone.parameters, alone.macs) == (planned.groups, planned.parameters, planned.macs)

    def test_weights_give_units(self, place: Path) -> None:
        planned = plan_model("in/tiny", cut={"score": "l2"})
        assert planned.decided
        assert planned.scored["score"] == "l2"
        sizes = plan_model("in/tiny", cut={"score": "l2"}, sizes_only=True)
        assert [group.kept for group in sizes.groups] == [group.kept for group in planned.groups]

    def test_prune_cuts_what_was_planned(self, place: Path) -> None:
        options = CalibrationOptions("in/text.txt", samples=4, length=16)
        planned = plan_model("in/tiny", calibration=options)
        assert prune().plan == planned
        given = prune_model("in/tiny", "here/given", given=planned)
        assert given.plan == planned
        assert weights("here/out") == weights("here/given")

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
            prune(given=plan_model("in/deep", cut={"score": "l2"}))


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

        pruned = prune(watch=Bar)
        assert [stage for stage, _ in stages] == list(pruned.seconds) == ["discover", "load", "score", "cut", "save"]
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
