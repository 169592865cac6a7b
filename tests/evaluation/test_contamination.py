"""A warning names the text that a model was calibrated or trained on, and nothing is said of what is not known."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from word_models import word_tokenizer

from secateur.data.calibration import CalibrationOptions
from secateur.data.options import DataOptions
from secateur.data.training_data import read_training_data
from secateur.data.windows import calibration_windows, digest
from secateur.evaluation.contamination import warn_of_overlap
from tiny import tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


WORDS = " ".join(f"word{i}" for i in range(200))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.txt"
    file.write_text(WORDS)
    return file


def recovered(*sources: str, before: Any = None, **others: Any) -> dict[str, Any]:
    """What a record says of a training, as it is read back from JSON."""
    options = DataOptions(sources, **others)
    rows = read_training_data(tiny_tokenizer(), options).train.digest()
    return {"data": {**asdict(options), "sources": list(sources)}, "rows": rows, "before": before}


def warnings(recovery: Any, caplog: pytest.LogCaptureFixture, text: str = f"Before. {WORDS.upper()}") -> list[str]:
    caplog.clear()
    texts = {"far": "another text", "near": text}
    warn_of_overlap("tuned", tiny_tokenizer(), texts, {"recovery": recovery})
    return caplog.messages


def test_the_text_and_the_source_are_named(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    [message] = warnings(recovered(str(rows)), caplog)
    assert re.fullmatch(
        rf"tuned: \d+ % of the rows it was trained on, from {rows}, share 13 words in a row with the evaluation text "
        "near; this flatters the result, so train on another text",
        message,
    )


def test_weights_of_sources_are_no_part_of_their_names(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(warnings(recovered(f"{rows}@2", "demo"), caplog)) == 1


def test_a_folder_is_read_again(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert f"from {rows.parent}, share" in warnings(recovered(str(rows.parent)), caplog)[0]


def test_every_training_before_counts(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(warnings(recovered("demo", before=recovered(str(rows))), caplog)) == 1


def test_validation_rows_judge_the_training_and_count_too(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = DataOptions((str(rows),), max_length=64, validation=0.5)
    held_back = read_training_data(tiny_tokenizer(), options).validation
    text = " ".join(str(tiny_tokenizer().decode(held_back.ids_T[held_back.slice_of(i)])) for i in range(len(held_back)))
    assert len(warnings(recovered(str(rows), max_length=64, validation=0.5), caplog, text)) == 1


def test_another_text_is_no_reason(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(recovered(str(rows)), caplog, " ".join(reversed(WORDS.split()))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"sources": ["organisation/name"]},
        {"sources": ["no-such.txt"]},
        {"sources": []},
        {"max_length": 50},
        {"max_length": "many"},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_cannot_be_read_again(
    change: dict[str, Any], rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recovery = recovered(str(rows))
    assert warnings({**recovery, "data": {**recovery["data"], **change}}, caplog) == []


def test_what_a_later_version_says_besides_is_passed_over(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    recovery = recovered(str(rows))
    assert len(warnings({**recovery, "data": {**recovery["data"], "colour": 1}}, caplog)) == 1


def test_nothing_is_said_of_a_record_of_another_form(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings({"rows": "abc"}, caplog) == []
    assert warnings(None, caplog) == []


def test_nothing_is_said_where_the_file_has_changed(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    recovery = recovered(str(rows))
    rows.write_text(f"More and {WORDS}")
    assert warnings(recovery, caplog) == []


class TestCalibration:
    TEXT = " ".join(f"w{i}" for i in range(90))

    @pytest.fixture
    def calibrated(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "x.txt").write_text(self.TEXT)
        options = CalibrationOptions(str(tmp_path / "x.txt"), samples=4, length=20)
        tokens = calibration_windows(tokenizer, options)
        return {"calibration": digest(tokens), "calibration_options": asdict(options)}

    def warnings(
        self, tokenizer: PreTrainedTokenizerFast, calibrated: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> list[str]:
        warn_of_overlap("pruned", tokenizer, {"far": "another text", "near": f"x {self.TEXT}"}, calibrated)
        return [record.getMessage() for record in caplog.records]

    def test_the_text_is_named(
        self, tokenizer: PreTrainedTokenizerFast, calibrated: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        (message,) = self.warnings(tokenizer, calibrated, caplog)
        assert message.startswith("pruned: 100 % of its calibration windows, from ")
        assert message.endswith(
            "share 13 words in a row with the evaluation text near; this flatters the result, so calibrate on another "
            "text"
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 1},
            {"text": "no-such.txt"},
            {"text": "organisation/name"},
            {"text": "self"},
            {"length": 500},
            {"samples": "many"},
        ],
        ids=str,
    )
    def test_nothing_is_said_of_what_cannot_be_drawn_again(
        self,
        change: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        calibrated: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        changed = {**calibrated, "calibration_options": {**calibrated["calibration_options"], **change}}
        assert self.warnings(tokenizer, changed, caplog) == []
        assert self.warnings(tokenizer, {"calibration": None, "calibration_options": None}, caplog) == []
