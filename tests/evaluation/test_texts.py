"""Files become one text of rows, and tokens know the bytes that they stand for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from word_models import word_tokenizer

from secateur.errors import DataError
from secateur.evaluation.texts import encode, encode_text, read_evaluation_text, read_texts
from tiny import tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def test_the_rows_of_a_file_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps({'text': row})}\n" for row in ("", " = Title = \n", "text")))
    assert read_evaluation_text(str(file)) == "\n\n = Title = \n\n\ntext"


def test_encode_reads_a_long_text_in_one_call_and_in_silence(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    text = " ".join(f"w{i}" for i in range(40))
    with caplog.at_level(logging.WARNING):
        assert encode(tokenizer, text).tolist() == list(range(40))
        assert encode(tokenizer, text, max_tokens=3).tolist() == [0, 1, 2]
        assert encode(tokenizer, "w1", max_tokens=3).tolist() == [1]
    assert encode(tokenizer, "").dtype == torch.int64
    assert caplog.messages == []


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_all_tokens_together_are_the_whole_text(text: str) -> None:
    encoded = encode_text(tiny_tokenizer(), text)
    assert encoded.byte_ends_T.tolist() == sorted(encoded.byte_ends_T.tolist())
    assert int(encoded.byte_ends_T[-1]) == len(text.encode())


def test_a_tokenizer_that_does_not_tell_shares_the_bytes_out() -> None:
    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    encoded = encode_text(letters, "äöü!")  # type: ignore[arg-type]
    assert encoded.byte_ends_T.tolist() == [1, 3, 5, 7]


def test_only_the_first_tokens_are_encoded() -> None:
    some = encode_text(tiny_tokenizer(), "An ordinary text.", max_tokens=4)
    assert len(some.ids_T) == len(some.byte_ends_T) == 4
    for encoder in (encode, encode_text):
        with pytest.raises(
            DataError, match=r"max_tokens=0 is too small. Expected at least 1, for example max_tokens=40000"
        ):
            encoder(tiny_tokenizer(), "a", max_tokens=0)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["text.txt"], r"--ppl text\.txt: expected NAME=FILE, for example --ppl wikitext2=wiki\.test\.raw"),
        (["=text.txt"], r"--ppl =text\.txt: expected NAME=FILE"),
        (["a=x.txt", "a=x.txt"], r"--ppl a=x\.txt: a is the name of another text already"),
    ],
)
def test_texts_have_a_name_and_a_file(
    named: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("One.")
    assert read_texts(["a=x.txt"]) == {"a": "One."}
    with pytest.raises(DataError, match=message):
        read_texts(named)
