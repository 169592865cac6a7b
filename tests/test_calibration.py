"""Text is read as documented, windows are random places of it, and what is wrong with a text is said."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import secateur.calibration
from secateur.calibration import (
    CalibrationOptions,
    demo_texts,
    digest,
    read_calibration,
    read_rows,
    read_text,
    sample_windows,
)
from secateur.errors import DataError


def letter_tokenizer() -> PreTrainedTokenizerBase:
    """One token per letter, a = 1; asked to, it puts 0 in front."""
    vocabulary = {"^": 0, **{chr(96 + i): i for i in range(1, 27)}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="^"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=8)


LETTERS = letter_tokenizer()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


class TestDemoTexts:
    def test_every_text_is_in_one_half_only(self) -> None:
        from pydoc_data.topics import topics

        calibration, evaluation = demo_texts()
        for text in topics.values():
            assert (text in calibration) != (text in evaluation)
        n_distinct = len(set(topics.values()))
        assert len(calibration) + len(evaluation) == sum(map(len, set(topics.values()))) + 2 * (n_distinct - 2)

    def test_a_text_of_two_names_counts_at_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        topics = {"d": "two", "a": "one", "b": "two", "c": "three", "e": "five"}
        monkeypatch.setattr("pydoc_data.topics.topics", topics)
        assert demo_texts() == ("one\n\nthree\n\nfive", "two")


class TestRows:
    @pytest.mark.parametrize(
        ("text", "rows"),
        [
            (" \n = Title = \n \n A line . \n \n", ["", " = Title = \n", "", " A line . \n", ""]),
            (" one line \n another\n", ["one line", "another"]),
            (" one line \n another", ["one line", "another"]),
            ("a\n\nb", ["a\n", "", "b"]),
            ("a\r\n\r\nb\r\n", ["a\n", "", "b\n"]),
            ("\ufeffa\nb\n", ["a", "b"]),
            ("a\u2028b\x0cc\n", ["a\u2028b\x0cc"]),
        ],
    )
    def test_plain_text(self, text: str, rows: list[str], tmp_path: Path) -> None:
        for name in ("x.txt", "x.raw", "x.md", "x"):
            assert read_rows(write(tmp_path, name, text)) == rows

    @given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1)))
    def test_joined_rows_of_prose_are_the_lines(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in ["x", "", *lines])
        rows = secateur.calibration._text_rows(text)
        assert len(rows) == len(lines) + 2
        assert all(
            row == f"{line}\n" or (row == "" and not line.strip()) for row, line in zip(rows[2:], lines, strict=True)
        )

    def test_documents(self, tmp_path: Path) -> None:
        texts = ["a\nb\n", " c ", "ö"]
        lines = [json.dumps({"text": text, "id": 1}) for text in texts]
        for name, content in (
            ("x.jsonl", "\n".join(lines)),
            ("x.JSONL", "\n\n".join(lines) + "\n"),
            ("x.json", "\n".join(lines)),
            ("x.json", f"[{','.join(lines)}]"),
            ("x.jsonl", "\ufeff" + "\n".join(lines)),
        ):
            assert read_rows(write(tmp_path, name, content)) == texts
        assert read_rows(str(write(tmp_path, "one.json", lines[0]))) == texts[:1]

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("x.jsonl", '{"text": "a"}\n{"body": "b", "a": 1}', r"x\.jsonl', line 2: no field 'text'.*\['a', 'body'\]"),
            ("x.jsonl", '{"text": "a"}\n\n["b"]', r"line 3: a JSON list is no document\. Expected an object"),
            ("x.jsonl", '{"text": 1}', r"line 1: its 'text' is of type int, not a string"),
            ("x.jsonl", '{"text": "a"}\n{"text', r"line 2: not JSON \(.*\)\. Expected one object a line"),
            (
                "x.json",
                '[{"text": "a"}, {"body": "b"}]',
                r"x\.json', item 2: no field 'text' among its keys \['body'\]",
            ),
            ("x.json", "7", r"item 1: a JSON int is no document"),
            ("x.txt", b"ok\xff", r"x\.txt': byte 2 is not UTF-8\. Expected text in UTF-8"),
            ("x.txt", "", r"x\.txt': there is no text in it"),
            ("x.txt", " \n\n", r"x\.txt': there is no text in it"),
            ("x.jsonl", '{"text": " "}', r"x\.jsonl': there is no text in it"),
        ],
    )
    def test_a_file_that_is_not_what_it_should_be(
        self, name: str, content: str | bytes, match: str, tmp_path: Path
    ) -> None:
        file = write(tmp_path, name, content)
        for function in (read_rows, read_calibration, read_text):
            with pytest.raises(DataError, match=match):
                function(file)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"x\.txt': no such file\. Expected a text file"):
            read_rows(tmp_path / "x.txt")
        with pytest.raises(DataError, match="this is a folder"):
            read_rows(tmp_path)

    def test_a_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: object, **__: object) -> str:
            raise PermissionError(13, "Permission denied")

        file = write(tmp_path, "x.txt", "a")
        monkeypatch.setattr(Path, "read_text", forbidden)
        with pytest.raises(DataError, match=r"x\.txt': the file cannot be read \(Permission denied\)"):
            read_rows(file)


class TestParquet:
    def test_without_the_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"reading Parquet needs pyarrow\. Run: pip install 'secateur\[data\]'"):
            read_rows(write(tmp_path, "x.parquet", b"PAR1"))

    def test_the_text_column(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": ["a\n", ""], "n": [1, 2]}), tmp_path / "x.parquet")
        assert read_rows(tmp_path / "x.parquet") == ["a\n", ""]
        parquet.write_table(pyarrow.table({"n": [1, 2]}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"no column 'text' among \['n'\]"):
            read_rows(tmp_path / "x.parquet")
        parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"row 2: its 'text' is of type NoneType"):
            read_rows(tmp_path / "x.parquet")
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read_rows(write(tmp_path, "y.parquet", b"PAR1"))


class TestCalibrationText:
    def test_demo(self) -> None:
        assert read_calibration("demo") == read_text("demo") == demo_texts()[0]

    def test_plain_text_stays_as_it_is(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.txt", "\ufeff a \n\n b\n")
        assert read_calibration(file) == read_text(str(file)) == " a \n\n b\n"

    def test_documents_are_kept_apart_or_joined(self, tmp_path: Path) -> None:
        file = write(tmp_path, "x.jsonl", '{"text": "a"}\n{"text": "b"}\n')
        assert read_calibration(file) == ["a", "b"]
        assert read_text(file) == "a\n\nb"

    @pytest.mark.parametrize("name", ["./x", "/no/x", "~/no-such-x", "x.txt", "x.jsonl", "a/b/c", "x.RAW", "a\\x"])
    def test_a_missing_file_is_not_taken_for_a_data_set(self, name: str) -> None:
        with pytest.raises(DataError, match=r"no such file\. Expected a text file"):
            read_calibration(name)

    @pytest.mark.parametrize("name", ["bookcorpus", "organisation/name", "set-v1.0"])
    def test_a_data_set_without_the_package(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=rf"'{name}': no such file, and .* needs the package datasets\. Run: pip"):
            read_calibration(name)


class TestDataSet:
    """With a stand-in for the package `datasets`, which has its way to the hub only."""

    @pytest.fixture
    def datasets(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        module = ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    def test_its_train_split_is_read_as_far_as_needed(
        self, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
            assert (name, split, streaming) == ("organisation/name", "train", True)
            while True:
                yield {"text": "abc"}

        datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setattr(secateur.calibration, "MAX_CHARACTERS", 10)
        assert read_calibration("organisation/name") == ["abc"] * 4

    def test_a_column_of_another_name(self, datasets: ModuleType) -> None:
        datasets.load_dataset = lambda *_, **__: [{"body": "a"}]  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=r"'name', row 1: no field 'text' among its keys \['body'\]"):
            read_calibration("name")

    def test_whatever_fails_is_one_line(self, datasets: ModuleType) -> None:
        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError("the hub\n\nis far away")

        datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
        with pytest.raises(
            DataError, match=r"^'name': no such file, and no data set .*: the hub is far away\)\. Check.*$"
        ):
            read_calibration("name")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": ""}, r"text='' names no text\. Expected demo, a file or a data set: CalibrationOptions\('demo'\)"),
        ({"samples": 0}, r"samples=0 is too small\. Expected at least 1: CalibrationOptions\(samples=64\)"),
        ({"length": 1}, r"length=1 is too small\. Expected at least 2: CalibrationOptions\(length=128\)"),
        ({"seed": -1}, r"seed=-1 is too small\. Expected at least 0: CalibrationOptions\(seed=0\)"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        CalibrationOptions(**changes)


WORDS = st.text("abcdefghijklmnopqrstuvwxyz", max_size=30)


class TestWindows:
    @given(st.one_of(WORDS, st.lists(WORDS, max_size=5)), st.integers(1, 12), st.integers(2, 9), st.integers(0, 99))
    def test_windows_are_different_places_of_the_text_or_an_error_says_why_not(
        self, text: str | list[str], samples: int, length: int, seed: int
    ) -> None:
        documents = [text] if isinstance(text, str) else text
        options = CalibrationOptions(samples=samples, length=length, seed=seed)
        places = sum(max(len(document) - length + 1, 0) for document in documents)
        if places < samples:
            with pytest.raises(DataError, match=r"tokens, but one window needs|tiny calibration text"):
                sample_windows(text, LETTERS, options)
            return
        windows = sample_windows(text, LETTERS, options)
        assert windows.dtype == torch.int64
        assert windows.shape == (samples, length)
        assert torch.equal(windows, sample_windows(text, LETTERS, options))
        assert all(any(spell(row) in document for document in documents) for row in windows.tolist())

    def test_all_places_are_drawn_before_one_is_drawn_twice(self) -> None:
        windows = sample_windows("abcdefgh", LETTERS, CalibrationOptions(samples=6, length=3))
        assert sorted(map(spell, windows.tolist())) == ["abc", "bcd", "cde", "def", "efg", "fgh"]

    def test_another_seed_gives_other_windows(self) -> None:
        text = "abcdefghijklmnopqrstuvwxyz" * 20
        first, second = (sample_windows(text, LETTERS, CalibrationOptions(seed=seed, length=8)) for seed in (0, 1))
        assert not torch.equal(first, second)

    def test_short_documents_are_passed_over_and_the_others_drawn_evenly(self) -> None:
        documents = ["ab", "c" + "d" * 99, "e" * 400]
        # Windows at different places have the same letters here; what counts is the document.
        windows = sample_windows(documents, LETTERS, CalibrationOptions(samples=90, length=3))
        letters = [spell(row)[-1] for row in windows.tolist()]
        assert set(letters) == {"d", "e"}
        assert 30 <= letters.count("d") <= 60

    def test_only_the_first_characters_are_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secateur.calibration, "MAX_CHARACTERS", 7)
        options = CalibrationOptions(samples=2, length=4)
        for text in ("aaaaabbzzzz", ["aaaaa", "bbzzzz", "zzzzzz"]):
            assert "z" not in "".join(map(spell, sample_windows(text, LETTERS, options).tolist()))

    def test_a_text_longer_than_the_context_is_no_reason_to_warn(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        tokenizer = letter_tokenizer()
        sample_windows("abc" * 50, tokenizer, CalibrationOptions(samples=2, length=20))
        assert caplog.text == ""
        tokenizer("abc" * 50)
        assert "longer than the specified maximum" in caplog.text

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (
                "",
                r"the calibration text has 0 tokens, but one window needs 4.*CalibrationOptions\(length=2, samples=1\)",
            ),
            ("abc", r"the calibration text has 3 tokens, .* shorter window: CalibrationOptions\(length=3, samples=1\)"),
            ([], r"the longest calibration document has 0 tokens, but one window needs 4"),
            (["ab", "abc"], r"the longest calibration document has 3 tokens, but one window needs 4"),
            ("abcde", r"tiny calibration text: 5 tokens hold 2 different windows of 4, but 3 samples.*\(samples=2\)"),
            (["abcd", "abc", "abcd"], r"tiny calibration text: 8 tokens hold 2 different windows of 4, but 3 samples"),
        ],
    )
    def test_too_little_text(self, text: str | list[str], match: str) -> None:
        with pytest.raises(DataError, match=match):
            sample_windows(text, LETTERS, CalibrationOptions(samples=3, length=4))

    def test_the_tokenizer_is_asked_for_no_special_tokens(self) -> None:
        asked: dict[str, Any] = {}

        def tokenizer(texts: list[str], **options: Any) -> SimpleNamespace:
            asked.update(options)
            return SimpleNamespace(input_ids=[[1, 2, 3] for _ in texts])

        sample_windows("abc", cast(PreTrainedTokenizerBase, tokenizer), CalibrationOptions(samples=1, length=3))
        assert asked["add_special_tokens"] is False
        assert LETTERS("a").input_ids == [0, 1]  # where the property test above would see them

    @pytest.mark.demo_model
    def test_the_demo_calibration(self, demo_tokenizer: PreTrainedTokenizerBase) -> None:
        windows = sample_windows(read_calibration("demo"), demo_tokenizer, CalibrationOptions())
        assert windows.shape == (64, 128)
        decoded = cast(str, demo_tokenizer.decode(windows[0, 1:-1]))
        assert decoded.strip("\ufffd") in demo_texts()[0]


def spell(row: list[int]) -> str:
    return "".join(chr(96 + token) for token in row)


class TestDigest:
    @given(st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=8))
    def test_it_depends_on_values_and_shape_alone(self, values: list[int]) -> None:
        tokens = torch.tensor([values, values])
        assert digest(tokens) == digest(tokens.T.contiguous().T)
        assert digest(tokens) != digest(tokens.flatten())
        changed = tokens.clone()
        changed[0, 0] += 1
        assert digest(tokens) != digest(changed)

    def test_it_never_changes(self) -> None:
        expected = "1ae380e7c104b3c4"
        assert digest(torch.tensor([[1, 2], [3, 4]]))[:16] == expected
        assert len(digest(torch.zeros(0, 4, dtype=torch.int64))) == 64
