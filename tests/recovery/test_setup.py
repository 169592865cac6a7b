"""What cannot be trained is refused before any work, in one line, with nothing left; defaults are resolved."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from trainings import ROWS, distance, place_fixture, train, weights  # noqa: F401 - the fixture `place`

from secateur import RecoverOptions, SecateurError
from secateur.errors import CheckpointError, DataError, ModelError, TrainingError
from secateur.models.loading import LoadOptions
from secateur.pipeline.recipe import RunOptions
from secateur.recovery.setup import resolve_options
from tiny import names, write_tiny


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"model": "nowhere/model/x"}, ModelError, "no such file or folder"),
            ({"data": {"sources": ("nothing.json",)}}, DataError, "no such file"),
            ({"data": {"max_length": 4}}, DataError, "nothing is left of its 40 rows"),
            ({"data": {"max_length": 512}}, DataError, "max_length=512 is longer than the model's 256 positions"),
            ({"loading": LoadOptions(dtype="float16", device="cpu")}, TrainingError, "float16' overflows in training"),
            ({"method": "full", "save_adapter": True}, TrainingError, "method='full' has no adapter to save"),
            ({"method": "distill", "teacher": "here"}, ModelError, "'here': this folder holds no config.json"),
            ({"method": "distill", "model": "dense"}, ModelError, "'dense' has no record .* --teacher MODEL"),
            (
                {"method": "distill", "model": "dense", "teacher": "dense", "hidden_states_weight": 1.0},
                ModelError,
                "'dense' has no secateur_plan.json, which says what layers",
            ),
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

    def test_a_teacher_that_is_not_the_model_of_the_plan_has_no_hidden_states_to_learn(self, place: Path) -> None:
        write_tiny(place / "wide", intermediate_size=100)
        with pytest.raises(ModelError, match=r"the plan of the folder is of .*, and the teacher 'here/wide' has"):
            train("per-layer", method="distill", teacher="here/wide", hidden_states_weight=1.0)
        assert [name for name in names(place) if "/" not in name] == ["wide"]

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
        with pytest.raises(TrainingError, match=r"track='wandb' needs the package wandb. Run: pip install wandb"):
            train(method="full", track="wandb")
        assert names(place) == []


class TestResolved:
    @given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 16), st.floats(0.1, 3))
    def test_micro_batches_fill_a_step_and_no_step_has_more_rows_than_there_are(
        self, rows: int, batch_size: int, micro_batch_size: int, epochs: float
    ) -> None:
        asked = RecoverOptions(global_batch_size=batch_size, micro_batch_size=micro_batch_size, epochs=epochs)
        found, notes = resolve_options(asked, rows)
        assert found.global_batch_size % found.micro_batch_size == 0
        assert found.micro_batch_size <= micro_batch_size
        assert found.global_batch_size <= min(rows, batch_size)
        assert bool(notes) == (found.global_batch_size != batch_size)
        assert found.max_steps is not None
        assert abs(found.max_steps * found.global_batch_size - epochs * rows) <= found.global_batch_size

    def test_a_step_that_the_processes_cannot_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("secateur.processes.count", lambda: 2)
        with pytest.raises(TrainingError, match=r"a step of 7 rows cannot be shared by 2 processes.*-size 8"):
            resolve_options(RecoverOptions(global_batch_size=7), 40)

    def test_a_warmup_that_would_take_most_steps_is_shortened(self) -> None:
        found, notes = resolve_options(RecoverOptions(max_steps=8, warmup_steps=100), 40)
        assert found.warmup_steps == 0
        assert any("warmup takes 0 steps, not 100: of 8 steps" in note for note in notes)
        assert resolve_options(RecoverOptions(max_steps=8, warmup_steps=2), 40)[1] == []


class TestNotes:
    def test_fewer_rows_than_a_step_takes(self, place: Path) -> None:
        data = {"samples": 12, "validation": 0.0}
        found = train(method="full", global_batch_size=64, data=data, max_steps=2)
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
