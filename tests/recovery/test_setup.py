"""What cannot be trained is refused before any work, in one line, with nothing left; defaults are resolved."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from trainings import (
    ROWS,
    distance,
    interrupted_at,
    place_fixture,  # noqa: F401 - the fixture `place`
    shelf,
    train,
    weights,
)

from secateur import RecoverOptions, SecateurError
from secateur.data.rows import Rows
from secateur.data.training_data import TrainingData
from secateur.errors import CheckpointError, DataError, ModelError, TrackingError, TrainingError
from secateur.files import read_json
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.recovery import setup
from secateur.recovery.callbacks import SeedSteps
from secateur.recovery.distillation import nll_loss
from secateur.recovery.recipe import recover_recipe
from secateur.recovery.setup import resolve_options
from tiny import names, write_tiny


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"model": "nowhere/model/x"}, ModelError, "no such file or folder"),
            ({"data": {"sources": ("nothing.json",)}}, DataError, "no such file"),
            ({"data": {"max_length": 4, "loss_on": "answers"}}, DataError, "nothing is left of its 40 rows"),
            ({"data": {"max_length": 512}}, DataError, "max_length=512 is longer than the model's 256 positions"),
            ({"loading": LoadOptions(dtype="float16", device="cpu")}, TrainingError, "float16' overflows in training"),
            ({"method": "full", "save_adapter": True}, TrainingError, "method='full' has no adapter to save"),
            ({"method": "distill", "teacher": "here"}, ModelError, "'here': this folder holds no config.json"),
            ({"method": "distill", "model": "dense"}, ModelError, "'dense' has no record .* --teacher MODEL"),
            ({"eval_texts": ("short=short.txt",)}, DataError, r"short: \d tokens are fewer than one window of 128"),
            ({"eval_texts": ("held.txt",)}, DataError, "--eval held.txt: expected NAME=FILE"),
            ({"out": "nowhere/out"}, CheckpointError, "the folder .*nowhere does not exist"),
            ({"out": "per-layer", "run": RunOptions(overwrite=True)}, CheckpointError, "holds the MODEL itself"),
        ],
    )
    def test_before_any_work(
        self, options: dict[str, Any], error: type[SecateurError], match: str, place: Path
    ) -> None:
        Path("short.txt").write_text("a cat")
        with pytest.raises(error, match=match):
            train(**options)
        assert names(place) == []

    def test_a_teacher_with_another_vocabulary(self, place: Path) -> None:
        write_tiny(place / "wordy", vocab_size=310)
        with pytest.raises(
            ModelError, match="teacher 'here/wordy' has a vocabulary of 310 tokens, and 'per-layer' one of 300"
        ):
            train(method="distill", teacher="here/wordy")
        assert [name for name in names(place) if "/" not in name] == ["wordy"]

    def test_a_teacher_that_gives_nan(self, place: Path) -> None:
        shutil.copytree(Path("dense").resolve(), place / "ill")
        broken = weights(place / "ill")
        broken["lm_head.weight"][3] = 3e38
        save_file(broken, place / "ill" / "model.safetensors", {"format": "pt"})
        with pytest.raises(TrainingError, match="gives logits with NaN or Inf"):
            train(method="distill", teacher="here/ill")
        assert [name for name in names(place) if "/" not in name] == ["ill"]

    def test_a_loss_that_becomes_nan(self, place: Path) -> None:
        with pytest.raises(TrainingError, match=r"the (loss|gradient) is (nan|inf) at step \d+\. .* smaller learning"):
            train(method="full", learning_rate=1e30, max_steps=20, eval_steps=50, data={"validation": 0.0})
        assert names(place) == []

    def test_a_validation_loss_that_becomes_nan(self, place: Path) -> None:
        said = r"the loss on validation rows is (nan|inf) after step 1\. .* smaller"
        with pytest.raises(TrainingError, match=said):
            train(method="full", learning_rate=3e38, max_steps=1, eval_steps=1, data={"validation": 0.2})
        assert names(place) == []

    def test_a_loss_that_becomes_nan_leaves_the_best_checkpoint_before(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(out="here/before", max_steps=6, eval_steps=2, patience=None)
        broken = [1.0]
        monkeypatch.setattr("secateur.recovery.trainer.nll_loss", lambda *given: nll_loss(*given) * broken[0])
        begin = SeedSteps.on_step_begin

        def break_at_last(self: Any, args: Any, state: Any, *rest: Any, **others: Any) -> None:
            broken[0] = float("nan") if state.global_step == 5 else 1.0
            begin(self, args, state, *rest, **others)

        monkeypatch.setattr(SeedSteps, "on_step_begin", break_at_last)
        with pytest.raises(TrainingError, match=r"the loss is nan at step 6.*; here/out holds step [24], the best"):
            train(max_steps=6, eval_steps=2, patience=None)
        assert [name for name in names(place) if "/" not in name] == ["before", "out"]
        result = read_json(place / "out" / "secateur_curves.json")
        assert [entry["step"] for entry in result["evaluation"]] == [0, 2, 4]

    @pytest.mark.parametrize(
        ("variable", "value", "match"),
        [
            ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed keeps its state in pickles"),
            ("ACCELERATE_MIXED_PRECISION", "fp16", "accelerate is configured for fp16, which overflows"),
        ],
    )
    def test_what_accelerate_is_configured_for(
        self, variable: str, value: str, match: str, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(TrainingError, match=match):
            train()
        assert names(place) == []

    def test_a_missing_package(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.util

        real = importlib.util.find_spec
        missing = {"peft", "matplotlib", "wandb"}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name, *rest)
        )
        with pytest.raises(TrainingError, match=r"LoRA needs the package peft. Run: pip install 'secateur\[recover\]'"):
            train()
        with pytest.raises(TrainingError, match=r"plot needs .*matplotlib. Run: pip install 'secateur\[plot\]'"):
            train(method="full", plot=True)
        with pytest.raises(TrackingError, match=r"track='wandb' needs the package wandb. Run: pip install wandb"):
            train(method="full", track="wandb")
        assert names(place) == []


class TestResolved:
    @given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 16), st.floats(0.1, 3))
    def test_micro_batches_fill_a_step_and_no_step_has_more_rows_than_there_are(
        self, rows: int, batch_size: int, micro_batch_size: int, epochs: float
    ) -> None:
        asked = RecoverOptions(global_batch_size=batch_size, micro_batch_size=micro_batch_size, epochs=epochs)
        found, notes = resolve_options(asked, _data(rows))
        assert found.global_batch_size % found.micro_batch_size == 0
        assert found.micro_batch_size <= micro_batch_size
        assert found.global_batch_size <= min(rows, batch_size)
        assert bool(notes) == (found.global_batch_size != batch_size)
        assert found.max_steps is not None
        assert abs(found.max_steps * found.global_batch_size - epochs * rows) <= found.global_batch_size

    def test_a_step_that_the_processes_cannot_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.processes.count", lambda: 2)
        with pytest.raises(TrainingError, match=r"a step of 7 rows cannot be shared by 2 processes.*-size 8"):
            resolve_options(RecoverOptions(global_batch_size=7), _data(40))

    def test_a_warmup_that_would_take_most_steps_is_shortened(self) -> None:
        found, notes = resolve_options(RecoverOptions(max_steps=8, warmup_steps=100), _data(40))
        assert found.warmup_steps == 0
        assert any("warmup takes 0 steps, not 100: of 8 steps" in note for note in notes)
        assert resolve_options(RecoverOptions(max_steps=8, warmup_steps=2), _data(40))[1] == []


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed takes as long for each token, however busy the machine is."""
    monkeypatch.setattr("secateur.recovery.time_budget._seconds_per_token", lambda run, rows: (run(), 4e-5)[1])
    monkeypatch.setattr("secateur.recovery.time_budget.LOADS", 0)
    monkeypatch.setattr("secateur.recovery.training._seconds_left", lambda minutes, began: 60 * minutes)


class TestBudget:
    def test_tokens(self) -> None:
        found, _ = resolve_options(RecoverOptions(tokens=800, global_batch_size=4), _data(40, length=10))
        assert found.max_steps == 20

    def test_tokens_of_sources_with_weights(self) -> None:
        data = replace(_data(40, length=10), weights=(1.0, 3.0))
        rows = replace(data.train, sources_R=torch.arange(40) % 2)
        assert replace(data, train=rows).tokens_per_row == 10

    @pytest.mark.parametrize("method", ["distill", pytest.param("lora", marks=pytest.mark.slow)])
    @pytest.mark.usefixtures("steady")
    def test_minutes_are_kept_to(self, method: Any, place: Path) -> None:
        """With teaching, or the forward and backward pass alone, at the same speed."""
        found = train(method=method, minutes=0.02, max_steps=None, patience=None, eval_steps=None)
        assert found.steps == {"distill": 13, "lora": 26}[method]

    @pytest.mark.usefixtures("steady")
    def test_a_teacher_that_takes_longer_leaves_fewer_steps(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fewer than the 13 that are planned, of the same rows."""
        seconds = iter((60, 60, 15))  # of each minute: before and after layers, and when the teacher has read
        monkeypatch.setattr("secateur.recovery.training._seconds_left", lambda minutes, began: next(seconds) * minutes)
        found = train(method="distill", minutes=0.02, max_steps=None, patience=None, eval_steps=None)
        assert found.steps == 6

    @pytest.mark.usefixtures("steady")
    def test_steps_of_a_time_are_found_once(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {"minutes": 0.01, "max_steps": None, "patience": None, "eval_steps": 2}
        with interrupted_at(3):
            train(**given)
        steps = read_json(place / ".out.secateur" / "steps.json")["steps"]
        monkeypatch.setattr("secateur.recovery.time_budget.pace_of", lambda *_: pytest.fail("timed again"))
        found = train(**given, run=RunOptions(resume=True))
        assert (found.steps, found.resumed) == (steps, True)

    def test_a_step_that_takes_longer_is_taken(self, place: Path) -> None:
        assert train(minutes=1e-6, max_steps=None, eval_steps=None).steps == 1

    def test_minutes_of_a_model_that_no_process_holds(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.processes.sharded", lambda: True)
        with pytest.raises(TrainingError, match=r"minutes=20: a step is timed with the whole model.*--tokens 400k"):
            train(minutes=20, max_steps=None)

    def test_two_budgets(self) -> None:
        with pytest.raises(
            TrainingError, match=r"max_steps=3 and minutes=20 both say when to stop.*leave out max_steps"
        ):
            RecoverOptions(max_steps=3, minutes=20)


class TestMethod:
    @pytest.mark.parametrize(("model", "method"), [("per-layer", "lora+distill"), ("dense", "lora")])
    def test_a_teacher_where_a_dense_model_is_known(self, model: str, method: str, place: Path) -> None:
        found = train(model, method="auto", max_steps=1)
        assert found.method == method
        assert recover_recipe(file=found.out / "recipe.yaml").options.method == method


class TestData:
    def test_what_the_dense_model_writes(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = {"sources": ("self",), "samples": 16, "max_length": 24}
        first = train(data=data, max_steps=2, eval_steps=1, seed=3)
        assert (first.rows, first.tokens) == (15, 2 * 8 * 24)
        with interrupted_at(1):
            train(out="here/again", data=data, max_steps=2, eval_steps=1, seed=3)
        monkeypatch.setattr("secateur.recovery.setup.generate_windows", lambda *_, **__: pytest.fail("written again"))
        train(out="here/again", data=data, max_steps=2, eval_steps=1, seed=3, run=RunOptions(resume=True))
        assert distance("here/again", "here/out") == 0

    def test_a_model_that_does_not_say_who_would_write(self, place: Path) -> None:
        with pytest.raises(ModelError, match=r"'dense' has no record .* --teacher MODEL"):
            train("dense", data={"sources": ("self",)})

    def test_without_a_source_the_text_of_the_cut(self, place: Path) -> None:
        text = str(shelf() / "text.txt")
        assert recover_recipe("per-layer").data.sources == (text,)
        train(max_steps=1)
        assert recover_recipe("here/out").data.sources == ("rows.json",)

    def test_a_model_that_nothing_cut(self, place: Path) -> None:
        with pytest.raises(DataError, match=r"--data is missing, and 'dense' has no recipe.yaml.*--data alpaca.json"):
            recover_recipe("dense")


def _data(rows: int, *, length: int = 8) -> TrainingData:
    ids_T = torch.zeros(rows * length, dtype=torch.int32)
    starts = torch.arange(0, len(ids_T) + 1, length)
    return TrainingData(
        Rows(ids_T, ids_T == 0, starts, torch.zeros(rows, dtype=torch.int32)),
        Rows(ids_T[:0], ids_T[:0] == 0, starts[:1], ids_T[:0]),
        None,
    )


class TestNotes:
    def test_fewer_rows_than_a_step_takes(self, place: Path) -> None:
        data = {"samples": 12, "validation": 0.0}
        found = train(method="full", global_batch_size=64, micro_batch_size=4, data=data, max_steps=2)
        assert any("a step takes 12 of the 12 rows" in note for note in found.notes)
        assert found.evaluation == ()
        assert found.best_step == 2

    def test_held_out_text_that_is_in_the_data(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        Path("seen.txt").write_text("\n".join(f"{row['instruction']} {row['output']}" for row in ROWS[20:]))
        texts = ("seen=seen.txt", "reference=held.txt")
        found = train(method="full", eval_texts=texts, max_steps=1, data={"max_length": 250})
        notes = [note for note in found.notes if "flatters its perplexity" in note]
        assert len(notes) == 1
        assert re.match(r"[\d.]+ % of the held-out text seen has 13 words in a row in common with the data;", notes[0])
        assert notes[0] in caplog.text

    def test_a_launcher_does_not_set_the_precision(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train(out="here/alone", method="full", max_steps=1)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        train(method="full", max_steps=1)
        assert distance("here/out", "here/alone") == 0


@pytest.mark.parametrize(("seconds", "fast"), [((4.0, 1.0), True), ((1.2, 1.0), False), ((1.0, 3.0), False)])
def test_bfloat16_where_it_is_clearly_faster_and_as_before_where_a_run_goes_on(
    seconds: tuple[float, float], fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(setup, "_product_seconds", lambda: seconds)
    auto = LoadOptions(device="cpu")
    assert setup._use_bf16(auto, tmp_path) is fast
    monkeypatch.setattr(setup, "_product_seconds", lambda: seconds[::-1])
    assert setup._use_bf16(auto, tmp_path) is fast
    assert setup._use_bf16(LoadOptions(device="cpu", dtype="bfloat16"), tmp_path) is True
