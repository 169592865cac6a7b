"""Runs that are killed, interrupted or out of disk: what is left, and that the next run ends at the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

import secateur.cli.main
from secateur.data.calibration import CalibrationOptions
from secateur.errors import DataError, DiskError
from secateur.planning.plan import Plan, read_plan
from secateur.pruning.held_out import checked_repair
from secateur.scoring.passes.recomputation import LayerCache, ModuleCall
from secateur.scoring.scores import load_scores
from small_runs import (
    CALIBRATION,
    STAGES,
    WORK,
    emptied,
    interrupt,
    never,
    prune,
    raiser,
    top,
    weights,
    write_inputs,
)
from tiny import names

SAVING = f"{STAGES}.save_updated"
KEPT = [WORK, *(f"{WORK}/{name}" for name in ("key.json", "repaired.safetensors", "scores-1.safetensors"))]
KILLED_WHILE_SAVING = """
import os, signal, sys
import secateur.cli.main, secateur.pipeline.pipeline
secateur.pipeline.pipeline.save_updated = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(secateur.cli.main.run(sys.argv[1:]))
"""
COMMAND = "prune in/tiny here/out --calibration in/text.txt --samples 4 --length 16".split()
STAYS = "what was done so far is kept: make room, and go on with --resume (resume=True)"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(inputs: Path) -> tuple[bytes, Plan]:
    """Weights and plan of a run that nothing disturbs."""
    with emptied(inputs):
        made = prune()
        assert not made.resumed
        assert read_plan(Path("here/out/secateur_plan.json")) == made.plan
        return weights("here/out"), made.plan


@pytest.fixture(scope="module")
def left(inputs: Path) -> Path:
    """What Ctrl-C while saving leaves."""
    with emptied(inputs):
        interrupt(SAVING)
        return Path(shutil.move(f"here/{WORK}", "in/left")).absolute()


@pytest.fixture(scope="module")
def by_layers(inputs: Path) -> bytes:
    """The weights of a run that scores layer by layer, and that nothing disturbs."""
    with emptied(inputs), pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{STAGES}.CACHE_LAYERS_FROM", 0)
        prune()
        return weights("here/out")


@pytest.fixture
def place(inputs: Path) -> Iterator[Path]:
    """An empty folder for the output, with the model and the texts elsewhere."""
    with emptied(inputs):
        yield inputs


@pytest.fixture
def interrupted(left: Path, place: Path) -> Path:
    shutil.copytree(left, place / WORK)
    return place


class TestSameAsUndisturbed:
    def test_after_a_kill(self, place: Path, whole: tuple[bytes, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
        done = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_SAVING, *COMMAND], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
        assert names(place) == KEPT
        for stage in ("statistics_for", "checked_repair"):
            monkeypatch.setattr(f"{STAGES}.{stage}", never("done again"))
        resumed = prune(resume=True)
        assert resumed.resumed
        assert list(resumed.seconds) == ["discover", "load", "cut", "save"]
        assert top(place) == ["out"]
        assert (weights("here/out"), resumed.plan) == whole

    @pytest.mark.parametrize("stage", ["checked_repair", "prune", "account_for_tensors"])
    def test_after_ctrl_c_in_any_stage(self, stage: str, place: Path, whole: tuple[bytes, Plan]) -> None:
        interrupt(f"{STAGES}.{stage}")
        assert f"{WORK}/scores-1.safetensors" in names(place)
        resumed = prune(resume=True)
        assert ("repair" in resumed.seconds) == (stage == "checked_repair")
        assert (weights("here/out"), resumed.plan, top(place)) == (*whole, ["out"])

    def test_what_the_model_wrote_is_kept(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = CalibrationOptions("self", samples=4, length=16)
        interrupt(SAVING, calibration=own)
        (place / WORK / "repaired.safetensors").unlink()
        monkeypatch.setattr(f"{STAGES}.generate_windows", never("written again"))
        assert "repair" in prune(calibration=own, resume=True).seconds


class TestIterations:
    @pytest.mark.parametrize("shape", ["uniform", "per-layer"])
    def test_a_run_goes_on_after_its_last_iteration(
        self, shape: str, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = {"iterations": 3, "shape": shape, "ratio": 0.4}
        repaired: list[int] = []

        def interrupted_in_the_third(*arguments: Any, **options: Any) -> Any:
            repaired.append(1)
            if len(repaired) == 3:
                raise KeyboardInterrupt
            return checked_repair(*arguments, **options)

        monkeypatch.setattr(f"{STAGES}.checked_repair", interrupted_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            prune(cut=cut)
        assert f"{WORK}/iteration.safetensors" in names(place)
        resumed = prune(cut=cut, resume=True)
        assert (resumed.resumed, len(repaired)) == (True, 4)
        assert [stage for stage in resumed.seconds if "iteration" in stage] == [
            "repair, iteration 3",
            "cut, iteration 3",
        ]
        undisturbed = prune(cut=cut, out="here/whole")
        assert "score, iteration 2" in undisturbed.seconds
        assert (weights("here/out"), resumed.plan) == (weights("here/whole"), undisturbed.plan)
        assert top(place) == ["out", "whole"]

    def test_iterations_of_other_options_are_done_again(self, place: Path) -> None:
        """The first scores are of the dense model, and stay; the second are of what the first iteration left."""
        interrupt(SAVING, cut={"iterations": 2, "ratio": 0.4})
        assert f"{WORK}/scores-2.safetensors" in names(place)
        other = {"iterations": 2, "ratio": 0.3}
        resumed = prune(cut=other, resume=True)
        assert "score, iteration 1" not in resumed.seconds
        assert "score, iteration 2" in resumed.seconds
        prune(cut=other, out="here/whole")
        assert weights("here/out") == weights("here/whole")


class TestLeftovers:
    def test_without_resume_a_run_starts_anew(self, interrupted: Path, whole: tuple[bytes, Plan]) -> None:
        again = prune()
        assert not again.resumed
        assert "score" in again.seconds
        assert (weights("here/out"), top(interrupted)) == (whole[0], ["out"])

    def test_scores_lie_in_a_file_of_the_work_folder(self, interrupted: Path) -> None:
        assert names(interrupted) == KEPT
        kept = load_scores(interrupted / WORK / "scores-1.safetensors")
        assert (kept.score, kept.reduce, kept.seed) == ("fisher", "sum", 0)
        assert kept.units["layers.0.mlp"].shape == (84,)

    def test_another_budget_uses_the_same_scores(self, interrupted: Path) -> None:
        resumed = prune(resume=True, cut={"ratio": 0.4})
        assert resumed.resumed
        assert "score" not in resumed.seconds
        assert "repair" in resumed.seconds

    def test_scores_of_another_text_are_not_used(self, interrupted: Path) -> None:
        other = replace(CALIBRATION, seed=1)
        assert not prune(resume=True, calibration=other).resumed
        assert top(interrupted) == ["out"]

    @pytest.mark.parametrize("file", ["key.json", "scores-1.safetensors"])
    def test_damaged_files_are_made_again(self, file: str, interrupted: Path, whole: tuple[bytes, Plan]) -> None:
        (interrupted / WORK / file).write_bytes(b"{")
        assert "score" in prune(resume=True).seconds
        assert (weights("here/out"), top(interrupted)) == (whole[0], ["out"])

    def test_nothing_to_resume(self, place: Path) -> None:
        assert not prune(resume=True, cut={"score": "l2", "repair": "none"}).resumed

    def test_an_interruption_before_the_scores_leaves_nothing(self, place: Path) -> None:
        interrupt(f"{STAGES}.statistics_for")
        assert names(place) == []


class TestLayerByLayer:
    """Of large models every layer that has been scored is kept; tests/scoring holds that each kind of pass resumes."""

    @pytest.fixture(autouse=True)
    def by_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(f"{STAGES}.CACHE_LAYERS_FROM", 0)

    def interrupt_after(self, files: int) -> None:
        """Ctrl-C when so many layers are kept, each direction for itself."""
        write = LayerCache.write

        def stop(cache: LayerCache, *arguments: Any) -> None:
            write(cache, *arguments)
            if len(list(cache.folder.glob("*.safetensors"))) == files:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerCache, "write", stop)
            with pytest.raises(KeyboardInterrupt):
                prune()

    @pytest.mark.parametrize("files", [1, 2, 3, 4])  # after each of two layers, forward and backward
    def test_it_goes_on_from_the_last_layer(
        self, files: int, place: Path, by_layers: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupt_after(files)
        assert sum(name.startswith(f"{WORK}/layers-1/") for name in names(place)) == files
        computed: list[str] = []
        run = ModuleCall.run

        def recorded(call: ModuleCall, tensors: Sequence[Tensor]) -> list[Tensor]:
            computed.append(call.path)
            return run(call, tensors)

        monkeypatch.setattr(ModuleCall, "run", recorded)
        assert prune(resume=True).resumed
        assert len([path for path in computed if path.count(".") == 2]) == 4 - files
        assert (weights("here/out"), top(place)) == (by_layers, ["out"])

    def test_a_damaged_layer_is_computed_again(self, place: Path, by_layers: bytes) -> None:
        self.interrupt_after(3)
        (place / WORK / "layers-1" / "backward-1.safetensors").write_bytes(b"{")
        assert prune(resume=True).resumed
        assert weights("here/out") == by_layers

    def test_a_full_disk_is_one_line(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.models.tensor_files.save_file", raiser(OSError(28, os.strerror(28))))
        with pytest.raises(DiskError, match=r"forward-0\.safetensors cannot be written: No space left on device"):
            prune()
        assert names(place) == []


class TestFailure:
    def test_an_error_that_a_repetition_would_meet_again_leaves_nothing(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SAVING, raiser(DataError("no")))
        with pytest.raises(DataError):
            prune()
        assert names(place) == []

    def test_a_failure_of_ours_keeps_the_scores(self, place: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{STAGES}.prune", raiser(RuntimeError("a bug")))
            with pytest.raises(RuntimeError):
                prune()
        assert names(place) == KEPT

    def test_a_full_disk(self, place: Path, whole: tuple[bytes, Plan]) -> None:
        def full(self: PreTrainedModel, folder: Path, **_: Any) -> None:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, os.strerror(28))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", full)
            with pytest.raises(
                DiskError, match=r"here/out cannot be written: No space left on device\. Free [^\n]+\n"
            ) as error:
                prune()
        assert error.value.__notes__ == [STAYS]
        assert top(place) == [WORK]
        assert prune(resume=True).resumed
        assert (weights("here/out"), top(place)) == (whole[0], ["out"])

    def test_a_file_that_cannot_grow(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The library that writes weights reports such an error in a way of its own."""
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            status = secateur.cli.main.run(["prune", "in/tiny", "here/out", "--score", "l2", "--repair", "none"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capsys.readouterr().err
        assert (status, error.count("\n")) == (2, 1)
        assert error.startswith("secateur: error: ")
        assert "here/out cannot be written: " in error
        assert error.endswith(f"; {STAYS}\n")
        assert top(place) == [WORK]

    def test_scores_that_cannot_be_written(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.models.tensor_files.save_file", raiser(OSError(28, os.strerror(28))))
        with pytest.raises(DiskError, match=r"scores-1\.safetensors cannot be written: No space left on device"):
            prune()
        assert names(place) == []


def test_the_same_name_elsewhere_is_another_model(interrupted: Path) -> None:
    shutil.copytree("in", "elsewhere/in")
    with chdir("elsewhere"):
        assert not prune(out="../here/out", resume=True).resumed
